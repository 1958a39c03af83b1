"""Convolutions: y = x * W + b, with x (B, C, ...), y (B, O, ...) and W (O, C / groups, ...).

    dL_b/dW[o, c, k] = sum_t g_b[o, t] x_b[c, stride t + dilation k - padding]        dL_b/db = sum_t g_b[:, t]

The first is a convolution of one example. The convolutions of a batch are one call with the batch folded into the
groups, since groups share neither inputs nor weights (Rochette et al., arXiv 1912.06015). A pointwise convolution is a
matrix product.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost._torch_internals import convolution_weight_grad, same_padding
from memsave.ghost.gradients import Gradient, PerSampleGrad, upcast
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule
from memsave.ghost.rules.generic import generic

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, "memsave.models.mbconv.DepthwiseConv3d")
def conv(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`; padding other than by zeros goes to the generic rule."""
    assert isinstance(layer, Convolution)
    x, trainable = inputs.input, inputs.trainable
    if x.dim() != layer.weight.dim():
        raise LayerRefused(
            f"got an input of shape {tuple(x.shape)}, which has no batch",
            f"give it {layer.weight.dim()} dimensions, with the examples in dimension 0",
        )
    if layer.padding_mode != "zeros":
        return generic(layer, inputs)

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        grad, found = upcast(grad), dict[str, Gradient]()
        if "weight" in trainable:
            found["weight"] = PerSampleGrad(_weight_grads(layer, upcast(saved[0]).to(grad.dtype), grad))
        if "bias" in trainable:
            found["bias"] = PerSampleGrad(grad.flatten(2).sum(2))
        return found

    return RuleOutput(inputs.args, inputs.kwargs, (x,) if "weight" in trainable else (), per_example_grads)


def _weight_grads(layer: Convolution, x: Tensor, grad: Tensor) -> Tensor:
    """(B, O, C / groups, ...) from the input (B, C, ...) and the output's gradient (B, O, ...)."""
    batch, space, shape = len(x), x.dim() - 2, layer.weight.shape
    padding: Any = layer.padding
    if isinstance(padding, str):  # "same" may pad one more at the end than at the start
        x, padding = F.pad(x, same_padding(layer)), (0,) * space
    if layer.groups == 1 and {*shape[2:], *layer.stride} == {1} and not any(padding):
        return torch.einsum("bot,bct->boc", grad.flatten(2), x.flatten(2)).reshape(batch, *shape)
    folded = convolution_weight_grad(
        grad.reshape(1, -1, *grad.shape[2:]),  # (1, B O, ...)
        x.reshape(1, -1, *x.shape[2:]),  # (1, B C, ...)
        grad.new_empty(1).expand(batch * shape[0], *shape[1:]),  # only the shape of the weight is read
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=batch * layer.groups,
    )
    return folded.reshape(batch, *shape)
