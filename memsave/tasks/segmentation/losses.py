"""Losses of segmentation: soft Dice plus binary cross-entropy, one per example, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.data.volumes.reader import masks_of
from memsave.data.volumes.schemes import LabelScheme
from memsave.ghost import example_rows
from memsave.training.task import Batch

SMOOTH = 1.0  # voxels; gives Dice 1 for an empty region that is predicted empty, and bounds the gradient


def case_losses(model: nn.Module, batch: Batch, *, scheme: LabelScheme) -> Tensor:
    """(B,) losses of image (B, C, D, H, W) and label (B, 1, D, H, W), or with K crops per case in dimension 1."""
    image, label = batch["image"], batch["label"]
    several = image.dim() == 6
    if not several:
        return _losses(model, image, label, scheme=scheme)
    count, crops = image.shape[:2]
    with example_rows([case for case in range(count) for _ in range(crops)], examples=count):
        losses = _losses(model, image.flatten(0, 1), label.flatten(0, 1), scheme=scheme)
    return losses.view(count, crops).mean(1)


def _losses(model: nn.Module, image: Tensor, label: Tensor, *, scheme: LabelScheme) -> Tensor:
    """(R,) losses, one per crop, of image (R, C, D, H, W) and label (R, 1, D, H, W)."""
    logits, target = model(image), masks_of(label, scheme=scheme)
    return region_losses(logits, target) if isinstance(logits, Tensor) else supervised_losses(logits, target)


def region_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss plus binary cross-entropy, one per example, in float32: two (B, 3, D, H, W) to (B,).

    Dice = (2 sum(p t) + s) / (sum(p) + sum(t) + s) for each example and region (Milletari et al., "V-Net", 2016).
    """
    logits, target = logits.float().flatten(2), target.float().flatten(2)  # (B, 3, V)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(2)
    dice = (2 * overlap + SMOOTH) / (probability.sum(2) + target.sum(2) + SMOOTH)  # (B, 3)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(2)  # (B, 3)
    return (1 - dice + entropy).mean(1)


def supervised_losses(levels: Sequence[Tensor], target: Tensor) -> Tensor:
    """`region_losses` of logits at several resolutions, finest first, averaged with weights 1, 1/2, 1/4, ...: (B,).

    The target of a coarser level is resampled by nearest neighbour (Isensee et al., "nnU-Net", 2021).
    """
    total = target.new_zeros(len(target), dtype=torch.float32)
    for number, logits in enumerate(levels):
        nearest = F.interpolate(target.float(), size=logits.shape[2:], mode="nearest")
        total = total + 0.5**number * region_losses(logits, nearest)
    return total / sum(0.5**number for number in range(len(levels)))
