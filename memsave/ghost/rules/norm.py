"""Normalisations with an affine transform at the end, y = x_hat w + b.

dL_b/dw = sum_t g_bt x_hat_bt        dL_b/db = sum_t g_bt

x_hat is the layer's own output for b = 0 and w = 1, or w = 0 if the layer multiplies by 1 + w. It is computed in the
backward, so that only the input is saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost._torch_internals import unobserved
from memsave.ghost.gradients import Gradient, PerSampleGrad, has_values, upcast
from memsave.ghost.parameter_swap import swapped_parameters
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule
from memsave.ghost.rules.norm_forwards import known_neutral_weight
from memsave.processes import class_of

OF_TORCH = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
COMPARED = 8  # positions of the first example, in each dimension


@register_rule(nn.LayerNorm, nn.RMSNorm)
def over_the_last_dimensions(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.LayerNorm` and `nn.RMSNorm`."""
    return _rule(layer, inputs, neutral_weight=1.0)


@register_rule(nn.GroupNorm, "memsave.models.norm.GroupNorm")
def group_norm(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.GroupNorm`: channels in dimension 1."""
    return _rule(layer, inputs, neutral_weight=1.0, channels=1)


@register_rule("transformers.models.*RMSNorm", "transformers.models.*T5LayerNorm")
def hugging_face(layer: nn.Module, inputs: LayerInputs) -> RuleOutput | None:
    """RMSNorms of transformers, scaled by w (Llama, T5) or by 1 + w (Gemma).

    There is no rule for a layer whose forward is not in the allow-list, or whose gradient differs from that of autograd
    at its first use.
    """
    x, cache = inputs.input, inputs.cache
    if "neutral_weight" not in cache:
        cache["neutral_weight"] = known_neutral_weight(layer)
    neutral = cache["neutral_weight"]
    if neutral is None or len(inputs.args) + len(inputs.kwargs) != 1:
        return None
    if x.dim() < 2 or x.shape[-1:] != layer.get_parameter("weight").shape:
        return None
    rule_output = _rule(layer, inputs, neutral_weight=neutral)
    if not cache.get("verified") and has_values(x):
        ours, expected = _first_gradients(layer, x, rule_output)
        if not torch.allclose(ours, expected, rtol=0, atol=1e-4 * float(expected.norm()), equal_nan=True):
            cache["neutral_weight"] = None
            return None
        cache["verified"] = bool(expected.isfinite().all() & (expected != 0).any())  # zeros and NaN verify nothing
    return rule_output


def _first_gradients(layer: nn.Module, x: Tensor, rule_output: RuleOutput) -> tuple[Tensor, Tensor]:
    """The weight's gradient by the rule and by autograd, for a few positions of the first example of x."""
    part = upcast(x.detach()[(slice(1), *[slice(COMPARED)] * (x.dim() - 2))])  # (1, ..., d)
    weight = upcast(layer.get_parameter("weight").detach()).requires_grad_()
    with unobserved(), torch.autocast(x.device.type, enabled=False):
        with torch.enable_grad(), swapped_parameters(layer, {"weight": weight}):
            y: Tensor = type(layer).forward(layer, part)
        grad = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        (expected,) = torch.autograd.grad(y, weight, grad)
        with torch.no_grad():
            found = rule_output.per_example_grads((part,), grad)["weight"]
    assert isinstance(found, PerSampleGrad)
    return found.values[0], expected.to(found.values.dtype)


def _rule(layer: nn.Module, inputs: LayerInputs, *, neutral_weight: float, channels: int | None = None) -> RuleOutput:
    trainable = inputs.trainable

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        parameter_dims = layer.get_parameter("weight").dim()
        grad, found = upcast(grad), dict[str, Gradient]()

        def summed(values: Tensor) -> PerSampleGrad:
            """Sum over all dimensions except the batch and those of the parameter."""
            values = values if channels is None else values.movedim(channels, -1)
            return PerSampleGrad(
                values.reshape(values.shape[0], -1, *values.shape[values.dim() - parameter_dims :]).sum(1)
            )

        if "weight" in trainable:
            found["weight"] = summed(grad * _run(layer, upcast(saved[0]), neutral_weight))
        if "bias" in trainable:
            found["bias"] = summed(grad)
        return found

    saved = (inputs.input,) if "weight" in trainable else ()
    return RuleOutput(inputs.args, inputs.kwargs, saved, per_example_grads, stacks=channels is None)


def _run(layer: nn.Module, x: Tensor, weight: float) -> Tensor:
    """The layer's output for x with another weight and no bias."""
    forward: Any = type(layer).forward
    parameters: dict[str, Tensor | None]
    if class_of(layer) in OF_TORCH:  # their weight and bias may be None
        parameters = {name: None for name, _ in layer.named_parameters()}
    else:
        parameters = {
            name: x.new_full(p.shape, 0.0 if name == "bias" else weight) for name, p in layer.named_parameters()
        }
    with swapped_parameters(layer, parameters):
        return forward(layer, x)
