import itertools

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from memsave.data.volumes.dataset import Volumes, restore
from memsave.data.volumes.layouts import find_cases
from memsave.data.volumes.nifti import read_header
from memsave.data.volumes.orientation import Orientation
from memsave.data.volumes.reader import labels_of, regions
from memsave.predict import write_labels

EVERY = [
    "".join(codes)
    for letters in itertools.permutations(("LR", "PA", "SI"))
    for codes in itertools.product(*letters)
]  # fmt: skip
LPS = np.array([[-0.8, 0, 0, 30], [0, -1.0, 0, 40], [0, 0, 2.5, -9], [0, 0, 0, 1.0]])


def stored(volume, codes):
    """An LPS volume stored along other axes."""
    image = nibabel.Nifti1Image(volume, LPS)
    return image.as_reoriented(ornt_transform(io_orientation(LPS), axcodes2ornt(codes)))


@pytest.fixture
def write(tmp_path):
    rng = np.random.default_rng(0)
    image = np.zeros((9, 8, 7), dtype=np.float32)
    image[1:8, 2:7, 1:6] = rng.uniform(1, 9, (7, 5, 5))
    label = np.zeros((9, 8, 7), dtype=np.uint8)
    label[2:5, 4:7, 1:3] = 1

    def cases(codes):
        (tmp_path / codes).mkdir()
        for name, volume in (("t1ce", image), ("seg", label)):
            nibabel.save(stored(volume, codes), tmp_path / codes / f"A_{name}.nii.gz")
        return find_cases(tmp_path / codes, "folder", modalities=["t1ce"])

    return cases


def test_there_are_48_orientations():
    assert len(set(EVERY)) == 48


@pytest.mark.parametrize("spacing", [None, (1.6, 1.0, 1.25)])
def test_volumes_are_equal_for_all_stored_orientations(write, spacing):
    expected = Volumes(write("LPS"), spacing=spacing)[0]
    for codes in EVERY:
        if codes == "LPS":
            continue
        cases = write(codes)
        volumes = Volumes(cases, spacing=spacing)
        item = volumes[0]
        assert torch.equal(item["label"], expected["label"]), codes
        torch.testing.assert_close(item["image"], expected["image"], rtol=1e-5, atol=1e-5)
        assert item["image_spacing"] == pytest.approx(expected["image_spacing"])
        assert item["start"] == expected["start"] and item["cropped"] == expected["cropped"]
        if spacing is None:  # undo returns the stored voxels
            found = restore(regions(item["label"], scheme=volumes.scheme), item)
            assert torch.equal(found, volumes.truth(0).bool()), codes


def test_restored_predictions_match_the_label_on_the_original_grid(write, tmp_path):
    """Compares positions in millimetres by the affine of the written file."""
    places = []
    for codes in ("LPS", "RAS", "SAL"):
        (case,) = write(codes)
        item = Volumes([case])[0]
        labels = labels_of(restore(item["label"].bool(), item), case.scheme).numpy()
        write_labels(tmp_path / f"{codes}.nii.gz", labels, reference=read_header(case.images[0]))
        written = nibabel.load(tmp_path / f"{codes}.nii.gz")
        voxels = np.argwhere(np.asarray(written.dataobj) == 1)
        places.append(sorted(map(tuple, (voxels @ written.affine[:3, :3].T + written.affine[:3, 3]).round(4))))
        assert written.header.get_zooms() == pytest.approx(np.linalg.norm(written.affine[:3, :3], axis=0))
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("codes", EVERY)
def test_apply_and_undo_are_inverse(codes):
    volume = torch.arange(3 * 4 * 5 * 2).view(2, 3, 4, 5)
    transform = ornt_transform(io_orientation(LPS), axcodes2ornt(codes))
    orientation = Orientation.of(LPS @ inv_ornt_aff(transform, (3, 4, 5)))
    assert torch.equal(orientation.undo(orientation.apply(volume)), volume)
    assert orientation.reorder(volume.shape[1:]) == tuple(orientation.apply(volume).shape[1:])


def test_an_oblique_scan_is_reoriented_to_the_nearest_axes():
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1, -1, 1])
    assert Orientation.of(affine) == Orientation((0, 1, 2), (False, False, False))
