"""Dice and the 95th percentile of the Hausdorff distance (HD95), with the conventions of BraTS for empty masks.

    Dice(P, T) = 2 |P and T| / (|P| + |T|)
    HD95(P, T) = max(q95 of d(p, T) over p in surface(P), q95 of d(t, P) over t in surface(T))

d is the distance to the nearest surface voxel of the other mask in millimetres. Both masks empty: Dice 1, HD95 0.
One mask empty: Dice 0, HD95 the diagonal of a 240 x 240 x 155 volume, for volumes of any size.
Reference: Menze et al., The Multimodal Brain Tumor Image Segmentation Benchmark (BraTS), IEEE TMI 2015.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from memsave.data.volumes.schemes import REGIONS

WORST_HD95 = math.sqrt(240**2 + 240**2 + 155**2)  # 373.13


def dice(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Dice of two boolean masks of the same shape."""
    _check_masks(prediction, target)
    total = int(prediction.sum()) + int(target.sum())
    return 2 * int((prediction & target).sum()) / total if total else 1.0


def hd95(prediction: torch.Tensor, target: torch.Tensor, *, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    """Symmetric HD95 of two boolean masks (X, Y, Z), in the unit of `spacing`, the size of a voxel on each axis."""
    _check_masks(prediction, target)
    masks = [mask.detach().cpu().numpy() for mask in (prediction, target)]
    filled = [bool(mask.any()) for mask in masks]
    if not all(filled):
        return WORST_HD95 if any(filled) else 0.0
    box = _bounding_box(masks[0] | masks[1])
    first, second = (_surface(mask[box]) for mask in masks)
    return max(_directed(first, second, spacing=spacing), _directed(second, first, spacing=spacing))


def region_scores(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    regions: Sequence[str] = REGIONS,
) -> dict[str, float]:
    """`dice_*` and `hd95_*` of each of the R `regions` from boolean masks of shape (R, X, Y, Z)."""
    _check_masks(prediction, target)
    if prediction.dim() != 4 or len(prediction) != len(regions):
        shape = tuple(prediction.shape)
        raise ValueError(f"region_scores() got masks of shape {shape}: pass ({len(regions)}, X, Y, Z).")
    pairs = list(zip(regions, prediction, target))
    scores = {f"dice_{name}": dice(mask, truth) for name, mask, truth in pairs}
    return scores | {f"hd95_{name}": hd95(mask, truth, spacing=spacing) for name, mask, truth in pairs}


def _check_masks(prediction: torch.Tensor, target: torch.Tensor) -> None:
    if prediction.dtype != torch.bool or target.dtype != torch.bool:
        raise ValueError(f"Scores need boolean masks and got {prediction.dtype}, {target.dtype}: threshold them first.")
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"Prediction and target have the shapes {shapes}: resample both to one grid.")


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    extents = (np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return tuple(slice(int(hits[0]), int(hits[-1]) + 1) for hits in extents)


def _surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask with at least one of their six neighbours outside it; the array's exterior is outside."""
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask)


def _directed(source: np.ndarray, target: np.ndarray, *, spacing: Sequence[float]) -> float:
    """The 95th percentile of the distances from the voxels of `source` to the nearest voxel of `target`."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(~target, sampling=spacing)
    return float(np.percentile(distance[source], 95))
