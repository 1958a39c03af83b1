import errno
import itertools
import stat
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

from memsave.data import DataError
from memsave.data.cache import cached_folder
from memsave.data.volumes.layouts import find_cases
from memsave.data.volumes.phantoms import generate as phantom
from memsave.data.volumes.phantoms.anatomy import DRAWN
from memsave.data.volumes.phantoms.generate import ensure_phantoms, write_phantoms
from memsave.data.volumes.phantoms.synthesis import smooth_field, synthesise
from memsave.data.volumes.reader import read_case, regions

SIZE = (24, 24, 20)


def draw(*seed, size=SIZE, enhancing=True):
    return synthesise(size, anatomy=DRAWN, rng=np.random.default_rng(seed), enhancing=enhancing)


def test_phantoms_have_the_layout_of_brats(phantoms):
    assert find_cases(phantoms[0].label.parents[1]) == phantoms
    scan = read_case(phantoms[0])
    assert scan.image.shape == (4, *SIZE) and scan.label.shape == SIZE
    np.testing.assert_array_equal(scan.affine[:, :3], np.diag([-1, -1, 1, 0])[:, :3])
    np.testing.assert_array_equal(scan.affine[:3, 3], [0, SIZE[1] - 1, 0])
    stored = [nibabel.load(path).get_data_dtype() for path in (*phantoms[0].images, phantoms[0].label)]
    assert stored == [np.int16] * 4 + [np.uint8]


@pytest.mark.parametrize("seed", range(12))
def test_every_case_has_a_tumour_inside_its_brain(seed):
    image, label = draw(0, seed)
    assert (image[0][label > 0] > 0).all()
    assert (label == 2).sum() > 20 and (label == 4).any()


def test_the_core_lies_inside_the_whole_tumour():
    from scipy import ndimage

    _, label = draw(0, 1, size=(64, 64, 56))
    wt, tc, et = regions(torch.from_numpy(label)).numpy()
    assert et.sum() < tc.sum() < wt.sum()
    # the shapes are nested: edema touches the core, and the surroundings of necrosis are mostly rim
    assert (ndimage.binary_dilation(tc) & wt & ~tc).any()
    around = ndimage.binary_dilation(label == 1) & (label != 1)
    assert et[around].mean() > 0.7


def test_the_background_is_zero_and_the_brain_is_not():
    image, _ = draw(0, 2, size=(48, 48, 40))
    brain = image[0] > 0
    assert 0.1 < brain.mean() < 0.5
    assert all(np.array_equal(modality > 0, brain) for modality in image)
    faces = (brain.take(side, axis=axis) for side, axis in itertools.product((0, -1), range(3)))
    assert not any(face.any() for face in faces)


def test_modalities_have_the_expected_contrast():
    image, label = draw(0, 6, size=(64, 64, 56))
    t1, t1ce, t2, flair = image
    healthy = (t1 > 0) & (label == 0)
    assert np.median(t1ce[label == 4]) > 1.2 * np.median(t1ce[healthy])
    assert np.median(flair[label == 2]) > 1.1 * np.median(flair[healthy])
    assert np.median(t2[label == 1]) > 1.2 * np.median(t2[healthy])
    assert np.median(t1[label == 1]) < np.median(t1[healthy])


def test_no_threshold_on_flair_finds_every_tumour():
    inside, truth = [], []
    for index in range(4):
        image, label = draw(0, index, size=(96, 96, 80))
        values = image[3][image[3] > 0]
        inside.append((values - values.mean()) / values.std())
        truth.append(label[image[3] > 0] > 0)

    def worst(cut):  # the lowest Dice of all cases
        return min(2 * ((z > cut) & t).sum() / ((z > cut).sum() + t.sum()) for z, t in zip(inside, truth))

    assert 0.3 < max(worst(cut) for cut in np.linspace(-1, 4, 101)) < 0.85


def test_the_same_seed_draws_the_same_case_and_another_does_not(tmp_path, phantoms):
    again = write_phantoms(tmp_path, cases=2, size=SIZE, seed=0, without_enhancing=0.25)
    first, second = read_case(phantoms[0]), read_case(phantoms[1])
    np.testing.assert_array_equal(read_case(again[0]).image, first.image)
    np.testing.assert_array_equal(read_case(again[1]).label, second.label)
    assert not np.array_equal(first.label, second.label)
    assert not np.array_equal(draw(1, 0)[1], first.label)


def test_the_stated_fraction_has_no_enhancing_part(phantoms):
    enhancing = [bool((read_case(case).label == 4).any()) for case in phantoms]
    assert enhancing == [True, True, True, False]
    assert (read_case(phantoms[3]).label == 1).any()


