"""Normalisations with an affine end, y = x_hat w + b.

dL_b/dw = sum_t g_bt x_hat_bt        dL_b/db = sum_t g_bt

x_hat is what the layer itself gives for w = 1 and b = 0: formed in backward, so that nothing is saved but the input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Dense, Gradient, has_values, wide
from memsave.ghost.rules import Given, Use, register
from memsave.ghost.rules.generic import generic, replaced


@register(nn.LayerNorm, nn.RMSNorm)
def over_the_last_dimensions(layer: nn.Module, given: Given) -> Use:
    """`nn.LayerNorm` and `nn.RMSNorm`."""
    return _use(layer, given, neutral=1.0)


@register(nn.GroupNorm)
def group_norm(layer: nn.Module, given: Given) -> Use:
    """`nn.GroupNorm`: channels in dimension 1."""
    return _use(layer, given, neutral=1.0, channels=1)


@register("transformers.models.*RMSNorm", "transformers.models.*T5LayerNorm")
def hugging_face(layer: nn.Module, given: Given) -> Use:
    """Hugging Face's RMSNorms: some scale by w (Llama, T5), some by 1 + w (Gemma), which the first call finds out.

    Any that does something else takes the generic rule.
    """
    x = given.first
    if "neutral" not in given.notes:
        only_weight = set(dict(layer.named_parameters())) == {"weight"}
        given.notes["neutral"] = _neutral(layer, x) if only_weight and x.dim() else None
    neutral = given.notes["neutral"]
    alone = len(given.args) + len(given.kwargs) == 1
    return _use(layer, given, neutral=neutral) if alone and neutral is not None else generic(layer, given)


def _use(layer: nn.Module, given: Given, *, neutral: float, channels: int | None = None) -> Use:
    wanted = given.wanted

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        own = layer.get_parameter("weight").dim()
        grad, found = wide(grad), dict[str, Gradient]()

        def summed(values: Tensor) -> Dense:
            """Over all dimensions but the batch and the parameter's own."""
            values = values if channels is None else values.movedim(channels, -1)
            return Dense(values.reshape(len(values), -1, *values.shape[values.dim() - own :]).sum(1))

        if "weight" in wanted:
            found["weight"] = summed(grad * _normal(layer, wide(saved[0]), neutral))
        if "bias" in wanted:
            found["bias"] = summed(grad)
        return found

    return Use(given.args, given.kwargs, (given.first,) if "weight" in wanted else (), per_example)


def _normal(layer: nn.Module, x: Tensor, weight: float | Tensor) -> Tensor:
    """The layer's function of x with another weight and no bias."""
    forward: Any = type(layer).forward
    parameters = {
        name: torch.zeros_like(p, dtype=x.dtype) if name == "bias" else x.new_ones(p.shape) * weight
        for name, p in layer.named_parameters()
    }
    with replaced(layer, parameters):
        return forward(layer, x)


def _neutral(layer: nn.Module, x: Tensor) -> float | None:
    """The weight at which the layer gives x_hat, where it gives x_hat times (1 + weight - that); else None."""
    if not has_values(x):
        return 1.0
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        options: Any = {"dtype": wide(x[:0]).dtype, "device": x.device}
        probe = torch.linspace(-1, 2, x.shape[-1], **options)[None]  # (1, d), whatever the batch is
        weight = torch.linspace(0.5, 1.5, x.shape[-1], **options)
        y = _normal(layer, probe, weight)
        for neutral in (1.0, 0.0):
            if torch.allclose(_normal(layer, probe, neutral) * (1.0 + weight - neutral), y, rtol=1e-5, atol=1e-5):
                return neutral
    return None
