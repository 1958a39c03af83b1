import gzip
import re
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from memsave.data.volumes import check
from memsave.data.volumes.check import check_cases, examine, main
from memsave.data.volumes.layouts import MODALITIES, find_cases
from memsave.data.volumes.schemes import SCHEMES
from tests.support.commands import run_command

SHAPE = (6, 5, 4)


def save(path, volume, affine=None):
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)


def shuffled(id, *values):
    """A label volume that differs between cases."""
    return np.random.default_rng(ord(id)).permuted(np.resize(np.uint8(values), SHAPE))


@pytest.fixture
def root(tmp_path):
    """Eight valid cases A to H with different images and labels."""
    for number, id in enumerate("ABCDEFGH"):
        rng = np.random.default_rng(number)
        (tmp_path / id).mkdir()
        for part in MODALITIES:
            save(tmp_path / id / f"{id}_{part}.nii.gz", rng.uniform(1, 9, SHAPE).astype(np.float32))
        save(tmp_path / id / f"{id}_seg.nii.gz", shuffled(id, 0, 1, 2, 4))
    return tmp_path


def test_a_correct_data_set_has_no_faults(root, phantoms):
    assert check_cases(find_cases(root)) == []
    assert check_cases(find_cases(root), images=False) == []
    assert check_cases(phantoms, workers=3) == []


def damage_all(root):
    """Add one fault to each case from A on; returns the expected words of each message."""
    (root / "A" / "A_t2.nii.gz").unlink()
    yield "Case .*/A misses A_t2.nii.gz"
    save(root / "B" / "B_t1ce.nii.gz", np.ones((6, 5, 3), dtype=np.float32))
    yield r"B_t1ce.nii.gz has shape \(6, 5, 3\) but B_t1.nii.gz has \(6, 5, 4\)"
    save(root / "C" / "C_flair.nii.gz", np.ones(SHAPE, dtype=np.float32), np.diag([1, 1, 1.5, 1]))
    yield "C_flair.nii.gz has an affine that moves voxels by up to 1.5 mm against that of C_t1.nii.gz"
    save(root / "D" / "D_seg.nii.gz", np.full(SHAPE, 3, dtype=np.uint8))
    yield "D_seg.nii.gz holds the labels 3, and scheme brats2021 has 0, 1, 2, 4: .* brats2023"
    path = root / "E" / "E_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    yield "E_t1.nii.gz is not a readable NIfTI file"
    volume = np.ones(SHAPE, dtype=np.float32)
    volume[1, 2, 3] = np.nan
    save(root / "F" / "F_t2.nii.gz", volume)
    yield "F_t2.nii.gz holds NaN"
    save(root / "G" / "G_t1.nii.gz", np.zeros(SHAPE, dtype=np.float32))
    yield "G_t1.nii.gz is zero everywhere"
    (root / "H" / "H_seg.nii.gz").write_text("no image")
    yield "H_seg.nii.gz is not a readable NIfTI file"


def test_every_fault_of_every_case_is_reported(root, capsys):
    expected = list(damage_all(root))
    (root / "A" / "A_t1.nii.gz").write_text("damaged, too")
    assert main([f"root={root}", "workers=3"]) == 2
    captured = capsys.readouterr()
    assert "read 8 of 8 cases" in captured.err and "read" not in captured.out.replace("readable", "")
    lines = captured.out.splitlines()
    faults = lines[: next(number for number, line in enumerate(lines) if line.startswith("cases "))]
    # A is incomplete, D and H have no usable label
    assert lines[len(faults)] == "cases     7, of which 5 with a label of scheme brats2021"
    assert lines[-1] == f"{len(faults)} faults" and len(faults) == len(expected) + 1
    found = [[line for line in faults if re.search(words, line)] for words in expected]
    assert all(len(each) == 1 for each in found)
    assert sum("A_t1.nii.gz is not a readable NIfTI file" in line for line in faults) == 1
    assert all(line.endswith(".") for line in faults)


