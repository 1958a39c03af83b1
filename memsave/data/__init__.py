"""Brain tumours as training data: BraTS folders, phantoms in the same layout, crops, whole volumes and scores.

    brats          the folder layout and its labels: find, read, check and split cases
    phantom        synthetic cases in that layout, generated once and cached (`anatomy` draws them)
    transforms     MONAI preprocessing and augmentation
    segmentation   datasets of training crops and of whole volumes, and the loader that prefetches
    scores         Dice and HD95 by the BraTS rules

Importing this package imports neither MONAI nor nibabel; the submodules that need them do.
"""

from memsave.data.errors import DataError

__all__ = ["DataError"]
