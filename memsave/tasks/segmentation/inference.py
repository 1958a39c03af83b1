"""Segmentation of whole volumes with a trained network."""

from collections.abc import Sequence

from torch import Tensor, nn

from memsave.training.loop import evaluating


def predict(model: nn.Module, image: Tensor, *, window: Sequence[int], overlap: float = 0.5) -> Tensor:
    """Logits (R, D, H, W) of a whole volume (C, D, H, W), from overlapping windows of the size of training crops."""
    from monai.inferers import sliding_window_inference

    with evaluating(model):
        logits = sliding_window_inference(
            image[None], roi_size=tuple(window), sw_batch_size=2, predictor=model, overlap=overlap, mode="gaussian"
        )
    assert isinstance(logits, Tensor)
    return logits[0]


def without_small(masks: Tensor, names: Sequence[str], *, smallest_et: int) -> Tensor:
    """Masks (R, X, Y, Z) without an enhancing region of fewer than `smallest_et` voxels, often a false positive."""
    masks = masks.clone()
    for name, mask in zip(names, masks, strict=True):
        if name == "et" and int(mask.sum()) < smallest_et:
            mask.zero_()
    return masks
