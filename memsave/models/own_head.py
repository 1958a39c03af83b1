"""The head of a causal language model and what it is given, by the model's own forward.

In the place of logits the forward gets numbers that tell what the model does to its logits (`stand_in.py`). Once for
each model a short forward of real numbers must confirm it: numbers of another length may be treated otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost.gradients import has_values, upcast
from memsave.models.stand_in import CAPS, FACTORS, REMEDY, Change, StandIn, change_of, close, named
from memsave.models.trial import has_passed, note_passed, trial

SHORT = 16  # positions of the forward of real numbers


def own_head(model: Any, inputs: dict[str, Any]) -> tuple[nn.Linear, Tensor, float | None]:
    """(the head, what it is given (B, T, d) times what its logits are scaled by, their soft cap)."""
    linear = model.get_output_embeddings()
    name = f"the head of {type(model).__name__}"
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name} is a {type(linear).__name__} and no Linear; {REMEDY}")
    config = getattr(model, "config", None)
    state = (named(config, FACTORS), named(config, CAPS))
    confirmed = has_passed(model, "head", state)
    real = None if confirmed else _real_numbers(model, linear, inputs["input_ids"], name)
    hidden, logits = _hidden(model, linear, inputs, name)
    change = change_of(logits, model, name) if has_values(hidden) else _assumed(config)
    if real is not None:
        _confirm(change, *real, name=name)
        note_passed(model, "head", state)
    if change.factor == 1:
        return linear, hidden, change.cap
    if linear.bias is not None:
        raise ValueError(f"{name} has a bias, and its logits are scaled by {change.factor:g}; {REMEDY}")
    return linear, hidden * change.factor, change.cap


def _hidden(model: Any, linear: nn.Linear, inputs: dict[str, Any], name: str) -> tuple[Tensor, Any]:
    """(what the head was given, what became of the numbers in the place of its logits)."""
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return StandIn.of(hidden, name) if has_values(hidden) else hidden[:1, :1]

    with _forward_as(linear, note):
        logits = model(**inputs, use_cache=False).logits
    return _once(seen, name), logits


def _real_numbers(model: Any, linear: nn.Linear, input_ids: Tensor, name: str) -> tuple[Tensor, Tensor] | None:
    """(what the head gave, the model's logits) for the start of the first example; None where there is none."""
    start = input_ids[:1, :SHORT]
    if not has_values(start) or not start.numel():
        return None
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(F.linear(hidden, linear.weight, linear.bias))
        return seen[-1].clone()

    with trial(model), _forward_as(linear, note):
        logits = model(input_ids=start, attention_mask=torch.ones_like(start), use_cache=False).logits
    return _once(seen, name), logits


def _confirm(change: Change, given: Tensor, logits: Tensor, *, name: str) -> None:
    """The model's logits must be those of its head, changed."""
    eps = max(torch.finfo(each.dtype).eps for each in (given, logits))
    if given.shape != logits.shape:
        raise ValueError(
            f"{name} gives logits {tuple(given.shape)}, and the model makes {tuple(logits.shape)} of them; {REMEDY}"
        )
    if not bool(close(upcast(logits), change(upcast(given)), eps)):
        raise ValueError(f"on a text the model's logits are not those of {name} after {change}; {REMEDY}")


def _assumed(config: Any) -> Change:
    """The change of logits that have no values, whose size is all that counts."""
    return Change(1.0, next(iter(named(config, CAPS)), None))


def _once(seen: list[Tensor], name: str) -> Tensor:
    if len(seen) != 1:
        raise ValueError(f"{name} ran {len(seen)} times in a forward, not once; {REMEDY}")
    return seen[0]


@contextmanager
def _forward_as(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within, the module has another forward, in the place of its own or of a clipper's."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
