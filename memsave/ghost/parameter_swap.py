"""Run a layer with other tensors in place of its parameters."""

import threading
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from memsave.ghost._torch_internals import own_children, own_parameters

_thread = threading.local()


def parameters_are_swapped() -> bool:
    """Whether a layer with swapped parameters runs in this thread: the layers inside it are part of it."""
    return getattr(_thread, "depth", 0) > 0


class swapped_parameters:
    """Context manager: inside, the layer has these tensors in place of its parameters, by their names below the layer.

    None in place of a tensor is a parameter that the layer does not have, such as the bias of a layer without one.
    """

    def __init__(self, layer: nn.Module, tensors: dict[str, Tensor] | dict[str, Tensor | None]) -> None:
        slots: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for name, tensor in tensors.items():
            path, _, key = name.rpartition(".")
            slots.append((own_parameters(layer.get_submodule(path) if path else layer), key, tensor))
        by_parameter = {id(registry[key]): tensor for registry, key, tensor in slots}
        modules: Iterable[nn.Module] = layer.modules() if any(own_children(layer)) else (layer,)
        for module in modules:  # a parameter may have several names
            for key, p in own_parameters(module).items():
                if id(p) in by_parameter:
                    slots.append((own_parameters(module), key, by_parameter[id(p)]))
        self._slots = slots

    def __enter__(self) -> None:
        self._before = [(registry, key, registry[key]) for registry, key, _ in self._slots]
        _thread.depth = getattr(_thread, "depth", 0) + 1
        for registry, key, tensor in self._slots:
            registry[key] = tensor

    def __exit__(self, *_: Any) -> None:
        _thread.depth -= 1
        for registry, key, tensor in self._before:
            registry[key] = tensor