def test_smooth_field_is_smooth_and_normalised():
    field = smooth_field(np.random.default_rng(0), (40, 30, 20), spacing=8)
    assert field.shape == (40, 30, 20) and field.dtype == np.float32
    assert field.mean() == pytest.approx(0, abs=1e-4) and field.std() == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(field, axis=0)).max() < 0.6


def test_the_cache_is_reused_and_readable_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path))
    settings = {"cases": 2, "size": (16, 16, 16), "seed": 5}
    first = ensure_phantoms(**settings)
    times = [case.label.stat().st_mtime_ns for case in first]
    monkeypatch.setattr(phantom, "write_phantoms", None)  # an error if called again
    assert ensure_phantoms(**settings) == first
    assert [case.label.stat().st_mtime_ns for case in first] == times
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("phantom-16x16x16-n2-seed5-")


def test_other_settings_or_another_version_are_generated_again(tmp_path, monkeypatch):
    ensure_phantoms(tmp_path, cases=1, size=(16, 16, 16))
    ensure_phantoms(tmp_path, cases=1, size=(16, 16, 16), without_enhancing=0.5)
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    ensure_phantoms(tmp_path, cases=1, size=(16, 16, 16))
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    write = phantom._write_case

    def interrupted(root, *, index, **settings):
        if index == 1:
            raise KeyboardInterrupt
        write(root, index=index, **settings)

    monkeypatch.setattr(phantom, "_write_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_phantoms(tmp_path, cases=2, size=(16, 16, 16))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(ensure_phantoms(tmp_path, cases=2, size=(16, 16, 16))) == 2


@pytest.mark.slow
def test_concurrent_generations_agree(tmp_path):
    program = (
        "import sys; from memsave.data.volumes.phantoms.generate import ensure_phantoms\n"
        "print([case.id for case in ensure_phantoms(sys.argv[1], cases=3, size=(16, 16, 16))])"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate(timeout=60)[0] for process in both)
    assert first == second and first.count("Phantom") == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_the_slower_of_two_processes_uses_the_other_ones_folder(tmp_path, monkeypatch):
    write = phantom.write_phantoms

    def overtaken(root, **settings):
        write(root, **settings)
        winner = root.with_name(root.name[1:].rpartition(".")[0])
        write(winner, **settings)
        return []

    monkeypatch.setattr(phantom, "write_phantoms", overtaken)
    assert len(ensure_phantoms(tmp_path, cases=1, size=(16, 16, 16))) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_with_a_missing_case_is_reported(tmp_path):
    case, _ = ensure_phantoms(tmp_path, cases=2, size=(16, 16, 16))
    for path in (*case.images, case.label):
        path.unlink()
    with pytest.raises(DataError, match=r"phantom-16x16x16\S* holds 1 of 2 phantoms: delete it"):
        ensure_phantoms(tmp_path, cases=2, size=(16, 16, 16))


def test_cached_files_are_readable_by_others(tmp_path):
    (case,) = ensure_phantoms(tmp_path, cases=1, size=(16, 16, 16))
    plain = tmp_path / "plain"
    plain.mkdir()
    mode = stat.S_IMODE(plain.stat().st_mode)
    assert stat.S_IMODE(case.label.parents[1].stat().st_mode) == mode


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cases": 0}, "number of phantoms is 0"),
        ({"size": (241, 240, 155)}, r"size is \(241, 240, 155\)"),
        ({"size": (15, 16, 16)}, r"size is \(15, 16, 16\)"),
        ({"size": (32, 32)}, r"size is \(32, 32\)"),
        ({"without_enhancing": 1.5}, r"without_enhancing is 1\.5"),
    ],
)
def test_bad_settings_are_reported(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        write_phantoms(tmp_path, **settings)


def test_a_full_cache_is_reported_with_a_remedy(tmp_path):
    def full(folder):
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=rf"{tmp_path} cannot keep .* \(No space left on device\); .* MEMSAVE_CACHE"):
        cached_folder(tmp_path, name="thing", settings={}, make=full)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_source_is_not_reported_as_a_cache_error(tmp_path):
    def denied(folder):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.gguf")

    with pytest.raises(PermissionError, match=r"/elsewhere/model\.gguf"):
        cached_folder(tmp_path, name="thing", settings={}, make=denied)


@pytest.mark.parametrize("root", ["cache", "above/cache"])
def test_a_cache_in_a_read_only_parent_folder_is_reported(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)

    def denied(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / root.partition("/")[0]))

    with pytest.raises(DataError, match=r"cache cannot keep .* MEMSAVE_CACHE"):
        cached_folder(root, name="thing", settings={}, make=denied)