def test_a_region_that_is_empty_everywhere_is_reported(root):
    for id in "ABCDEFGH":
        save(root / id / f"{id}_seg.nii.gz", shuffled(id, 0, 1))
    cases = find_cases(root)
    (fault,) = check_cases(cases)
    assert fault == (
        "Region et of scheme brats2021 is empty in every labelled case (8, with the labels 0, 1): "
        "give another scheme, perhaps binary."
    )
    assert check_cases(cases, scheme=SCHEMES["binary"]) == []
    # a region in one of eight cases is enough, and unlabelled cases do not count
    save(root / "H" / "H_seg.nii.gz", np.full(SHAPE, 4, dtype=np.uint8))
    assert check_cases(cases) == []
    assert check_cases([replace(case, label=None) for case in cases]) == []


def test_a_resection_cavity_suggests_its_scheme(root):
    for id in "ABCDEFGH":
        save(root / id / f"{id}_seg.nii.gz", shuffled(id, 0, 1, 2, 3))
    assert check_cases(find_cases(root, scheme="brats2024")) == []
    (fault,) = check_cases(find_cases(root, scheme="brats2024_rc"))
    assert fault.startswith(
        "Region rc of scheme brats2024_rc is empty in every labelled case (8, with the labels 0, 1,"
    )
    assert "perhaps brats2023 or brats2024 or msd" in fault


def test_a_repeated_id_is_reported(root):
    shutil.copytree(root / "A", root / "more" / "A")
    save(root / "more" / "A" / "A_t1.nii.gz", np.ones(SHAPE, dtype=np.float32))
    assert main([f"root={root}"]) == 2
    cases = find_cases(root / "more") + find_cases(root / "A")
    (fault,) = check_cases(cases)
    assert "Case A occurs twice, in " in fault and fault.endswith(": remove or rename one of the two.")


@pytest.mark.parametrize("recompressed", [False, True])
def test_equal_images_of_two_cases_are_reported(root, recompressed):
    for one, other in (("A_t1", "C_t1"), ("A_t2", "C_t2"), ("B_t1", "D_flair")):
        source, target = (root / name[0] / f"{name}.nii.gz" for name in (one, other))
        shutil.copy(source, target)
        if recompressed:
            image = nibabel.load(source)
            save(target, image.get_fdata(dtype=np.float32), image.affine)
    faults = check_cases(find_cases(root))
    assert len(faults) == 2
    assert faults[0].startswith("Cases A and C hold the same voxels (t1, t2): keep one of them")
    assert faults[1].startswith("Cases B and D hold the same voxels (t1, flair)")


def test_without_images_only_headers_and_labels_are_read(root):
    expected = list(damage_all(root))
    faults = check_cases(find_cases(root, labelled=False, modalities=["t1", "t1ce", "flair"]), images=False)
    named = {fault.split("/")[-1].split(".nii")[0] for fault in faults}
    assert named == {"B_t1ce", "C_flair", "D_seg", "E_t1", "H_seg"} and len(expected) == 8


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_without_images_a_truncated_file_is_found_by_its_length(root, suffix):
    path = root / "B" / "B_t1ce.nii.gz"
    image = nibabel.load(path).get_fdata(dtype=np.float32)
    path.unlink()
    path = path.with_name(f"B_t1ce{suffix}")
    save(path, image)
    assert check_cases(find_cases(root), images=False) == []
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    (fault,) = check_cases(find_cases(root), images=False)
    assert f"B_t1ce{suffix} is not a readable NIfTI file" in fault
    more = gzip.compress(gzip.decompress(whole) + bytes(16)) if suffix == ".nii.gz" else whole + bytes(16)
    path.write_bytes(more)  # longer than necessary, but complete
    assert check_cases(find_cases(root), images=False) == []


def test_without_images_a_copy_is_found_by_its_label(root):
    shutil.copy(root / "A" / "A_seg.nii.gz", root / "C" / "C_seg.nii.gz")
    (fault,) = check_cases(find_cases(root), images=False)
    assert fault.startswith("Cases A and C hold the same voxels (segmentation): keep one of them")


def test_empty_labels_are_not_duplicates(root):
    for id in "AC":
        save(root / id / f"{id}_seg.nii.gz", np.zeros(SHAPE, dtype=np.uint8))
    assert check_cases(find_cases(root)) == []


def test_damage_in_the_middle_of_an_image_is_found(root):
    path = root / "A" / "A_t1.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    assert check_cases(find_cases(root), images=False) == []
    (fault,) = check_cases(find_cases(root))
    assert "A_t1.nii.gz is not a readable NIfTI file" in fault


