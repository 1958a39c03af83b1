import gzip
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from memsave.data import DataError
from memsave.data.volumes.layouts import MODALITIES, find_cases
from memsave.data.volumes.reader import inspect_case, labels_of, read_case, read_label, regions
from memsave.data.volumes.schemes import SCHEMES, LabelScheme


def test_cases_are_found_sorted_at_any_depth_and_with_either_suffix(tmp_path, write_case):
    for name, root, suffix in (("C", "HGG", ".nii.gz"), ("A", "LGG", ".nii"), ("B", "HGG", ".nii.gz")):
        write_case(name, root=tmp_path / root, suffix=suffix)
    cases = find_cases(tmp_path)
    assert [case.id for case in cases] == ["A", "B", "C"]
    assert [path.name for path in cases[0].images] == [f"A_{part}.nii" for part in MODALITIES]
    assert cases[1].label == tmp_path / "HGG" / "B" / "B_seg.nii.gz"


def test_a_case_behind_a_symbolic_link_is_found(tmp_path, write_case):
    write_case("A", root=tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "A").symlink_to(tmp_path / "elsewhere" / "A")
    assert [case.id for case in find_cases(tmp_path / "root")] == ["A"]


def test_a_case_is_read_as_it_was_written(tmp_path, write_case):
    t2 = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    seg = np.zeros((6, 5, 4), dtype=np.uint8)
    seg[1, 2, 3] = 4
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    scan = read_case(write_case(t2=t2, seg=seg, affines=dict.fromkeys((*MODALITIES, "seg"), affine)))
    assert scan.image.dtype == np.float32 and scan.image.shape == (4, 6, 5, 4)
    assert scan.label.dtype == np.uint8
    np.testing.assert_array_equal(scan.image[2], t2)
    np.testing.assert_array_equal(scan.label, seg)
    np.testing.assert_array_equal(scan.affine, affine)


def test_a_root_that_does_not_exist_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        find_cases(tmp_path / "nowhere")


def test_an_empty_root_is_reported(tmp_path):
    with pytest.raises(DataError, match=rf"No NIfTI file of layout brats2021 lies below {tmp_path}: expected folders"):
        find_cases(tmp_path)


def test_a_missing_modality_is_reported(tmp_path, write_case):
    write_case("A")
    write_case("B")
    (tmp_path / "B" / "B_t1ce.nii.gz").unlink()
    with pytest.raises(DataError, match=r"misses B_t1ce\.nii\.gz:"):
        find_cases(tmp_path)


def test_a_missing_segmentation_is_an_error_only_for_labelled_data(tmp_path, write_case):
    case = write_case(seg=None)
    assert case.label is None and read_case(case).label is None
    with pytest.raises(DataError, match=r"misses A_seg\.nii\.gz"):
        find_cases(tmp_path)


def test_a_case_that_occurs_twice_is_reported(tmp_path, write_case):
    write_case("A", root=tmp_path / "HGG")
    write_case("A", root=tmp_path / "LGG")
    with pytest.raises(DataError, match="Case A occurs twice"):
        find_cases(tmp_path)


def test_a_label_outside_the_scheme_is_reported_with_the_schemes_that_fit(write_case):
    seg = np.zeros((6, 5, 4), dtype=np.uint8)
    seg[:3] = 1
    seg[0] = 3
    case = write_case(seg=seg)
    with pytest.raises(DataError) as caught:
        read_case(case)
    assert str(caught.value).endswith(
        "/A_seg.nii.gz holds the labels 0, 1, 3, and scheme brats2021 has 0, 1, 2, 4: give the scheme that they "
        "follow, perhaps brats2023 or brats2024 or brats2024_rc or msd."
    )
    assert read_case(case, scheme=SCHEMES["msd"]).label.max() == 3
    assert read_case(replace(case, scheme=SCHEMES["brats2023"])).label.max() == 3


def test_intensities_are_refused_as_labels(write_case):
    case = write_case(seg=np.arange(120, dtype=np.int16).reshape(6, 5, 4))
    with pytest.raises(DataError, match=r"holds the labels 0, 1, 2, 3, 4, 5, 6, 7, \.\.\., .*: map them to that"):
        read_case(case)


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 7), (0, 3000), (0, 1, 255), (0,)])
def test_a_binary_mask_is_read_as_ones(write_case, values):
    seg = np.resize(np.int16(values), (6, 5, 4))
    label = read_case(write_case(seg=seg), scheme=SCHEMES["binary"]).label
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, seg != 0)


