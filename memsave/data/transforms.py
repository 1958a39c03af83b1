"""What happens to a case before the network sees it, as MONAI transforms.

Both take and return dictionaries with "image" (4, X, Y, Z) float32 and "label" (1, X, Y, Z) uint8.
`preprocess` is deterministic: crop to the brain, then z-score each modality over its nonzero voxels (MR intensities
have no unit, so each scan needs its own scale). `augment` draws a crop, of which a fraction is centred on tumour, and
flips and rescales it.
"""

from collections.abc import Sequence

from monai.transforms import (
    Compose,
    CropForegroundd,
    NormalizeIntensityd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)

KEYS = ("image", "label")
START, END = "foreground_start_coord", "foreground_end_coord"


def preprocess() -> Compose:
    """Crop to the voxels that are nonzero in any modality, then z-score; START and END say what was cropped."""
    return Compose(
        [
            CropForegroundd(
                KEYS,
                source_key="image",
                select_fn=lambda image: image != 0,
                start_coord_key=START,
                end_coord_key=END,
                allow_smaller=True,
                allow_missing_keys=True,
            ),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        ]
    )


def augment(crop_size: Sequence[int], *, foreground: float = 1 / 3, intensity: float = 0.1) -> Compose:
    """One random crop of `crop_size`, zero-padded where the volume is smaller, flipped on each axis half of the time.

    `foreground` is the fraction of crops centred on a tumour voxel; intensities are scaled by 1 +- `intensity` and
    shifted by up to as much.
    """
    return Compose(
        [
            SpatialPadd(KEYS, spatial_size=crop_size),
            RandCropByPosNegLabeld(
                KEYS, label_key="label", spatial_size=crop_size, pos=foreground, neg=1 - foreground, num_samples=1
            ),
            *(RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandScaleIntensityd("image", factors=intensity, prob=1.0),
            RandShiftIntensityd("image", offsets=intensity, prob=1.0),
        ]
    )
