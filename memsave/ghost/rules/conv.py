"""Convolutions: y = x * W + b, with x (B, C, ...), y (B, O, ...) and W (O, C / groups, ...).

dL_b/db = sum_t g_b[:, t]; the weight's gradient is in `convolution.py`.
"""

from torch import Tensor, nn

from memsave.ghost.convolution import weight_grads
from memsave.ghost.gradients import Gradient, PerSampleGrad, upcast
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register_rule(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    "memsave.models.mbconv.DepthwiseConv3d",
    "memsave.models.pointwise.PointwiseConv3d",
    "memsave.models.recast.RecastConv3d",
)
def conv(layer: nn.Module, inputs: LayerInputs) -> RuleOutput | None:
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, with padding by zeros."""
    assert isinstance(layer, Convolution)
    x, trainable = inputs.input, inputs.trainable
    if layer.padding_mode != "zeros":
        return None
    if x.dim() != layer.weight.dim():
        raise LayerRefused(
            f"got an input of shape {tuple(x.shape)}, which has no batch",
            f"give it {layer.weight.dim()} dimensions, with the examples in dimension 0",
        )

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        grad, found = upcast(grad), dict[str, Gradient]()
        if "weight" in trainable:
            found["weight"] = PerSampleGrad(
                weight_grads(
                    upcast(saved[0]),
                    grad,
                    layer.weight.shape,
                    stride=layer.stride,
                    padding=layer.padding,
                    dilation=layer.dilation,
                    groups=layer.groups,
                )
            )
        if "bias" in trainable:
            found["bias"] = PerSampleGrad(grad.flatten(2).sum(2))
        return found

    return RuleOutput(inputs.args, inputs.kwargs, (x,) if "weight" in trainable else (), per_example_grads)