def test_two_lesion_labels_are_not_binary(write_case):
    case = write_case(seg=np.resize(np.uint8([0, 1, 2]), (6, 5, 4)))
    with pytest.raises(DataError, match=r"labels 0, 1, 2, and scheme binary has one lesion label: .*perhaps brats2021"):
        read_case(case, scheme=SCHEMES["binary"])


def test_a_label_with_nan_is_reported(write_case):
    with pytest.raises(DataError, match=r"A_seg\.nii\.gz holds the labels 0, nan, and"):
        read_case(write_case(seg=np.resize(np.float32([0, np.nan]), (6, 5, 4))))


def test_read_label_equals_the_label_of_read_case(write_case):
    case = write_case()
    np.testing.assert_array_equal(read_label(case), read_case(case).label)
    with pytest.raises(DataError, match="Case A has no segmentation"):
        read_label(replace(case, label=None))
    with pytest.raises(DataError, match="scheme binary has one lesion label"):
        read_label(case, scheme=SCHEMES["binary"])


def test_a_fractional_label_is_not_rounded(write_case):
    with pytest.raises(DataError, match=r"labels 1\.5, and .*: map them"):
        read_case(write_case(seg=np.full((6, 5, 4), 1.5, dtype=np.float32)))


@pytest.mark.parametrize("part", ["flair", "seg"])
def test_another_shape_is_reported(write_case, part):
    with pytest.raises(DataError, match=rf"A_{part}\.nii\.gz has shape \(6, 5, 3\) but A_t1\.nii\.gz has \(6, 5, 4\)"):
        read_case(write_case(**{part: np.ones((6, 5, 3), dtype=np.uint8)}))


@pytest.mark.parametrize("part", ["t2", "seg"])
def test_another_affine_is_reported(write_case, part):
    shifted = np.eye(4)
    shifted[0, 3] = 2.5
    with pytest.raises(DataError, match=rf"A_{part}\.nii\.gz has an affine that moves voxels by up to 2\.5 mm"):
        read_case(write_case(affines={part: shifted}))


def test_a_4d_file_is_reported(write_case):
    with pytest.raises(DataError, match=r"A_t1\.nii\.gz has shape \(6, 5, 4, 2\)"):
        read_case(write_case(t1=np.ones((6, 5, 4, 2), dtype=np.float32)))


@pytest.mark.parametrize(("value", "fault"), [(0.0, "is zero everywhere"), (np.nan, "holds NaN")])
def test_an_unusable_image_is_reported(write_case, value, fault):
    with pytest.raises(DataError, match=rf"A_t1\.nii\.gz {fault}"):
        read_case(write_case(t1=np.full((6, 5, 4), value, dtype=np.float32)))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def _flip_a_bit_of_the_checksum(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def _shorten_inside_gzip(path):
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 5, 4), dtype=np.float32), np.eye(4)), path.with_suffix(""))
    path.write_bytes(path.with_suffix("").read_bytes()[:-40])


def _write_text(path):
    path.write_text("this is no image")


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit_of_the_checksum, _shorten_inside_gzip, _write_text])
def test_a_damaged_file_is_reported(write_case, damage):
    case = write_case()
    damage(case.images[3])
    with pytest.raises(DataError, match=r"A_flair\.nii\.gz is not a readable NIfTI file .*copy it again\.$"):
        read_case(case)


def test_regions_are_the_unions_of_their_labels():
    label = torch.tensor([0, 1, 2, 4], dtype=torch.uint8).reshape(4, 1, 1)
    expected = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.bool).reshape(3, 4, 1, 1)
    assert regions(label).dtype == torch.bool
    assert torch.equal(regions(label), expected)
    assert torch.equal(regions(label[None]), expected)
    assert torch.equal(regions(label.expand(2, 1, 4, 1, 1)), expected.expand(2, 3, 4, 1, 1))
    with pytest.raises(DataError, match=r"\(2, 4, 1, 1\)"):
        regions(label.expand(2, 4, 1, 1))


@pytest.mark.parametrize("name", SCHEMES)
def test_regions_follow_the_scheme(name):
    scheme = SCHEMES[name]
    label = torch.tensor(scheme.values, dtype=torch.uint8).reshape(-1, 1, 1)
    masks = regions(label, scheme=scheme)
    assert masks.shape == (len(scheme.names), len(scheme.values), 1, 1) and masks.dtype == torch.bool
    for mask, values in zip(masks, scheme.regions.values()):
        assert label[mask].tolist() == sorted(values)


