"""A 1x1x1 convolution as a matrix product on CUDA.

    y_b = W x_b        dL/dx_b = W' dL/dy_b        dL/dW = sum over b of dL/dy_b x_b'        x_b: channels by voxels

cuDNN takes several times as long for float32 without TF32: 700 of the 880 ms of a training step of the U-Net on an
H200. The sum over the voxels in dL/dW is split into blocks, so that a product of few channels uses the whole GPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.models._torch_internals import is_transformed

MAX_BLOCKS = 256


class PointwiseConv3d(nn.Conv3d):
    """`nn.Conv3d(channels, outputs, 1, bias=False)`; the same function."""

    def __init__(self, channels: int, outputs: int):
        super().__init__(channels, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, outputs, D, H, W)."""
        return pointwise_conv3d(x, self.weight)


def pointwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve x (B, C, D, H, W) with weight (O, C, 1, 1, 1); gradients of any order are exact.

    Under autocast the operands are cast as by `conv3d`.
    """
    if not has_fast_product(x):
        return F.conv3d(x, weight)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x, weight = (each.to(torch.get_autocast_dtype(kind)) for each in (x, weight))
    y = _Pointwise.apply(x.flatten(2), weight.flatten(1))
    return y.unflatten(2, x.shape[2:])


def has_fast_product(x: Tensor) -> bool:
    """Whether a matrix product is faster."""
    return x.device.type == "cuda" and x.dim() == 5 and x.numel() > 0 and not is_transformed()


class _Pointwise(torch.autograd.Function):
    """Every operation of the backward is differentiable, so higher derivatives need no further code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.matmul(weight, x)  # (B, O, V)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            by_x = torch.matmul(weight.T, grad) if ctx.needs_input_grad[0] else None
            by_weight = _weight_gradient(x, grad) if ctx.needs_input_grad[1] else None
        return by_x, None if by_weight is None else by_weight.to(weight.dtype)


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """sum_b g_b x_b' (O, C) from x (B, C, V) and g (B, O, V)."""
    voxels = x.shape[2]
    count = next(each for each in range(MAX_BLOCKS, 0, -1) if voxels % each == 0)
    total = None
    for one, other in zip(grad, x, strict=True):  # views of one sample, (O, V) and (C, V)
        blocks = one.unflatten(1, (count, -1)).transpose(0, 1), other.unflatten(1, (count, -1)).permute(1, 2, 0)
        product = torch.bmm(*blocks).sum(0, dtype=None if x.dtype == torch.float64 else torch.float32)
        total = product if total is None else total + product
    assert total is not None
    return total
