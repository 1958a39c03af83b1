import nibabel
import numpy as np
import pytest
import torch

from memsave.data import DataError
from memsave.data.brats import BRATS_2021, MODALITIES, LabelScheme, find_cases, read_case, regions, split_cases


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


def test_a_root_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        find_cases(tmp_path / "nowhere")


def test_an_empty_root_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"No NIfTI file lies below {tmp_path}"):
        find_cases(tmp_path)


def test_a_missing_modality_is_named(tmp_path, write_case):
    write_case("A")
    write_case("B")
    (tmp_path / "B" / "B_t1ce.nii.gz").unlink()
    with pytest.raises(DataError, match=r"misses B_t1ce\.nii\.gz:"):
        find_cases(tmp_path)


def test_a_missing_segmentation_is_an_error_only_where_it_is_needed(tmp_path, write_case):
    case = write_case(seg=None)
    assert case.label is None and read_case(case).label is None
    with pytest.raises(DataError, match=r"misses A_seg\.nii\.gz"):
        find_cases(tmp_path)


def test_a_case_that_occurs_twice_is_named(tmp_path, write_case):
    write_case("A", root=tmp_path / "HGG")
    write_case("A", root=tmp_path / "LGG")
    with pytest.raises(DataError, match="Case A occurs twice"):
        find_cases(tmp_path)


def test_a_foreign_label_is_named_with_the_expected_ones(write_case):
    case = write_case(seg=np.full((6, 5, 4), 3, dtype=np.uint8))
    with pytest.raises(DataError, match=r"A_seg\.nii\.gz holds the labels 3, .*\(0, 1, 2, 4\)"):
        read_case(case)
    read_case(case, scheme=LabelScheme("other", necrosis=1, edema=2, enhancing=3))


def test_a_fractional_label_is_not_rounded(write_case):
    with pytest.raises(DataError, match=r"labels 1\.5,"):
        read_case(write_case(seg=np.full((6, 5, 4), 1.5, dtype=np.float32)))


@pytest.mark.parametrize("part", ["flair", "seg"])
def test_another_shape_is_named(write_case, part):
    with pytest.raises(DataError, match=rf"A_{part}\.nii\.gz has shape \(6, 5, 3\) but A_t1\.nii\.gz has \(6, 5, 4\)"):
        read_case(write_case(**{part: np.ones((6, 5, 3), dtype=np.uint8)}))


@pytest.mark.parametrize("part", ["t2", "seg"])
def test_another_affine_is_named(write_case, part):
    shifted = np.eye(4)
    shifted[0, 3] = 2.5
    with pytest.raises(DataError, match=rf"A_{part}\.nii\.gz has an affine that differs .* 2\.5 mm"):
        read_case(write_case(affines={part: shifted}))


def test_a_4d_file_is_named(write_case):
    with pytest.raises(DataError, match=r"A_t1\.nii\.gz has shape \(6, 5, 4, 2\)"):
        read_case(write_case(t1=np.ones((6, 5, 4, 2), dtype=np.float32)))


@pytest.mark.parametrize(("value", "fault"), [(0.0, "is zero everywhere"), (np.nan, "holds NaN")])
def test_an_unusable_image_is_named(write_case, value, fault):
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
def test_a_damaged_file_is_named(write_case, damage):
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


def test_regions_follow_the_scheme():
    scheme = LabelScheme("other", necrosis=1, edema=2, enhancing=3)
    enhancing = regions(torch.full((1, 1, 1), 3), scheme=scheme)
    assert enhancing.flatten().tolist() == [True, True, True]
    assert BRATS_2021.values == (0, 1, 2, 4) and list(scheme.regions) == ["wt", "tc", "et"]


def test_a_split_is_disjoint_complete_and_repeatable(phantoms):
    train, validation = split_cases(phantoms, validation_fraction=0.25, seed=3)
    assert (len(train), len(validation)) == (3, 1)
    assert sorted(train + validation, key=lambda case: case.id) == phantoms
    assert split_cases(phantoms[::-1], validation_fraction=0.25, seed=3) == (train, validation)
    others = {split_cases(phantoms, validation_fraction=0.25, seed=seed)[1][0].id for seed in range(20)}
    assert len(others) == 4


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_no_side_of_a_split_is_empty(phantoms, fraction):
    assert all(split_cases(phantoms[:2], validation_fraction=fraction, seed=0))


def test_bad_splits_are_named(phantoms):
    with pytest.raises(DataError, match="got 1"):
        split_cases(phantoms[:1], seed=0)
    with pytest.raises(DataError, match=r"validation_fraction is 1\.5"):
        split_cases(phantoms, validation_fraction=1.5, seed=0)