def test_regions_refuse_labels_outside_the_scheme():
    label = torch.tensor([0, 3]).reshape(1, 1, 2)
    with pytest.raises(DataError, match=r"regions\(\) got the labels 0, 3, and scheme brats2021 .* brats2023 or"):
        regions(label)
    with pytest.raises(DataError, match=r"got the labels 0, 3\.9999999999999996, and scheme brats2021 has 0, 1, 2, 4"):
        regions(torch.tensor([0, 4 - 4e-16], dtype=torch.float64).reshape(1, 1, 2))
    assert regions(label, scheme=SCHEMES["msd"]).flatten().tolist() == [False, True] * 3
    assert regions(label, scheme=SCHEMES["binary"]).flatten().tolist() == [False, True]


@pytest.mark.parametrize("name", SCHEMES)
def test_labels_and_regions_are_inverses(name):
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor(scheme.values, dtype=torch.uint8)[
        torch.randint(len(scheme.values), (6, 5, 4), generator=generator)
    ]
    masks = regions(label, scheme=scheme)
    # a label in no region is lost
    covered = {value for values in scheme.regions.values() for value in values}
    expected = torch.where(torch.isin(label, torch.tensor(sorted(covered))), label, 0)
    assert (name == "brats2024") == (not torch.equal(expected, label))
    assert labels_of(masks, scheme).dtype == torch.uint8
    assert torch.equal(labels_of(masks, scheme), expected)
    assert torch.equal(regions(labels_of(masks, scheme), scheme=scheme), masks)
    assert torch.equal(labels_of(masks.expand(2, *masks.shape), scheme), expected.expand(2, 1, 6, 5, 4))


@pytest.mark.parametrize(
    ("masks", "label"),  # of wt, tc, et, rc
    [([0, 0, 1, 0], 3), ([1, 0, 1, 0], 3), ([0, 1, 0, 0], 1), ([1, 0, 0, 1], 4), ([1, 0, 0, 0], 2), ([1, 1, 1, 1], 3)],
)
def test_inner_regions_are_written_over_outer_ones(masks, label):
    masks = torch.tensor(masks, dtype=torch.bool).reshape(4, 1, 1, 1)
    assert labels_of(masks, SCHEMES["brats2024_rc"]).item() == label


def test_masks_that_cannot_be_written_are_reported():
    masks = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    for wrong in (masks.float(), masks[:2], masks[0]):
        with pytest.raises(DataError, match=r"labels_of\(\) got .*: pass boolean masks \(\.\.\., 3, X, Y, Z\) of wt"):
            labels_of(wrong)
    scheme = LabelScheme("whole", labels={1: "necrosis", 2: "edema"}, regions={"wt": (1, 2)})
    with pytest.raises(DataError, match=r"Region wt of scheme whole has the labels \[1, 2\] that no inner region has"):
        labels_of(masks[:1], scheme)


def test_every_fault_of_a_case_is_reported(write_case):
    zero, nan = (np.full((6, 5, 4), value, dtype=np.float32) for value in (0, np.nan))
    nine = np.full((6, 5, 4), 9, dtype=np.uint8)
    case = write_case(t1ce=zero, t2=np.ones((6, 5, 3)), flair=nan, seg=nine)
    _truncate(case.images[0])
    found = inspect_case(case)
    assert not found.volumes and found.label is None and found.shape == (6, 5, 4)
    assert len(found.faults) == 5
    for fault, words in zip(found.faults, ("t1.nii.gz is not", "is zero", "but A_t1ce", "NaN", "labels 9")):
        assert words in fault and fault.endswith(".") and "\n" not in fault
    with pytest.raises(DataError, match=r"A_t1\.nii\.gz is not a readable"):
        read_case(case)


def test_headers_suffice_to_find_another_shape(write_case):
    case = write_case(t2=np.ones((6, 5, 3)), flair=np.zeros((6, 5, 4), dtype=np.float32))
    found = inspect_case(case, images=False)
    assert len(found.faults) == 1 and "A_t2.nii.gz has shape (6, 5, 3)" in found.faults[0]
    assert not found.volumes and found.label.shape == (6, 5, 4)
    case.images[1].write_text("this is no image")
    assert "A_t1ce.nii.gz is not a readable NIfTI file" in inspect_case(case, images=False).faults[0]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_singular_affines_are_reported(write_case, value):
    case = write_case()
    content = bytearray(gzip.decompress(case.images[0].read_bytes()))
    content[296:312] = np.float32([0, value, 0, 0]).tobytes()  # the second row of the affine
    case.images[0].write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(DataError, match=r"A_t1\.nii\.gz has an affine that gives its voxels no size"):
        read_case(case)
