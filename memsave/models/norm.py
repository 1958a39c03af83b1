"""GroupNorm whose forward uses a whole GPU.

PyTorch's kernel for the moments on CUDA gives one block of threads to each (sample, group). A volume of one patient has
eight of these, for more than a hundred multiprocessors: on an H200 the moments took half of a training step of the
U-Net. `torch.var_mean` spreads each sum over many blocks. The gradient is PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.models._torch_internals import is_transformed

FEW_ROWS = 256  # of samples times groups: more of them use the GPU
MANY_ELEMENTS = 2**14  # of a row


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`; the same function."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    """`torch.nn.functional.group_norm`; on CUDA, large volumes with few samples take a faster path.

    Under autocast both compute in float32. Gradients of any order are exact.
    """
    if weight is None or bias is None or not has_fast_forward(x, groups):
        return F.group_norm(x, groups, weight, bias, eps)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x, weight, bias = x.float(), weight.float(), bias.float()
    return _GroupNorm.apply(x.contiguous(), weight, bias, groups, eps)


def has_fast_forward(x: Tensor, groups: int) -> bool:
    """Whether the moments of x (B, C, ...) are better formed by `torch.var_mean`."""
    if x.device.type != "cuda" or is_transformed() or x.dim() < 3:
        return False
    rows = x.shape[0] * groups
    return 0 < rows < FEW_ROWS and x.numel() >= MANY_ELEMENTS * rows


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        mean, rstd = moments(x, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        scale = weight.view(groups, -1) * rstd[..., None]  # (B, G, C / G)
        shift = bias.view(groups, -1) - mean[..., None] * scale
        size = (*x.shape[:2], *[1] * (x.dim() - 2))
        return torch.addcmul(shift.to(x.dtype).view(size), x, scale.to(x.dtype).view(size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # the gradient is differentiated, too
            inputs = [each for each, need in zip((x, weight, bias), needed, strict=True) if need]
            y = F.group_norm(x, ctx.groups, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None
        batch, channels = x.shape[:2]
        rest = x.numel() // max(1, batch * channels)
        gradients = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, batch, channels, rest, ctx.groups, list(needed)
        )
        return *gradients, None, None


def moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and 1 / sqrt(variance + eps) of each group of x (B, C, ...), contiguous: (B, G) each, in x's dtype."""
    variance, mean = torch.var_mean(x.view(x.shape[0], groups, -1), dim=2, correction=0)
    return mean, (variance + eps).rsqrt()
