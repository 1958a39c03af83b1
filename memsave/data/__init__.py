"""Brain tumours as training data: BraTS folders, phantoms in the same layout, crops, whole volumes and scores.

    layouts        how data sets name their files; finding cases
    schemes        how their labels are numbered, and the regions that are scored
    nifti          reading a file
    brats          reading and checking a case; regions and labels
    splits         which cases train and which are held out
    check          every fault of a data set, on the command line
    phantom        synthetic cases in that layout, generated once and cached; `synthesis` puts a tumour into a head,
                   `anatomy` draws one, `mni` samples that of the MNI152 template
    transforms     MONAI preprocessing and augmentation
    segmentation   datasets of training crops and of whole volumes, and the loader that prefetches
    scores         Dice and HD95 by the BraTS rules; `lesion_scores`, lesion by lesion

Importing this package imports neither MONAI nor nibabel; the submodules that need them do.
"""

from memsave.data.errors import DataError

__all__ = ["DataError"]
