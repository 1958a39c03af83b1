"""Segmentation of new cases: output files, and errors that affect only their case."""

import csv
import errno
import gzip
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nibabel")
pytest.importorskip("monai")

import nibabel

from memsave.config import ConfigError
from memsave.data.volumes.brats import BratsData
from memsave.data.volumes.dataset import Volumes
from memsave.data.volumes.layouts import MODALITIES, find_cases
from memsave.data.volumes.metrics import region_scores
from memsave.data.volumes.nifti import read_header
from memsave.data.volumes.reader import labels_of, read_label, regions
from memsave.data.volumes.schemes import SCHEMES
from memsave.predict import main, write_labels
from memsave.tasks.segmentation.ensemble import load_networks
from memsave.tasks.segmentation.unet_config import UNetConfig

MASKS = torch.zeros(3, 1, 1, 1, dtype=torch.bool)


@pytest.fixture
def one_case(trained, tmp_path):
    """The folder of a copy of one phantom with the id A."""
    first = sorted(path for path in trained[1].iterdir() if path.is_dir())[0]
    (tmp_path / "one" / "A").mkdir(parents=True)
    for path in first.iterdir():
        shutil.copy(path, tmp_path / "one" / "A" / path.name.replace(first.name, "A"))
    return tmp_path / "one"


def predict(trained, output, *arguments, source=None):
    run, phantoms = trained
    return main([f"checkpoint={run}", f"input={source or phantoms}", f"output={output}", *arguments])


def test_predictions_have_the_scores_of_the_run(trained, tmp_path):
    assert predict(trained, tmp_path) == 0
    cases = {case.id: case for case in find_cases(trained[1])}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.nii.gz" for name in cases)
    with (trained[0] / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        case = cases[row["case"]]
        image, reference = nibabel.load(tmp_path / f"{case.id}.nii.gz"), nibabel.load(case.images[0])
        assert image.shape == reference.shape and np.array_equal(image.affine, reference.affine)
        found = torch.from_numpy(np.asarray(image.dataobj))
        assert set(found.unique().tolist()) <= {0, 1, 2, 4}
        scores = region_scores(regions(found), regions(torch.from_numpy(read_label(case))))
        for key, value in scores.items():
            assert float(row[key]) == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_a_case_that_fails_does_not_stop_the_others(trained, tmp_path, capfd):
    source = tmp_path / "new"
    shutil.copytree(trained[1], source)
    broken = sorted(path for path in source.iterdir() if path.is_dir())[0]
    (file,) = broken.glob("*_t2.nii.gz")
    file.write_bytes(file.read_bytes()[:200])
    for mask in source.glob("*/*_seg.nii.gz"):
        mask.unlink()  # new cases have no mask
    assert predict(trained, tmp_path / "out", source=source) == 1
    err = capfd.readouterr().err
    assert f"{broken.name} failed" in err and "is not a readable NIfTI file" in err
    assert "segmented 3 of 4 cases" in err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_flips_and_windows_change_the_prediction_as_expected(trained, tmp_path):
    source = tmp_path / "one"
    first = sorted(path for path in trained[1].iterdir() if path.is_dir())[0]
    shutil.copytree(first, source / first.name)
    found = {}
    size = list(Volumes(find_cases(source))[0]["image"].shape[1:])
    for arguments in ("", "flips=true", "window=whole", f"window={size}"):
        assert predict(trained, tmp_path / "out", *filter(None, [arguments]), source=source) == 0
        found[arguments] = np.asarray(nibabel.load(tmp_path / "out" / f"{first.name}.nii.gz").dataobj)
    assert (found["window=whole"] == found[f"window={size}"]).all()
    assert (found["flips=true"] != found[""]).any()


def as_plain(path):
    path.write_bytes(gzip.decompress(path.read_bytes()))


def as_gzip_without_suffix(path):
    path.rename(path.with_suffix(""))


def as_nifti2(path):
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti2Image(np.asarray(image.dataobj), image.affine), path)


@pytest.mark.parametrize("change", [as_plain, as_gzip_without_suffix, as_nifti2])
def test_all_readable_files_can_be_segmented(trained, one_case, tmp_path, change):
    assert predict(trained, tmp_path / "before", source=one_case) == 0
    for path in (one_case / "A").glob("A_t*.nii.gz"):
        change(path)
    assert predict(trained, tmp_path / "after", source=one_case) == 0
    before, after = (nibabel.load(tmp_path / name / "A.nii.gz") for name in ("before", "after"))
    assert np.array_equal(before.dataobj, after.dataobj) and np.array_equal(before.affine, after.affine)


