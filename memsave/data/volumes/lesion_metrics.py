"""The lesion-wise Dice and HD95 of BraTS 2023: means over lesions, with the same weight for small and large ones.

    lesion-wise Dice = sum over lesions of Dice(P_i, T_i) / (lesions + false positives)
    lesion-wise HD95 = (sum over lesions of HD95(P_i, T_i) + 374 * false positives) / (lesions + false positives)

The target is dilated three times with 18 neighbours. Every component (26 neighbours) of the result is a lesion; T_i
is the set of undilated target voxels in it. P_i is the union of all components (26 neighbours) of the prediction that
overlap the dilated lesion; a component that overlaps several lesions belongs to each of them. An empty P_i is a false
negative with Dice 0 and HD95 374. A component of the prediction that overlaps no dilated lesion is a false positive of
any size. A T_i of at most 50 mm^3 is ignored, and components that overlap it are not false positives. If no lesion and
no false positive remains, Dice is 1 and HD95 is 0.

Reference: github.com/rachitsaluja/BraTS-2023-Metrics, metrics.py at 43c9052, with its parameters for BraTS-GLI. One
difference: the reference weights the distances of HD95 by surface area, `hd95` counts surface voxels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memsave.data.volumes.metrics import _bounding_box, _check_masks, dice, hd95
from memsave.data.volumes.schemes import REGIONS

WORST_LESION_HD95 = 374.0
DILATIONS = 3


@dataclass(frozen=True)
class LesionScores:
    """The scores of one region, with the numbers of found lesions, missed lesions and false components."""

    dice: float
    hd95: float  # in the unit of the spacing
    true_positives: int
    false_negatives: int
    false_positives: int


def lesion_scores(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    smallest: float = 50,
) -> LesionScores:
    """Lesion-wise scores of two boolean masks (X, Y, Z) with voxels of the size `spacing`, in mm.

    Lesions of at most `smallest` mm^3 (the number of voxels at 1 mm) are ignored. Raises ValueError for masks that are
    not boolean, not of the same shape or not (X, Y, Z), and for a spacing that is not three positive numbers.
    """
    _check_masks(prediction, target)
    if prediction.dim() != 3:
        raise ValueError(f"lesion_scores() got masks of shape {tuple(prediction.shape)}: pass (X, Y, Z), one region.")
    if len(spacing) != 3 or not all(size > 0 for size in spacing):
        raise ValueError(
            f"The spacing is {tuple(spacing)}: give three positive numbers, the size of a voxel on each axis."
        )
    from scipy import ndimage

    predicted, truth = (mask.detach().cpu().numpy() for mask in (prediction, target))
    either = predicted | truth
    if not either.any():
        return LesionScores(dice=1.0, hd95=0.0, true_positives=0, false_negatives=0, false_positives=0)
    # cropping the dilation to this box is exact: dilations that meet outside it also meet on its border
    box = _bounding_box(either)
    predicted, truth = predicted[box], truth[box]

    dilated = ndimage.binary_dilation(truth, ndimage.generate_binary_structure(3, 2), iterations=DILATIONS)
    neighbours = ndimage.generate_binary_structure(3, 3)
    lesions, _ = ndimage.label(dilated, neighbours)
    components, count = ndimage.label(predicted, neighbours)
    component_boxes = ndimage.find_objects(components)

    unclaimed = set(range(1, count + 1))
    dices, distances, found = [], [], 0
    for lesion, lesion_box in enumerate(ndimage.find_objects(lesions), start=1):
        inside = lesions[lesion_box] == lesion
        overlapping = np.setdiff1d(components[lesion_box][inside], [0])
        unclaimed.difference_update(overlapping.tolist())
        if int((truth[lesion_box] & inside).sum()) * math.prod(spacing) <= smallest:
            continue
        if not overlapping.size:
            dices.append(0.0)
            distances.append(WORST_LESION_HD95)
            continue
        found += 1
        whole = _enclosing([lesion_box, *(component_boxes[component - 1] for component in overlapping)])
        union = torch.from_numpy(np.isin(components[whole], overlapping))
        own = torch.from_numpy(truth[whole] & (lesions[whole] == lesion))
        dices.append(dice(union, own))
        distances.append(hd95(union, own, spacing=spacing))

    total = len(dices) + len(unclaimed)
    return LesionScores(
        dice=sum(dices) / total if total else 1.0,
        hd95=(sum(distances) + WORST_LESION_HD95 * len(unclaimed)) / total if total else 0.0,
        true_positives=found,
        false_negatives=len(dices) - found,
        false_positives=len(unclaimed),
    )


def lesion_region_scores(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    smallest: float = 50,
    regions: Sequence[str] = REGIONS,
) -> dict[str, float]:
    """`lesion_dice_*` and `lesion_hd95_*` of each of the R `regions` from boolean masks of shape (R, X, Y, Z).

    `spacing`, `smallest` and the errors are those of `lesion_scores`. Raises ValueError for another shape.
    """
    _check_masks(prediction, target)
    if prediction.dim() != 4 or len(prediction) != len(regions):
        shape = tuple(prediction.shape)
        raise ValueError(f"lesion_region_scores() got masks of shape {shape}: pass ({len(regions)}, X, Y, Z).")
    scores = {
        name: lesion_scores(mask, truth, spacing=spacing, smallest=smallest)
        for name, mask, truth in zip(regions, prediction, target)
    }
    dices = {f"lesion_dice_{name}": score.dice for name, score in scores.items()}
    return dices | {f"lesion_hd95_{name}": score.hd95 for name, score in scores.items()}


def _enclosing(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box that contains all `boxes`."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes))
