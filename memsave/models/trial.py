"""Trial forwards, which test the behaviour of a model and do not change its state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from memsave.processes import any_process, group_size, is_fully_sharded, process_count

_passed = WeakIdKeyDictionary()  # model -> {name of a check: the state in which the model passed it}


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Context manager: no gradients, eval mode (no buffer updates); restores training modes and random state."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def needed_by_any(model: nn.Module, needed: bool) -> bool:
    """Whether this process needs a trial, or any other if the model is sharded: all must then run its forwards."""
    return any_process(needed) if _is_sharded(model) else needed


def _is_sharded(model: nn.Module) -> bool:
    return any(map(is_fully_sharded, model.modules()))


def has_passed(model: nn.Module, check: str, state: Any = None) -> bool:
    """Whether this model instance passed the check in this state."""
    found = _passed.get(model, {})
    return check in found and found[check] == state


def note_passed(model: nn.Module, check: str, state: Any = None) -> None:
    """Record that this model instance passed the check in this state.

    What a process finds alone, while it evaluates its share, is not recorded for a sharded model: the others would then
    still need the trial, and wait for this process to take part.
    """
    if process_count() != group_size() and _is_sharded(model):
        return
    _passed.setdefault(model, {})[check] = state
