"""Forwards that only look at what a model does, and leave nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_passed = WeakIdKeyDictionary()  # model to {name of a check: the state in which the model passed it}


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Within, no gradients and eval mode, in which no buffer changes; the random state and the modes come back."""
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


def has_passed(model: nn.Module, check: str, state: Any = None) -> bool:
    """Whether this instance has passed the check in this state."""
    found = _passed.get(model, {})
    return check in found and found[check] == state


def note_passed(model: nn.Module, check: str, state: Any = None) -> None:
    """Remember that it has."""
    _passed.setdefault(model, {})[check] = state
