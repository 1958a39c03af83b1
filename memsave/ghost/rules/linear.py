"""Linear layers: y = x W' + b, with x (B, ..., d) and y (B, ..., p).

dL_b/dW = sum_t g_bt (x) a_bt        dL_b/db = sum_t g_bt
"""

from torch import Tensor, nn

from memsave.ghost.gradients import Dense, Gradient, Outer, wide
from memsave.ghost.refusals import Refused
from memsave.ghost.rules import Given, Use, register


def places(tensor: Tensor) -> Tensor:
    """(B, ..., d) as (B, T, d)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _use(given: Given, *, transposed: bool) -> Use:
    wanted = given.wanted
    if given.first.dim() < 2:
        raise Refused(
            f"got an input of shape {tuple(given.first.shape)}, which has no batch", "give it two dimensions or more"
        )

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        g, found = places(grad), dict[str, Gradient]()  # (B, T, p)
        if "weight" in wanted:
            found["weight"] = Outer(g, places(saved[0]), rows=g.shape[-1], transposed=transposed)
        if "bias" in wanted:
            found["bias"] = Dense(wide(g).sum(1))
        return found

    return Use(given.args, given.kwargs, (given.first,) if "weight" in wanted else (), per_example)


@register(nn.Linear)
def linear(layer: nn.Module, given: Given) -> Use:
    """`nn.Linear`: weight (p, d)."""
    return _use(given, transposed=False)


@register("transformers.pytorch_utils.Conv1D")
def conv1d(layer: nn.Module, given: Given) -> Use:
    """GPT-2's linear layer: weight (d, p)."""
    return _use(given, transposed=True)
