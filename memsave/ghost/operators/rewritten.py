"""Operators that are written as simpler operators, which have rules themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memsave.ghost.operators.general import example_by_example
from memsave.ghost.operators.rule import Operator, operator_rule
from memsave.ghost.refusals import LayerRefused

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace


@operator_rule("layer_norm rms_norm group_norm instance_norm batch_norm")
def normalisation(trace: OperatorTrace, operator: Operator) -> Any:
    """x_hat w + b, with x_hat from the operator without its weight and bias."""
    places = {"instance_norm": (3, 4), "batch_norm": (3, 4), "rms_norm": (2, None)}
    at_weight, at_bias = places.get(operator.name, (2, 3))
    if operator.name in ("instance_norm", "batch_norm") and len(operator.args) > 8:  # those of torch, not of functional
        return _with_weight_first(trace, operator)
    x = operator.argument(0, "input")
    if trace.provenance(x) is None:
        return example_by_example(trace, operator)
    if operator.name == "batch_norm" and operator.argument(5, "training", default=False):
        raise LayerRefused("belongs to a batch normalisation, which mixes examples", "use a GroupNorm, or eval mode")
    weight = operator.argument(at_weight, "weight")
    bias = None if at_bias is None else operator.argument(at_bias, "bias")
    args = [None if place in (at_weight, at_bias) else each for place, each in enumerate(operator.args)]
    kwargs = {key: each for key, each in operator.kwargs.items() if key not in ("weight", "bias")}
    by_channel = operator.name not in ("layer_norm", "rms_norm")
    with trace:
        y = operator.function(*args, **kwargs)
        if weight is not None:
            y = y * (_along_channels(weight, y) if by_channel else weight)
        if bias is not None:
            y = y + (_along_channels(bias, y) if by_channel else bias)
        return y


def _with_weight_first(trace: OperatorTrace, operator: Operator) -> Any:
    """`torch.batch_norm` and `torch.instance_norm`, whose weight and bias come before the statistics."""
    x, weight, bias, mean, variance, of_batch, momentum, epsilon, *_ = operator.args
    with trace:
        if operator.name == "batch_norm":
            return F.batch_norm(x, mean, variance, weight, bias, of_batch, momentum, epsilon)
        return F.instance_norm(x, mean, variance, weight, bias, of_batch, momentum, epsilon)


def _along_channels(values: Tensor, y: Tensor) -> Tensor:
    return values.view(-1, *[1] * (y.dim() - 2))


@operator_rule("prelu")
def prelu(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`F.prelu(x, weight)`."""
    x, weight = operator.argument(0, "input"), operator.argument(1, "weight")
    with trace:
        slope = weight if weight.numel() == 1 or x.dim() < 2 else _along_channels(weight, x)
        return torch.where(x >= 0, x, slope * x)


@operator_rule("grouped_mm _grouped_mm grouped_mm_fallback")
def grouped_matmul(trace: OperatorTrace, operator: Operator) -> Tensor:
    """x (S, d), sorted by expert, times the weights (E, d, p) of the experts; `offs` (E,) ends the groups."""
    x, weight = operator.argument(0, "input", "self"), operator.argument(1, "weight", "mat2")
    ends, bias = operator.argument(2, "offs"), operator.kwargs.get("bias")
    if x.dim() != 2 or weight.dim() != 3 or ends is None:
        raise LayerRefused("is used by a grouped product that is not of (S, d) and (E, d, p)", "use another product")
    parts, start = [], 0
    with trace:
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                product = x[start:end] @ weight[expert]
                parts.append(product if bias is None else product + bias[expert])
            start = end
        if start < len(x):  # rows of no expert
            parts.append(x.new_zeros(len(x) - start, weight.shape[-1]) * x[start:, :1])
        return torch.cat(parts)


@operator_rule("bilinear")
def bilinear(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`F.bilinear(x1, x2, weight, bias)`: y_o = x1' W_o x2 + b_o."""
    one, other = operator.argument(0, "input1"), operator.argument(1, "input2")
    weight = operator.argument(2, "weight")
    bias = operator.argument(3, "bias")
    with trace:
        table = weight.permute(0, 2, 1).flatten(0, 1)  # (O d2, d1)
        y = (F.linear(one, table).unflatten(-1, (weight.shape[0], weight.shape[2])) * other.unsqueeze(-2)).sum(-1)
        return y if bias is None else y + bias
