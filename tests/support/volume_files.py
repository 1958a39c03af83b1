"""NIfTI files of constant volumes in the layouts of BraTS and of the Medical Segmentation Decathlon."""

import nibabel
import numpy as np

from memsave.data.volumes.layouts import MODALITIES

SHAPE = (5, 4, 3)


def save(path, value=1, *, shape=SHAPE):
    """A NIfTI file full of `value`, or of these voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = np.full(shape, value, dtype=np.float32) if np.isscalar(value) else value
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)


def brats(root, id, *, separator="_", parts=MODALITIES, label=0, suffix=".nii.gz"):
    """A case whose modalities hold 1, 2, 3, 4."""
    for value, part in enumerate(parts, start=1):
        save(root / id / f"{id}{separator}{part}{suffix}", value)
    if label is not None:
        save(root / id / f"{id}{separator}seg{suffix}", label)


def decathlon(root, id, *, label=0, folder="imagesTr"):
    """A 4D file whose FLAIR, T1w, T1gd, T2w hold 4, 1, 2, 3, which is 1, 2, 3, 4 in our order."""
    save(root / folder / f"{id}.nii.gz", np.broadcast_to(np.float32([4, 1, 2, 3]), (*SHAPE, 4)))
    if label is not None:
        save(root / "labelsTr" / f"{id}.nii.gz", label)