def test_an_unreadable_file_is_reported_before_inference(trained, one_case, tmp_path, monkeypatch, capfd):
    from memsave import predict as module

    path = one_case / "A" / "A_t1.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata() * (1 + 1j), image.affine), path)
    monkeypatch.setattr(module, "segment", lambda *arguments, **options: pytest.fail("segmented"))
    assert predict(trained, tmp_path / "out", source=one_case) == 1
    assert "A_t1.nii.gz holds voxels of type complex128, and float32 cannot" in capfd.readouterr().err


def test_another_layout_sets_its_labels(trained, tmp_path):
    source = tmp_path / "new"
    first = sorted(path for path in trained[1].iterdir() if path.is_dir())[0]
    (source / "A").mkdir(parents=True)
    for ours, theirs in (("t1", "t1n"), ("t1ce", "t1c"), ("t2", "t2w"), ("flair", "t2f")):
        shutil.copy(first / f"{first.name}_{ours}.nii.gz", source / "A" / f"A-{theirs}.nii.gz")
    assert predict(trained, tmp_path / "new2023", "layout=brats2023", source=source) == 0
    assert predict(trained, tmp_path / "old", source=trained[1]) == 0
    new, old = (
        np.asarray(nibabel.load(path).dataobj)
        for path in (tmp_path / "new2023" / "A.nii.gz", tmp_path / "old" / f"{first.name}.nii.gz")
    )
    assert (new == np.where(old == 4, 3, old)).all() and (old == 4).any()


SLOWER = pytest.param("folder, as in 2023", marks=pytest.mark.slow)


@pytest.mark.parametrize("layout", ["brats2021", "brats2023", "msd", "folder", SLOWER])
def test_the_order_of_modalities_does_not_change_the_segmentation(trained, one_case, tmp_path, monkeypatch, layout):
    """The network identifies modalities by position, the user by name."""
    from memsave import predict as module

    seen, network = [], load_networks([trained[0]])
    monkeypatch.setattr(module, "load_networks", lambda folders: network)
    monkeypatch.setattr(module, "segment", lambda model, volume, *_, **__: seen.append(volume["image"]) or MASKS)
    monkeypatch.setattr(module, "write_labels", lambda *_, **__: None)
    assert predict(trained, tmp_path / "out", source=one_case) == 0
    names = dict(zip(MODALITIES, ("t1n", "t1c", "t2w", "t2f") if "2023" in layout else MODALITIES))
    source, theirs, layout = as_layout(one_case, layout, names), list(names.values()), layout.partition(",")[0]
    for order in itertools.permutations(theirs):
        arguments = [f"layout={layout}", f"modalities=[{','.join(order)}]"]
        assert predict(trained, tmp_path / "out", *arguments, source=source) == 0
        assert torch.equal(seen.pop(), seen[0]), order
    if layout != "folder":  # a challenge's layout has its own names
        assert predict(trained, tmp_path / "out", f"layout={layout}", source=source) == 0
        assert torch.equal(seen.pop(), seen[0])
    assert len(seen) == 1


def as_layout(source, layout, names):
    """Copy the case A from the layout of BraTS 2021 to another layout; returns the folder."""
    root, own = source.parent / "other", source / "A"
    (root / "A").mkdir(parents=True)
    if layout == "msd":
        images = [nibabel.load(own / f"A_{name}.nii.gz") for name in ("flair", "t1", "t1ce", "t2")]
        (root / "imagesTs").mkdir()
        stacked = np.stack([image.get_fdata(dtype=np.float32) for image in images], axis=-1)
        nibabel.save(nibabel.Nifti1Image(stacked, images[0].affine), root / "imagesTs" / "A.nii.gz")
        return root
    for ours, theirs in names.items():
        separator = "-" if layout == "brats2023" else "_"
        shutil.copy(own / f"A_{ours}.nii.gz", root / "A" / f"A{separator}{theirs}.nii.gz")
    return root