def test_mixed_schemes_are_reported(root):
    cases = find_cases(root)
    cases[0] = replace(cases[0], scheme=SCHEMES["brats2024"])
    (fault,) = check_cases(cases)
    assert fault == "The cases follow the schemes brats2021, brats2024: check the cases of each scheme separately."


def test_the_table_lists_shapes_spacings_and_region_sizes(root):
    for id in "CDEFGH":
        save(root / id / f"{id}_seg.nii.gz", np.resize(np.uint8([0, 1, 2, 4]), SHAPE))
    save(root / "A" / "A_seg.nii.gz", np.zeros(SHAPE, dtype=np.uint8))
    save(root / "B" / "B_seg.nii.gz", np.full(SHAPE, 2, dtype=np.uint8))
    for part in (*MODALITIES, "seg"):
        path = root / "C" / f"C_{part}.nii.gz"
        save(path, nibabel.load(path).get_fdata(dtype=np.float32)[:, :, :2], np.diag([1, 1, 6.5, 1]))
    lines = examine(find_cases(root)).table().splitlines()
    assert lines[0] == "cases     8, of which 8 with a label of scheme brats2021"
    assert lines[1:5] == [
        "voxels    6 x 5 x 4 (7)",
        "voxels    6 x 5 x 2 (1)",
        "size, mm  1 x 1 x 1 (7)",
        "size, mm  1 x 1 x 6.5 (1)",
    ]
    rows = {line.split()[0]: [int(number) for number in line.split()[1:]] for line in lines[6:]}
    quarter = np.prod(SHAPE) // 4  # the z index of a voxel decides its label: 0, 1, 2, 4
    assert rows["wt"] == [7, quarter, 3 * quarter, 4 * quarter]
    assert rows["tc"] == [6, quarter, 2 * quarter, 2 * quarter]
    assert rows["et"] == [5, quarter, quarter, quarter]


def test_progress_is_called_after_each_case(root):
    heard = []
    examine(find_cases(root), progress=lambda read, total: heard.append((read, total)), workers=2)
    assert heard == [(number, 8) for number in range(1, 9)]


def test_the_command_checks_a_data_set(root, tmp_path):
    done = run_command(tmp_path, f"root={root}", module="memsave.data.check")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 faults"
    assert "read 8 of 8 cases" in done.stderr


def test_the_command_reads_a_folder_of_masks(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for id in "AB":
        for part in ("image", "pet"):
            save(tmp_path / f"{id}_{part}.nii.gz", rng.uniform(1, 9, SHAPE).astype(np.float32))
        save(tmp_path / f"{id}_roi.nii.gz", shuffled(id, 0, 255))
    arguments = [f"root={tmp_path}", "layout=folder", "modalities=[pet, image]"]
    assert main([*arguments, "mask=roi"]) == 0
    assert "lesion         2        60        60        60" in capsys.readouterr().out
    assert main([*arguments, "mask=roi", "scheme=brats2021"]) == 2
    assert "A_roi.nii.gz holds the labels 0, 255" in capsys.readouterr().out
    for id in "AB":
        (tmp_path / f"{id}_roi.nii.gz").unlink()
    assert main(arguments) == 2
    assert main([*arguments, "labelled=false"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "root is not given: name a folder"),
        (["root=/nowhere"], "The data folder /nowhere does not exist"),
        (["root"], "'root' cannot be read: arguments have the form key=value"),
        (["root="], "'root=' cannot be read"),
        (["root=.", "rot=."], "rot is not known: the keys are root, layout"),
        (["root=.", "root=."], "root is given twice"),
        (["root=.", "layout=brats"], "layout is 'brats': choose one of"),
        (["root=.", "scheme=x"], "scheme is 'x': choose one of"),
        (["root=.", "workers=0"], "workers is '0': give a number from 1 on"),
        (["root=.", "labelled=maybe"], "labelled is 'maybe': give true or false"),
        (["root=.", "modalities=[pet]"], "layout=brats2021 has no modality 'pet'"),
    ],
)
def test_bad_arguments_are_reported(arguments, sentence, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"memsave: {sentence}") and captured.err.count("\n") == 1 and captured.out == ""


def test_help_prints_the_module_docstring(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == check.__doc__.strip()
    assert all(f"    {key} " in check.__doc__ for key in vars(check.Arguments()))
