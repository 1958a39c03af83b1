import numpy as np
import pytest
import torch

pytest.importorskip("nilearn", reason="needs the extra mni")

from memsave.data.volumes.layouts import find_cases
from memsave.data.volumes.phantoms import mni
from memsave.data.volumes.phantoms.generate import ensure_phantoms, write_phantoms
from memsave.data.volumes.phantoms.mni import MNI152
from memsave.data.volumes.phantoms.synthesis import CODE, _acquire, synthesise
from memsave.data.volumes.reader import read_case, regions

SIZE = (60, 60, 48)


def draw(*seed, size=SIZE, enhancing=True):
    return synthesise(size, anatomy=MNI152, rng=np.random.default_rng(seed), enhancing=enhancing)


def undeformed(*, scale=0.5):
    axes = [np.arange(-half, half, 1 / scale, dtype=np.float32) for half in MNI152.half_extent]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    return points, mni.mni_head(points, rng=np.random.default_rng(0), scale=scale)


def test_the_head_has_the_size_and_the_tissue_of_a_brain():
    points, head = undeformed()
    litres = head.brain.sum() * 8e-6  # voxels of 2 mm
    assert 1.5 < litres < 2.1  # the volume of the template, which is larger than most heads
    grey, white, liquor = ((head.tissue[head.brain] == CODE[name]).mean() for name in ("grey", "white", "csf"))
    assert grey > white > liquor > 0.03
    np.testing.assert_allclose(head.mixture.sum(0), 1, atol=1e-3)
    x, y, z = points[:, head.tissue == CODE["ventricle"]]
    assert np.abs(x).max() < 45 and (x > 5).any() and (x < -5).any()  # one on each side, near the middle
    assert y.min() > -60 and y.max() < 60 and z.min() > -25 and z.max() < 30


def test_x_runs_to_the_left_and_y_to_the_back():
    points, head = undeformed()
    below = head.brain & (points[2] < -55)  # cerebellum and brainstem are at the back
    assert points[1][below].mean() > 10
    # the template is symmetric, so left and right cannot be distinguished
    right, left = ((head.brain & side).sum() for side in (points[0] < -1, points[0] > 1))
    assert right == pytest.approx(left, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_tumours_are_nested_and_inside_the_brain(seed):
    image, label = draw(0, seed)
    assert (image[0][label > 0] > 0).all()
    wt, tc, et = regions(torch.from_numpy(label)).numpy()
    assert 0 < et.sum() < tc.sum() < wt.sum() < 0.3 * (image[0] > 0).sum()


def test_modalities_have_the_expected_contrast():
    image, label = draw(0, 2)
    t1, t1ce, t2, flair = image
    healthy = (t1 > 0) & (label == 0)
    assert all(np.array_equal(modality > 0, t1 > 0) for modality in image)
    assert np.median(t1ce[label == 4]) > 1.2 * np.median(t1ce[healthy])
    assert np.median(flair[label == 2]) > 1.1 * np.median(flair[healthy])
    assert np.median(t2[label == 1]) > 1.2 * np.median(t2[healthy])


def test_white_matter_is_brighter_than_grey_on_t1_and_darker_on_t2():
    _, head = undeformed()
    t1, _, t2, _ = _acquire(head, rng=np.random.default_rng(0), scale=0.5)
    grey, white = (head.brain & (head.mixture[part] > 0.9) for part in (1, 2))
    assert np.median(t1[white]) > 1.15 * np.median(t1[grey])
    assert np.median(t2[white]) < 0.9 * np.median(t2[grey])


def test_cases_depend_only_on_seed_and_number(tmp_path):
    few = write_phantoms(tmp_path / "few", cases=1, size=SIZE, anatomy="mni152")
    more = ensure_phantoms(tmp_path / "cache", cases=2, size=SIZE, anatomy="mni152")
    first, again, second = (read_case(case) for case in (*few, *more))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert not np.array_equal(first.image[0] > 0, second.image[0] > 0)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("mni-phantom-60x60x48-n2-seed0-") and find_cases(folder) == more
