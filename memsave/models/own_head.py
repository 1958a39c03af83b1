"""The output head of a causal language model and its input, found by running the model's forward.

During the forward the head returns a stand-in for the logits, which records what the model does to its logits
(`stand_in.py`). A short forward with real logits must confirm the result once for each model, because the model may
treat logits of another length differently.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost.gradients import has_values, upcast
from memsave.models.padding import base_of
from memsave.models.stand_in import CAPS, FACTORS, REMEDY, Change, StandIn, change_of, close, named
from memsave.models.trial import has_passed, note_passed, trial
from memsave.processes import class_of

TRIAL_LENGTH = 16  # tokens of the forward with real logits


def own_head(model: Any, inputs: dict[str, Any]) -> tuple[nn.Linear, Tensor, float | None]:
    """(the head, its input (B, T, d) times the factor of the logits, their soft cap); ValueError if it is not exact.

    With virtual tokens of PEFT, the input has their positions, too: (B, V + T, d).
    """
    linear = _trained(model.get_output_embeddings())
    name = f"the head of {class_of(base_of(model)).__name__}"
    if class_of(linear) is not nn.Linear:
        of_peft = "Linear of PEFT" if isinstance(linear, nn.Module) and hasattr(linear, "base_layer") else ""
        raise ValueError(f"{name} is a {of_peft or class_of(linear).__name__} and no Linear; {REMEDY}")
    config = getattr(model, "config", None)
    state = (named(config, FACTORS), named(config, CAPS))
    confirmed = has_passed(model, "head", state)
    real = None if confirmed else _real_logits(model, linear, inputs, name)
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


def _trained(head: Any) -> Any:
    """The head itself, or the copy that PEFT trains if the head is in `modules_to_save`."""
    copies = getattr(head, "modules_to_save", None)
    return copies[head.active_adapters[0]] if copies and len(head.active_adapters) == 1 else head


def _hidden(model: Any, linear: nn.Linear, inputs: dict[str, Any], name: str) -> tuple[Tensor, Any]:
    """(the input of the head, the model's logits, which are derived from the stand-in)."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        if has_values(hidden):
            return StandIn.of(hidden, name, vocabulary=len(linear.weight))
        first = hidden[:1, :1]  # an encoder-decoder may add a bias of the size of the vocabulary
        return first[..., :1].expand(-1, -1, len(linear.weight)) if "decoder_input_ids" in inputs else first

    with replaced_forward(linear, forward):
        logits = model(**inputs, use_cache=False).logits
    return _once(seen, name), logits


def _real_logits(model: Any, linear: nn.Linear, inputs: dict[str, Any], name: str) -> tuple[Tensor, Tensor] | None:
    """(output of the head, the model's logits) for the start of the first example; None if it has no values."""
    ids = {key: inputs[key][:1, :TRIAL_LENGTH] for key in ("input_ids", "decoder_input_ids") if key in inputs}
    start = ids["input_ids"]
    if not has_values(start) or not start.numel():
        return None
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(F.linear(hidden, linear.weight, linear.bias))
        return seen[-1].clone()

    with trial(model), replaced_forward(linear, forward):
        logits = model(**ids, attention_mask=torch.ones_like(start), use_cache=False).logits
    return _once(seen, name), logits


def _confirm(change: Change, given: Tensor, logits: Tensor, *, name: str) -> None:
    """Raise ValueError unless the model's logits are `change` of the head's output."""
    eps = max(torch.finfo(each.dtype).eps for each in (given, logits))
    if given.shape != logits.shape:
        raise ValueError(
            f"{name} returns logits {tuple(given.shape)}, and the model returns {tuple(logits.shape)}; {REMEDY}"
        )
    if not bool(close(upcast(logits), change(upcast(given)), eps)):
        raise ValueError(f"for real tokens the model's logits are not those of {name} after {change}; {REMEDY}")


def _assumed(config: Any) -> Change:
    """The change under FakeTensorMode, where values are unknown and only the shapes and sizes matter."""
    return Change(1.0, next(iter(named(config, CAPS)), None))


def _once(seen: list[Tensor], name: str) -> Tensor:
    if len(seen) != 1:
        raise ValueError(f"{name} ran {len(seen)} times in a forward, not once; {REMEDY}")
    return seen[0]


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Context manager: replaces the module's forward, also one that a clipper has set on the instance."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
