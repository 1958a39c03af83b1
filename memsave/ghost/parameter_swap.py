"""Run a layer with other tensors in place of its parameters."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from memsave.ghost._torch_internals import own_parameters

_thread = threading.local()


def parameters_are_swapped() -> bool:
    """Whether a layer with swapped parameters runs in this thread: the layers inside it are part of it."""
    return getattr(_thread, "depth", 0) > 0


@contextmanager
def swapped_parameters(layer: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the layer has these tensors in place of its parameters, by their names below the layer."""
    slots: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        slots.append((own_parameters(layer.get_submodule(path)), key, tensor))
    by_parameter = {id(registry[key]): tensor for registry, key, tensor in slots}
    all_names = [  # a parameter may have several names
        (own_parameters(module), key, by_parameter[id(p)])
        for module in layer.modules()
        for key, p in own_parameters(module).items()
        if id(p) in by_parameter
    ]
    slots = [*all_names, *slots]
    before: list[tuple[dict[str, Any], str, Any]] = [(registry, key, registry[key]) for registry, key, _ in slots]
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        for registry, key, tensor in slots:
            registry[key] = tensor
        yield
    finally:
        _thread.depth -= 1
        for registry, key, tensor in before:
            registry[key] = tensor
