"""A depthwise 3D convolution whose backward is as fast as its forward on the CPU.

PyTorch has a fast CPU kernel for the forward of a depthwise convolution in channels_last_3d, and slow kernels for its
two gradients, which dominate the time of a network of inverted bottlenecks. Both gradients can be computed by fast
kernels:

    dL/dx = conv(dL/dy, w flipped on every axis)                            the forward's own kernel
    dL/dw[:, kd] = sum over d of the 2D weight gradient of (x[d + kd - p], dL/dy[d])

for stride 1 and padding p = (k - 1) / 2. The second formula views a channels_last_3d tensor (N, C, D, H, W) as a
channels_last tensor (N D, C, H, W), which has the same memory layout: one 2D weight gradient for each of the k planes
of the kernel, on shifted slices, without a copy.

All other cases (another device, stride, dilation or padding, an even kernel, several outputs per channel) use
`torch.nn.functional.conv3d`. The function is the same in both cases. On CUDA, PyTorch has kernels of its own for
contiguous volumes; in channels_last_3d it would leave the convolution to cuDNN, which took five times as long on an
H200.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memsave.models._torch_internals import is_transformed

LAST = torch.channels_last_3d


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
    size, depth = weight.shape[-1], x.shape[2]
    total = None
    for x_slices, grad_slices in zip(_as_slices(x), _as_slices(grad), strict=True):  # (D, C, H, W): one sample
        planes = []
        for plane in range(size):
            shift = plane - size // 2  # this plane of the kernel reads x[d + shift] for y[d]
            first, last = max(0, -shift), min(depth, depth - shift)
            if first >= last:
                planes.append(torch.zeros_like(weight[:, :, 0]))
                continue
            planes.append(
                _weight_gradient_2d(
                    x_slices[first + shift : last + shift], grad_slices[first:last], weight[:, :, plane]
                )
            )
        sample = torch.stack(planes, dim=2)
        total = sample if total is None else total + sample
    return total if total is not None else torch.zeros_like(weight)


def _as_slices(x: Tensor) -> tuple[Tensor, ...]:
    """The samples of x (N, C, D, H, W) as views (D, C, H, W), which are channels_last if x is channels_last_3d."""
    return x.transpose(1, 2).unbind(0)


def _weight_gradient_2d(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """dL/dweight (C, 1, k, k) of a depthwise 2D convolution from x and dL/dy, both (D, C, H, W)."""
    pad = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], weight.shape[0], [False, True, False]
    )[1]
