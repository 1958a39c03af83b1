"""Supported files: compressed or not, with any name, and with any real voxel type."""

import gzip
import struct
import warnings
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from memsave.data import DataError
from memsave.data.volumes.check import check_cases
from memsave.data.volumes.layouts import find_cases
from memsave.data.volumes.reader import inspect_case, read_case, read_label
from memsave.data.volumes.schemes import SCHEMES

SHAPE = (6, 5, 4)
LABELS = np.resize(np.uint8([0, 1, 2, 4]), SHAPE)


def save(path, voxels, *, kind=nibabel.Nifti1Image, **options):
    nibabel.save(kind(voxels, np.eye(4), **options), path)


def without_gzip(path):
    path.write_bytes(gzip.decompress(path.read_bytes()))
    return path


def without_its_suffix(path):
    return path.rename(path.with_name(path.name.removesuffix(".gz")))


def as_nifti2(path):
    image = nibabel.load(path)
    save(path, np.asarray(image.dataobj), kind=nibabel.Nifti2Image)
    return path


def in_pieces(path):
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:] + bytes(100)))
    return path


@pytest.mark.parametrize("change", [without_gzip, without_its_suffix, as_nifti2, in_pieces])
@pytest.mark.parametrize("part", ["t2", "seg"])
def test_training_check_and_prediction_read_the_same_files(tmp_path, write_case, capfd, change, part):
    case = write_case("A")
    before = read_case(case)
    change(tmp_path / "A" / f"A_{part}.nii.gz")
    (case,) = find_cases(tmp_path)
    after = read_case(case)
    np.testing.assert_array_equal(after.image, before.image)
    np.testing.assert_array_equal(after.label, before.label)
    np.testing.assert_array_equal(read_label(case), before.label)
    assert check_cases([case]) == check_cases([case], images=False) == []
    assert capfd.readouterr().err == ""  # no warning of nibabel


@pytest.mark.parametrize("offset", [np.inf, 1e30])
@pytest.mark.parametrize("part", ["t2", "seg"])
def test_voxels_behind_every_file_are_reported(tmp_path, write_case, part, offset):
    case, path = write_case("A"), tmp_path / "A" / f"A_{part}.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", content, 108, offset)  # vox_offset
    path.write_bytes(gzip.compress(bytes(content)))
    for images in (True, False):
        (fault,) = check_cases([case], images=images)
        assert f"A_{part}.nii.gz is not a readable NIfTI file (" in fault


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(("dtype", "name"), [(np.complex64, "complex64"), (np.complex128, "complex128"), (RGB, "RGB")])
@pytest.mark.parametrize("part", ["t1ce", "seg"])
def test_types_that_float32_cannot_hold_are_reported(tmp_path, write_case, dtype, name, part):
    case = write_case()
    path = tmp_path / "A" / f"A_{part}.nii.gz"
    save(path, np.ones(SHAPE, dtype=dtype))
    for images in (True, False):
        (fault,) = inspect_case(case, images=images).faults
        assert fault == (
            f"{path} holds voxels of type {name}, and float32 cannot hold them: export it with one real number per "
            f"voxel, as float32 or int16."
        )


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint16, np.int64, np.uint64])
def test_float64_images_are_rounded_to_float32(tmp_path, write_case, dtype):
    case = write_case()
    voxels = np.arange(120).reshape(SHAPE).astype(dtype) * 500 + 7
    save(case.images[2], voxels, dtype=dtype)
    np.testing.assert_array_equal(read_case(case).image[2], voxels.astype(np.float32))
    assert check_cases([case]) == []


@pytest.mark.parametrize(("value", "told"), [(1e300, r"1e\+300"), (-1e39, r"1e\+39"), (3e20, r"3e\+20")])
def test_intensities_beyond_float32_are_reported(write_case, value, told):
    case = write_case()
    voxels = np.ones(SHAPE)
    voxels[1, 2, 3] = value
    save(case.images[1], voxels)
    words = rf"A_t1ce\.nii\.gz holds voxels of up to {told} as float64, and more than 1e\+15 cannot be normalised"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=words):
            read_case(case)


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64])
def test_labels_that_float32_cannot_distinguish_stay_distinct(tmp_path, write_case, dtype):
    """2^24 and 2^24 + 1 are equal in float32."""
    case = replace(write_case(), scheme=SCHEMES["binary"])
    voxels = np.resize(np.array([0, 2**24, 2**24 + 1], dtype=dtype), SHAPE)
    save(case.label, voxels, dtype=dtype)
    with pytest.raises(DataError, match=r"holds the labels 0, 16777216(\.0)?, 16777217(\.0)?, and scheme binary has"):
        read_label(case)
    save(case.label, np.where(voxels == 2**24, 0, voxels).astype(dtype), dtype=dtype)
    np.testing.assert_array_equal(read_label(case), voxels == 2**24 + 1)


