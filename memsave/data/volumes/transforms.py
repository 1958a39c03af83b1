"""Preprocessing and augmentation of cases by MONAI transforms, and resampling.

The transforms take and return dictionaries with "image" (C, X, Y, Z) float32 and "label" (1, X, Y, Z) uint8.
`preprocess` is deterministic: it crops to the brain, then z-scores each modality over its nonzero voxels (MR
intensities have no unit, so each scan needs its own scale). `augment` draws crops, a fraction of them centred on a
labelled voxel, and flips and rescales them; augmentation "full" also rotates, zooms, blurs, and adds noise and gamma.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
    MapTransform,
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from torch.nn import functional as F

from memsave.data.errors import DataError

KEYS = ("image", "label")
START, END = "foreground_start_coord", "foreground_end_coord"
AUGMENTATIONS = ("light", "full")


def preprocess() -> Compose:
    """Crop to the voxels that are nonzero in any modality, then z-score; START and END are the bounds of the crop."""
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


def augment(
    crop_size: Sequence[int],
    *,
    foreground: float = 1 / 3,
    intensity: float = 0.1,
    augmentation: str = "light",
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    count: int = 1,
) -> Compose:
    """`count` random crops of `crop_size`, zero-padded if the volume is smaller; axes are flipped with probability 1/2.

    `foreground` is the fraction of crops centred on a labelled voxel. Intensities are scaled by up to 1 +- `intensity`
    and shifted by up to +- `intensity`. "full" adds, each to a part of the crops: rotation by up to 15 degrees about
    every axis with a zoom of 0.85 to 1.15, in millimetres of voxels of `spacing`; Gaussian noise with a standard
    deviation of up to 0.1; blur of 0.5 to 1 voxels; gamma of 0.7 to 1.5 that keeps mean and standard deviation. The
    kinds follow nnU-Net (Isensee et al., Nature Methods 2021), with smaller ranges.
    """
    if augmentation not in AUGMENTATIONS:
        raise DataError(f"augmentation is {augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}.")
    full = augmentation == "full"
    blur = (0.5, 1.0)
    geometry = [RandRotateZoomd({"image": "bilinear", "label": "nearest"}, spacing=spacing, prob=0.3)]
    distortion = [
        RandGaussianNoised("image", prob=0.15, std=0.1),
        RandGaussianSmoothd("image", prob=0.15, sigma_x=blur, sigma_y=blur, sigma_z=blur),
    ]
    return Compose(
        [
            SpatialPadd(KEYS, spatial_size=crop_size),
            RandCropByPosNegLabeld(
                KEYS, label_key="label", spatial_size=crop_size, pos=foreground, neg=1 - foreground, num_samples=count
            ),
            *(geometry if full else []),
            *(RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
            *(distortion if full else []),
            RandScaleIntensityd("image", factors=intensity, prob=1.0),
            RandShiftIntensityd("image", offsets=intensity, prob=1.0),
            *([RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True)] if full else []),
        ]
    )


class RandRotateZoomd(RandomizableTransform, MapTransform):
    """Rotate about the centre and zoom, in millimetres: a sphere stays a sphere for any voxel `spacing`.

    `modes` is the interpolation mode of each key. Voxels from outside the volume are zero, as outside the skull.
    """

    def __init__(
        self,
        modes: Mapping[str, str],
        *,
        spacing: Sequence[float],
        prob: float,
        degrees: float = 15,
        zoom: float = 0.15,
    ):
        MapTransform.__init__(self, tuple(modes))
        RandomizableTransform.__init__(self, prob)
        self.modes = modes
        self.spacing = spacing
        self.degrees = degrees
        self.zoom = zoom

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Apply one rotation and zoom to all volumes (C, x, y, z); dtypes are kept."""
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return result
        angles = [math.radians(angle) for angle in self.R.uniform(-self.degrees, self.degrees, 3)]
        zoom = self.R.uniform(1 - self.zoom, 1 + self.zoom)
        for key, mode in self.modes.items():
            volume = result[key].as_subclass(torch.Tensor)
            half = torch.tensor([n * mm / 2 for n, mm in zip(volume.shape[1:], self.spacing)], dtype=torch.float64)
            # maps output voxels to input voxels, in units of half the volume
            matrix = torch.diag(1 / half) @ (rotation(angles) / zoom) @ torch.diag(half)
            theta = F.pad(matrix.flip(0, 1), (0, 1))[None].float()  # torch counts the last axis first
            grid = F.affine_grid(theta, [1, *volume.shape], align_corners=False)
            sampled = F.grid_sample(volume[None].float(), grid, mode=mode, padding_mode="zeros", align_corners=False)
            result[key] = sampled[0].to(volume.dtype)
        return result


def rotation(angles: Sequence[float]) -> torch.Tensor:
    """The rotation matrix (3, 3) float64 about x, then y, then z by these angles in radians."""
    matrix = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        first, second = (other for other in range(3) if other != axis)
        rotated = torch.eye(3, dtype=torch.float64)
        rotated[first, first] = rotated[second, second] = math.cos(angle)
        rotated[first, second], rotated[second, first] = -math.sin(angle), math.sin(angle)
        matrix = rotated @ matrix
    return matrix


def grid_size(size: Sequence[int], *, spacing: Sequence[float], target: Sequence[float] | None) -> tuple[int, int, int]:
    """The size in voxels of spacing `target` (None: `spacing`) that covers `size` voxels of `spacing`, rounded."""
    x, y, z = (max(1, round(n * mm / new)) for n, mm, new in zip(size, spacing, target or spacing))
    return x, y, z


def resample(
    volume: torch.Tensor, *, size: Sequence[int], step: Sequence[float], nearest: bool = False
) -> torch.Tensor:
    """Resample (..., x, y, z) to (..., *size) about its centre, trilinearly or to the nearest voxel.

    A voxel of the result is `step` voxels of `volume` wide on each axis. Beyond the outermost voxel centres, the
    outermost values are repeated. An axis with unchanged size and step 1 is copied exactly.
    """
    for axis, (length, width) in enumerate(zip(size, step)):
        dim, last = axis - 3, volume.shape[axis - 3] - 1
        if length == last + 1 and math.isclose(width, 1, rel_tol=1e-4):
            continue
        at = torch.arange(length, dtype=torch.float64, device=volume.device)
        at = ((at - (length - 1) / 2) * width + last / 2).clamp(0, last)
        if nearest:
            volume = volume.index_select(dim, at.round().long())
            continue
        low = at.floor().long()
        weight = (at - low).to(volume.dtype).reshape(-1, *[1] * (2 - axis))
        volume = torch.lerp(volume.index_select(dim, low), volume.index_select(dim, (low + 1).clamp(max=last)), weight)
    return volume
