"""Which GhostClipper clips a parameter: lets a function of the parameter, such as a loss, find the clipper."""

from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from memsave.ghost._torch_internals import WeakIdKeyDictionary

_owners = WeakIdKeyDictionary()  # parameter to a weak reference to its clipper


def set_owner(clipper: Any, parameters: Iterable[Tensor]) -> None:
    """Record that the clipper clips the gradients of these parameters."""
    reference = ref(clipper)
    for parameter in parameters:
        _owners[parameter] = reference


def clear_owner(clipper: Any) -> None:
    """Record that the clipper clips nothing any more."""
    for parameter in [p for p, owner in _owners.items() if owner() in (None, clipper)]:
        del _owners[parameter]


def clipper_of(parameter: Tensor) -> Any:
    """The clipper of the parameter, or None."""
    owner: ReferenceType | None = _owners.get(parameter)
    return None if owner is None else owner()