def test_modality_names_of_folder_and_challenges_are_matched(tmp_path):
    from memsave.predict import Arguments, _scan_kwargs

    def ask(*trained, **given):
        data = BratsData(layout="folder", modalities=list(trained), mask="label")
        config = UNetConfig.of(data, model=SimpleNamespace(arguments={}), precision="float32")
        return _scan_kwargs(Arguments(**given), config)

    found = ask("t2f", "t1c", layout="brats2021")
    assert found == {"layout": "brats2021", "modalities": ["flair", "t1ce"], "mask": None, "scheme": "binary"}
    assert ask("t2f", "t1c", layout="brats2023", modalities="t1c,t2f")["modalities"] == ["flair", "t1ce"]
    assert ask("flair", "CE", modalities="CE,flair")["modalities"] == ["flair", "CE"]
    assert ask("flair", "CE") == {
        "layout": "folder",
        "modalities": ["flair", "CE"],
        "mask": "label",
        "scheme": "binary",
    }
    assert ask("t1c", "t1ce", modalities="t1ce,t1c")["modalities"] == ["t1c", "t1ce"]  # literal names have priority
    with pytest.raises(ConfigError, match=r"trained on flair, CE, and layout=brats2021 has no CE; give layout=folder"):
        ask("flair", "CE", layout="brats2021")
    with pytest.raises(ConfigError, match=r"modalities are t1n, t1, and the run was trained on t1ce, t1; give these,"):
        ask("t1ce", "t1", layout="folder", modalities="t1n,t1")


