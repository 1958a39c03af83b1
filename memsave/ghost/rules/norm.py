"""Normalisations with an affine transform at the end, y = x_hat w + b.

dL_b/dw = sum_t g_bt x_hat_bt        dL_b/db = sum_t g_bt

x_hat is the layer's own output for w = 1 and b = 0. It is computed in the backward, so that only the input is saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Gradient, PerSampleGrad, has_values, upcast
from memsave.ghost.parameter_swap import swapped_parameters
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule
from memsave.ghost.rules.generic import generic


@register_rule(nn.LayerNorm, nn.RMSNorm)
def over_the_last_dimensions(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.LayerNorm` and `nn.RMSNorm`."""
    return _rule(layer, inputs, neutral_weight=1.0)


@register_rule(nn.GroupNorm)
def group_norm(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.GroupNorm`: channels in dimension 1."""
    return _rule(layer, inputs, neutral_weight=1.0, channels=1)


@register_rule("transformers.models.*RMSNorm", "transformers.models.*T5LayerNorm")
def hugging_face(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """Hugging Face's RMSNorms: some scale by w (Llama, T5), others by 1 + w (Gemma); the first call tests which.

    One that computes something else takes the generic rule.
    """
    x = inputs.input
    if "neutral_weight" not in inputs.cache:
        only_weight = set(dict(layer.named_parameters())) == {"weight"}
        inputs.cache["neutral_weight"] = _neutral_weight(layer, x) if only_weight and x.dim() else None
    neutral_weight = inputs.cache["neutral_weight"]
    if len(inputs.args) + len(inputs.kwargs) != 1 or neutral_weight is None:
        return generic(layer, inputs)
    return _rule(layer, inputs, neutral_weight=neutral_weight)


def _rule(layer: nn.Module, inputs: LayerInputs, *, neutral_weight: float, channels: int | None = None) -> RuleOutput:
    trainable = inputs.trainable

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        parameter_dims = layer.get_parameter("weight").dim()
        grad, found = upcast(grad), dict[str, Gradient]()

        def summed(values: Tensor) -> PerSampleGrad:
            """Sum over all dimensions except the batch and those of the parameter."""
            values = values if channels is None else values.movedim(channels, -1)
            return PerSampleGrad(values.reshape(len(values), -1, *values.shape[values.dim() - parameter_dims :]).sum(1))

        if "weight" in trainable:
            found["weight"] = summed(grad * _run(layer, upcast(saved[0]), neutral_weight))
        if "bias" in trainable:
            found["bias"] = summed(grad)
        return found

    saved = (inputs.input,) if "weight" in trainable else ()
    return RuleOutput(inputs.args, inputs.kwargs, saved, per_example_grads)


def _run(layer: nn.Module, x: Tensor, weight: float | Tensor) -> Tensor:
    """The layer's output for x with another weight and no bias."""
    forward: Any = type(layer).forward
    parameters = {
        name: torch.zeros_like(p, dtype=x.dtype) if name == "bias" else x.new_ones(p.shape) * weight
        for name, p in layer.named_parameters()
    }
    with swapped_parameters(layer, parameters):
        return forward(layer, x)


def _neutral_weight(layer: nn.Module, x: Tensor) -> float | None:
    """The weight w0 at which the layer returns x_hat, if it returns x_hat (1 + w - w0) for any w; else None."""
    if not has_values(x):
        return 1.0
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        options: Any = {"dtype": upcast(x[:0]).dtype, "device": x.device}
        sample = torch.linspace(-1, 2, x.shape[-1], **options)[None]  # (1, d), independent of the batch
        weight = torch.linspace(0.5, 1.5, x.shape[-1], **options)
        y = _run(layer, sample, weight)
        for neutral in (1.0, 0.0):
            if torch.allclose(_run(layer, sample, neutral) * (1.0 + weight - neutral), y, rtol=1e-5, atol=1e-5):
                return neutral
    return None
