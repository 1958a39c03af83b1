"""Per-example weight gradients of convolutions: y = x * W, with x (B, C, ...), y (B, O, ...), W (O, C / groups, ...).

    dL_b/dW[o, c, k] = sum_t g_b[o, t] x_b[c, stride t + dilation k - padding]

This is a convolution of one example. The convolutions of a batch are one call with the batch folded into the groups,
since groups share neither inputs nor weights (Rochette et al., arXiv 1912.06015). A pointwise convolution is a matrix
product.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memsave.ghost._torch_internals import convolution_weight_grad


def weight_grads(
    x: Tensor, grad: Tensor, shape: Sequence[int], *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """(B, *shape) from the input (B, C, ...), the output's gradient (B, O, ...) and the weight's shape."""
    batch, space = len(x), x.dim() - 2
    stride, dilation = _of_each(stride, space), _of_each(dilation, space)
    if isinstance(padding, str):
        if padding == "same":  # one more at the end than at the start where the sum is odd
            totals = [step * (size - 1) for step, size in zip(dilation, shape[2:], strict=True)]
            x = F.pad(x, [each for total in reversed(totals) for each in (total // 2, total - total // 2)])
        padding = 0
    padding = _of_each(padding, space)
    x = x.to(grad.dtype)
    if groups == 1 and {*shape[2:], *stride} == {1} and not any(padding):
        return torch.einsum("bot,bct->boc", grad.flatten(2), x.flatten(2)).reshape(batch, *shape)
    folded = convolution_weight_grad(
        grad.reshape(1, -1, *grad.shape[2:]),  # (1, B O, ...)
        x.reshape(1, -1, *x.shape[2:]),  # (1, B C, ...)
        grad.new_empty(1).expand(batch * shape[0], *shape[1:]),  # only the shape of the weight is read
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=batch * groups,
    )
    return folded.reshape(batch, *shape)


def _of_each(value: Any, space: int) -> tuple[int, ...]:
    """One number for each dimension of space."""
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * space if len(found) == 1 else found
