"""Linear layers: y = x W' + b, with x (B, ..., d) and y (B, ..., p).

dL_b/dW = sum_t g_bt (x) a_bt        dL_b/db = sum_t g_bt
"""

from typing import Any

from torch import Tensor, nn

from memsave.ghost.gradients import Dense, Gradient, Outer, wide
from memsave.ghost.rules import Use, first_argument, register


def places(tensor: Tensor) -> Tensor:
    """(B, ..., d) as (B, T, d)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _use(transposed: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Use:
    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        a, g = places(saved[0]), places(grad)  # (B, T, d), (B, T, p)
        weight = Outer(g, a, rows=g.shape[-1], transposed=transposed)
        return {"weight": weight, "bias": Dense(wide(g).sum(1))}

    return Use(args, (first_argument(args, kwargs),), per_example, kwargs)


@register(nn.Linear)
def linear(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """`nn.Linear`: weight (p, d)."""
    return _use(False, args, kwargs)


@register("transformers.pytorch_utils.Conv1D")
def conv1d(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """GPT-2's linear layer: weight (d, p)."""
    return _use(True, args, kwargs)