def test_any_error_of_one_case_does_not_stop_the_others(trained, tmp_path, monkeypatch, capfd):
    from memsave import predict as module

    original, calls = module.segment, []

    def segment(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("something else")
        return original(*arguments, **options)

    monkeypatch.setattr(module, "segment", segment)
    assert predict(trained, tmp_path) == 1
    assert "failed: ZeroDivisionError: something else" in capfd.readouterr().err
    assert len(list(tmp_path.iterdir())) == 3


def test_flips_average_the_probabilities_over_reflections():
    from memsave.predict import Options, _averaged

    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    same = _averaged(None, image, window=(3, 4, 5), options=Options(None, flips=True), predict=lambda m, x, **_: x)
    torch.testing.assert_close(same, image, rtol=1e-4, atol=1e-5)  # the function commutes with reflections

    def first_half(model, x, **_):
        return torch.where(torch.arange(x.shape[1])[:, None, None] < 2, 2.0, -2.0).expand_as(x)

    mixed = _averaged(None, image, window=(3, 4, 5), options=Options(None, flips=True), predict=first_half)
    expected = torch.sigmoid(torch.tensor([2.0, 2.0, -2.0])) / 2
    expected = torch.logit(expected + expected.flip(0))
    torch.testing.assert_close(mixed[0, :, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_case_over_the_budget_is_reported(trained, one_case, tmp_path, capfd):
    assert predict(trained, tmp_path / "out", "budget=1MiB", source=one_case) == 1
    assert "more than the budget of 1.00 MiB; give a smaller window" in capfd.readouterr().err


def test_a_case_that_lacks_a_file_does_not_stop_the_others(trained, tmp_path, capfd):
    source = tmp_path / "new"
    shutil.copytree(trained[1], source)
    lacking = sorted(path for path in source.iterdir() if path.is_dir())[0]
    next(lacking.glob("*_t2.nii.gz")).unlink()
    assert predict(trained, tmp_path / "out", source=source) == 1
    err = capfd.readouterr().err
    assert f"failed: Case {lacking} misses {lacking.name}_t2.nii.gz" in err and "segmented 3 of 4 cases" in err
    assert len(list((tmp_path / "out").iterdir())) == 3
    shutil.copytree(sorted(source.iterdir())[1], source / "more" / sorted(source.iterdir())[1].name)
    assert predict(trained, tmp_path / "out2", source=source) == 2  # equal ids would be written to one file


def test_an_output_that_cannot_be_written_to_is_reported(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert predict(trained, tmp_path / "file" / "out") == 2
    assert "file/out cannot be written to (Not a directory); give another folder" in capsys.readouterr().err


def test_a_failed_write_leaves_no_file(trained, tmp_path, monkeypatch, capfd):
    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    assert predict(trained, tmp_path) == 1
    told = "failed: its file cannot be written (No space left on device); free space or give another output="
    assert told in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_both_affines_of_the_header_are_kept(tmp_path):
    """Programs differ in which affine they read."""
    turned = np.diag([0.8, 0.9, 6.5, 1.0]) @ np.array([[0, -1, 0, 3], [1, 0, 0, -7], [0, 0, 1, 2], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), dtype=np.float32), turned)
    image.set_qform(turned, code=1)
    image.set_sform(turned, code=3)
    image.header.set_slope_inter(2.0, 5.0)
    image.header["cal_max"] = 900
    nibabel.save(image, tmp_path / "A_t1ce.nii.gz")
    mask = torch.zeros(1, 4, 5, 6, dtype=torch.bool)
    mask[0, 1, 2, 3] = True
    reference = read_header(tmp_path / "A_t1ce.nii.gz")
    write_labels(tmp_path / "A.nii.gz", labels_of(mask, SCHEMES["binary"]).numpy(), reference=reference)
    written, read = nibabel.load(tmp_path / "A.nii.gz"), nibabel.load(tmp_path / "A_t1ce.nii.gz")
    assert written.get_data_dtype() == np.uint8 and written.header["cal_max"] == 0
    np.testing.assert_array_equal(written.get_fdata(), mask[0].numpy())
    for affine in ("get_sform", "get_qform"):
        (matrix, code), (own, own_code) = (getattr(each, affine)(coded=True) for each in (written, read))
        np.testing.assert_array_equal(matrix, own)
        assert code == own_code
    np.testing.assert_allclose(written.header.get_zooms(), read.header.get_zooms())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["device=gpu"], "device is 'gpu'; give auto, cpu, cuda"),
        (["checkpoint=/no/such/run"], "/no/such/run holds no trained model; give a run's folder"),
        (["input=/no/such/folder"], "/no/such/folder does not exist"),
        (["windo=3"], "did you mean window?"),
        (["window=[3,4]"], "give three numbers of voxels"),
        (["flips=perhaps"], "give flips=true or flips=false"),
        (["overlap=2"], "from 0 to below 1"),
        (["budget=much"], "budget: 'much' is no size"),
        (
            ["modalities=[t1,t2]"],
            "the input's modalities are t1, t2, and the run was trained on t1, t1ce, t2, flair; give these, in any "
            "order, as in modalities=[t1,t1ce,t2,flair]",
        ),
        (["modalities=[t1,t1,t2,flair]"], "the input's modalities are t1, t1, t2, flair, and the run was trained on"),
        (["modalities=[t1,t1ce,t2,adc]"], "the input's modalities are t1, t1ce, t2, adc, and the run was trained on"),
        (["modalities=7"], "the input's modalities are 7, and the run was trained on"),
        (["layout=folder", "modalities=[a,b,c,d]"], "the input's modalities are a, b, c, d, and the run was trained"),
        (["layout=[1]"], "layout is '[1]': choose one of"),
        (["nonsense"], "have the form key=value"),
        (["input="], "'input=' cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(trained, tmp_path, capsys, arguments, words):
    assert predict(trained, tmp_path / "out", *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_help_prints_the_usage(capsys):
    assert main(["--help"]) == 0
    assert "python -m memsave.predict" in capsys.readouterr().out


def changed_copy(trained, folder, *, scale=1.0, **fields):
    """A copy of the released model with scaled weights and other fields of its config."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained[0] / "model", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * scale for name, value in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_an_ensemble_is_the_mean_probability(trained, one_case, tmp_path):
    other = changed_copy(trained, tmp_path / "other, scaled", scale=1.1)
    both = load_networks([str(trained[0]), str(other)])
    x = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [load_networks([str(folder)])(x).sigmoid() for folder in (trained[0], other)]
        torch.testing.assert_close(both(x).sigmoid(), (each[0] + each[1]) / 2, rtol=0, atol=1e-5)
    assert (each[0] - each[1]).abs().max() > 1e-3
    for name, given in {"once": trained[0], "twice": f"[{trained[0]},{trained[0]}]"}.items():
        arguments = [f"checkpoint={given}", f"input={one_case}", f"output={tmp_path / name}"]
        assert main(arguments) == 0
    once, twice = (np.asarray(nibabel.load(tmp_path / name / "A.nii.gz").dataobj) for name in ("once", "twice"))
    assert np.array_equal(once, twice)
    assert main([f"checkpoint={other}", f"input={one_case}", f"output={tmp_path / 'comma'}"]) == 0


def test_networks_with_other_inputs_are_no_ensemble(trained, one_case, tmp_path, capfd):
    other = changed_copy(trained, tmp_path / "other", spacing=[2.0, 2.0, 2.0])
    arguments = [f"checkpoint=[{trained[0]},{other}]", f"input={one_case}", f"output={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert "has spacing None" in (said := capfd.readouterr().err) and "give runs that were trained alike" in said
    assert main(["checkpoint=[]", *arguments[1:]]) == 2 and "names no run" in capfd.readouterr().err