@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.int32])
def test_labels_rounded_by_a_slope_are_read(write_case, stored):
    case = write_case()
    header = nibabel.Nifti1Header()
    header.set_data_dtype(stored)
    for _ in range(3):  # repeatedly read and saved
        image = nibabel.Nifti1Image(LABELS.astype(np.float64), np.eye(4), header)
        nibabel.save(image, case.label)
    if stored is not np.int32:  # its steps are too small to matter
        assert not np.array_equal(nibabel.load(case.label).get_fdata(), LABELS)
    np.testing.assert_array_equal(read_label(case), LABELS)
    assert check_cases([case], images=False) == []


@pytest.mark.parametrize("value", [np.nextafter(np.float32(2), np.float32(0)), 1.9999, 2.0015])
def test_labels_rounded_by_float_arithmetic_are_read(write_case, value):
    case = write_case()
    save(case.label, np.where(LABELS == 2, value, LABELS).astype(np.float32))
    np.testing.assert_array_equal(read_label(case), LABELS)


@pytest.mark.parametrize("value", [1 / 255, 1 / 65535, 0.5, 0.98, 1.02])
def test_values_far_from_an_integer_are_not_labels(write_case, value):
    """A mask divided by its largest value must not be read as empty."""
    case = write_case()
    save(case.label, np.where(LABELS > 0, value, 0).astype(np.float32))
    with pytest.raises(DataError, match=rf"holds the labels 0, {np.float32(value):g}, and scheme brats2021"):
        read_label(case)


def test_a_whole_step_of_a_slope_is_not_rounding(write_case):
    """A mask of bytes 0 and 1 whose header divides by 255."""
    case = write_case()
    image = nibabel.Nifti1Image((LABELS > 0).astype(np.uint8), np.eye(4))
    image.header.set_slope_inter(1 / 255, 0)
    nibabel.save(image, case.label)
    with pytest.raises(DataError, match=r"holds the labels 0, 0\.00392157, and scheme brats2021"):
        read_label(case)


def test_messages_do_not_round_a_wrong_label_to_an_integer(write_case):
    """With six digits the value would look like an integer."""
    case = write_case()
    save(case.label, np.where(LABELS == 4, 1000000.125, LABELS).astype(np.float64))
    with pytest.raises(DataError, match=r"holds the labels 0, 1, 2, 1000000\.125, and scheme brats2021"):
        read_label(case)


@pytest.mark.parametrize("part", ["t2", "seg"])
@pytest.mark.parametrize(
    ("row", "column", "change", "fault"),
    [
        (0, 3, 0.002, None),
        (2, 3, -0.09, None),
        (1, 3, 0.11, "0.11 mm against that of A_t1.nii.gz, which is 0.11 times their width and may be 0.1"),
        (0, 0, 0.01, None),  # 0.05 mm at the far corner
        (0, 0, 0.03, "0.15 mm against that of A_t1.nii.gz"),
        (0, 1, 0.03, "0.12 mm against that of A_t1.nii.gz"),
    ],
)
def test_affines_are_compared_by_the_displacement_of_voxels(write_case, part, row, column, change, fault):
    affine = np.eye(4)
    affine[row, column] += change
    found = inspect_case(write_case(affines={part: affine})).faults
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1 and f"has an affine that moves voxels by up to {fault}" in found[0]


def test_displacement_is_relative_to_the_voxel_size(write_case):
    thick, moved = np.diag([1, 1, 6.5, 1.0]), np.diag([1, 1, 6.5, 1.0])
    moved[2, 3] = 0.5  # mm, of 6.5
    affines = dict.fromkeys(("t1", "t1ce", "t2", "flair"), thick) | {"seg": moved}
    assert inspect_case(write_case(affines=affines)).faults == []
