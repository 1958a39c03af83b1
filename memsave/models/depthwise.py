"""A depthwise 3D convolution whose backward is as fast as its forward on the CPU.

PyTorch has a fast CPU kernel for the forward of a depthwise convolution in channels_last_3d, and slow kernels for its
two gradients, which dominate the time of a network of inverted bottlenecks. Both gradients can be computed by fast
kernels:

    dL/dx = conv(dL/dy, w flipped on every axis)                            the forward's own kernel
    dL/dw[:, kd] = sum over d of the 2D weight gradient of (x[d + kd - p], dL/dy[d])

for stride 1 and padding p = (k - 1) / 2. The second formula views a channels_last_3d tensor (N, C, D, H, W) as a
channels_last tensor (N D, C, H, W), which has the same memory layout: one 2D weight gradient for each of the k planes
of the kernel, on shifted slices, without a copy.

The CPU kernels for bfloat16 and float16 are slow, most of all where the CPU has no units for them. There, a slab of
planes after the other is computed in float32, and rounded. Both passes are operators (`operators.py`).

All other cases (another device, stride, dilation or padding, an even kernel, several outputs per channel) use
`torch.nn.functional.conv3d`. The function is the same in both cases. On CUDA, PyTorch has kernels of its own for
contiguous volumes; in channels_last_3d it would leave the convolution to cuDNN, which took five times as long on an
H200.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from memsave.models._torch_internals import is_transformed
from memsave.models.operators import LIBRARY, operator
from memsave.reversible.coupling import LOW_PRECISION

LAST = torch.channels_last_3d
SLAB = 2**21
"""Elements of a slab in float32, about."""


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Tensor:
    """Convolve each channel of x (N, C, D, H, W) with its own kernel: weight (C, 1, k, k, k), bias (C,).

    `padding=None` keeps the size of the volume for odd k at stride 1. Gradients of any order are exact. Under autocast
    the operands are cast as by `conv3d`.
    """
    padding = dilation * (weight.shape[-1] // 2) if padding is None else padding
    if not has_fast_backward(x, weight, stride=stride, padding=padding, dilation=dilation):
        groups = x.shape[-4]
        return F.conv3d(_for_device(x), weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # autocast does not cast for a custom Function
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y = _Depthwise.apply(x.contiguous(memory_format=LAST), weight)
    return y if bias is None else y + bias.view(-1, 1, 1, 1)


def has_fast_backward(x: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int) -> bool:
    """Whether the formulas above apply and are faster."""
    channels, per_group, *kernel = weight.shape
    size = kernel[0]
    return (
        x.device.type == "cpu"
        and x.is_floating_point()
        and not is_transformed()
        and x.dim() == 5
        and per_group == 1
        and channels == x.shape[1]
        and kernel == [size] * 3
        and size % 2 == 1
        and (stride, padding, dilation) == (1, size // 2, 1)
    )


def depthwise_gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/dweight) of `depthwise_conv3d(x, weight)` at stride 1 from dL/dy, for callers that keep x."""
    if has_fast_backward(x, weight, stride=1, padding=weight.shape[-1] // 2, dilation=1):
        return same_depthwise_conv(grad, weight.flip(2, 3, 4)), _weight_gradient(x, grad, weight)
    pad, one = [weight.shape[-1] // 2] * 3, [1, 1, 1]
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        _for_device(grad),
        _for_device(x),
        weight,
        None,
        one,
        pad,
        one,
        False,
        [0, 0, 0],
        x.shape[1],
        [True, True, False],
    )
    return by_x, by_weight


def same_depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """The plain convolution at stride 1 that keeps the size of the volume."""
    if _computes_in_slabs(x, weight):
        return depthwise_in_slabs(x, weight)
    return F.conv3d(_for_device(x), weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


def _for_device(x: Tensor) -> Tensor:
    """The volume in the memory format of the fastest kernel."""
    return x.contiguous() if x.device.type == "cuda" else x


class _Depthwise(torch.autograd.Function):
    """Every operation of the backward is differentiable, so higher derivatives need no further code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return same_depthwise_conv(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # backward may be called inside autocast
            grad = grad.contiguous(memory_format=LAST)
            grad_x = same_depthwise_conv(grad, weight.flip(2, 3, 4)) if ctx.needs_input_grad[0] else None
            grad_weight = _weight_gradient(x, grad, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """dL/dweight (C, 1, k, k, k) from x and dL/dy, both (N, C, D, H, W)."""
    if _computes_in_slabs(x, grad):
        return depthwise_weight_gradient_in_slabs(x, grad, weight)
    total = None
    for x_slices, grad_slices in zip(_as_slices(x), _as_slices(grad), strict=True):
        sample = _of_slices(x_slices, grad_slices, weight, before=0)
        total = sample if total is None else total + sample
    return total if total is not None else torch.zeros_like(weight)


def _of_slices(x: Tensor, grad: Tensor, weight: Tensor, *, before: int) -> Tensor:
    """dL/dweight (C, 1, k, k, k) from slices (D, C, H, W) of one sample; x has `before` more of them at its start."""
    size = weight.shape[-1]
    planes = []
    for plane in range(size):
        shift = plane - size // 2 + before  # this plane of the kernel reads x[d + shift] for y[d]
        first, last = max(0, -shift), min(len(grad), len(x) - shift)
        if first >= last:
            planes.append(torch.zeros_like(weight[:, :, 0]))
            continue
        planes.append(_weight_gradient_2d(x[first + shift : last + shift], grad[first:last], weight[:, :, plane]))
    return torch.stack(planes, dim=2)


def _computes_in_slabs(x: Tensor, other: Tensor) -> bool:
    """Whether to compute in float32, slab by slab; autograd does not record that."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or other.requires_grad)
    return x.device.type == "cpu" and x.dtype in LOW_PRECISION and not recorded


def _space(x: Tensor, *, more: int = 0) -> Tensor:
    """Uninitialized planes of a slab of x (N, C, D, H, W), and `more`: (1, C, planes, H, W) in float32."""
    size = (1, x.shape[1], min(_planes(x), x.shape[2]) + more, *x.shape[3:])
    return torch.empty(size, dtype=torch.float32, device=x.device, memory_format=LAST)


def _planes(x: Tensor) -> int:
    """The most planes of a slab of x (N, C, D, H, W)."""
    return max(1, SLAB // max(1, x.shape[1] * x.shape[3] * x.shape[4]))


@operator(scratch=lambda x, weight: (_space(x, more=weight.shape[-1] - 1),))
def depthwise_in_slabs(x: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
    """`same_depthwise_conv`, computed in float32."""
    y, wide, pad = torch.empty_like(x), weight.float(), weight.shape[-1] // 2
    for sample, planes, slab in _slabs(x, reach=pad, space=scratch):
        y[sample, :, planes] = F.conv3d(slab, wide, padding=(0, pad, pad), groups=x.shape[1])
    return y


@operator(scratch=lambda x, grad, weight: (_space(x, more=weight.shape[-1] - 1), _space(grad)))
def depthwise_weight_gradient_in_slabs(
    x: Tensor, grad: Tensor, weight: Tensor, scratch: Tensor, scratch_grad: Tensor
) -> Tensor:
    """`_weight_gradient`, computed in float32."""
    total, pad = torch.zeros_like(weight, dtype=torch.float32), weight.shape[-1] // 2
    for sample, planes, slab in _slabs(x, reach=pad, space=scratch):
        wide = scratch_grad[:, :, : planes.stop - planes.start].copy_(grad[sample, :, planes])
        (x_slices,), (grad_slices,) = _as_slices(slab), _as_slices(wide)
        total += _of_slices(x_slices, grad_slices, total, before=pad)
    return total.to(weight.dtype)


def _slabs(x: Tensor, *, reach: int, space: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """For x (N, C, D, H, W), one sample's planes at a time: (the sample, the planes, their values in float32).

    The values are in `space`. They have `reach` more planes on each side, which are zero outside of the volume.
    """
    depth, at_once = x.shape[2], _planes(x)
    for sample in range(len(x)):
        for start in range(0, depth, at_once):
            end = min(start + at_once, depth)
            slab = space[:, :, : end - start + 2 * reach]
            first, last, offset = max(0, start - reach), min(depth, end + reach), start - reach
            slab[:, :, : first - offset] = 0
            slab[:, :, last - offset :] = 0
            slab[:, :, first - offset : last - offset] = x[sample, :, first:last]
            yield slice(sample, sample + 1), slice(start, end), slab


@torch.library.register_fake("memsave::depthwise_in_slabs", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("memsave::depthwise_weight_gradient_in_slabs", lib=LIBRARY)
def _(x: Tensor, grad: Tensor, weight: Tensor, *scratch: Tensor) -> Tensor:
    return torch.empty_like(weight)


@register_flop_formula(torch.ops.memsave.depthwise_in_slabs)
def _(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * prod(weight[2:])


@register_flop_formula(torch.ops.memsave.depthwise_weight_gradient_in_slabs)
def _(x: Any, grad: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * prod(weight[2:])


def _as_slices(x: Tensor) -> tuple[Tensor, ...]:
    """The samples of x (N, C, D, H, W) as views (D, C, H, W), which are channels_last if x is channels_last_3d."""
    return x.transpose(1, 2).unbind(0)


def _weight_gradient_2d(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """dL/dweight (C, 1, k, k) of a depthwise 2D convolution from x and dL/dy, both (D, C, H, W)."""
    pad = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], weight.shape[0], [False, True, False]
    )[1]
