"""Normalisations with an affine end, y = x_hat w + b.

dL_b/dw = sum_t g_bt x_hat_bt        dL_b/db = sum_t g_bt
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost.gradients import Dense, Gradient, wide
from memsave.ghost.rules import Use, first_argument, register


@register(nn.LayerNorm)
def layer_norm(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """`nn.LayerNorm` over the last dimensions."""
    assert isinstance(layer, nn.LayerNorm)

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        normal = F.layer_norm(wide(saved[0]), layer.normalized_shape, None, None, layer.eps)
        return _affine(normal, wide(grad), own=len(layer.normalized_shape))

    return Use(args, (first_argument(args, kwargs),), per_example, kwargs)


@register(nn.RMSNorm)
def rms_norm(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """`nn.RMSNorm` over the last dimensions."""
    assert isinstance(layer, nn.RMSNorm)

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        x = saved[0]
        normal = wide(F.rms_norm(x, list(layer.normalized_shape), None, layer.eps))
        return _affine(normal, wide(grad), own=len(layer.normalized_shape))

    return Use(args, (first_argument(args, kwargs),), per_example, kwargs)


@register(nn.GroupNorm)
def group_norm(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """`nn.GroupNorm`: channels in dimension 1."""
    assert isinstance(layer, nn.GroupNorm)

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        normal = F.group_norm(wide(saved[0]), layer.num_groups, None, None, layer.eps)
        return _affine(normal.movedim(1, -1), wide(grad).movedim(1, -1), own=1)

    return Use(args, (first_argument(args, kwargs),), per_example, kwargs)


def _affine(normal: Tensor, grad: Tensor, *, own: int) -> dict[str, Gradient]:
    """Sums over all dimensions but the batch and the last `own` ones."""
    shape = (len(grad), -1, *grad.shape[grad.dim() - own :])
    return {
        "weight": Dense((grad * normal).reshape(shape).sum(1)),
        "bias": Dense(grad.reshape(shape).sum(1)),
    }
