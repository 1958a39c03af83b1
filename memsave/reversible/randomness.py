"""Where a branch may draw random numbers from: PyTorch's generators, Python's and NumPy's."""

import ctypes
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Source(NamedTuple):
    """One stream of random numbers, as the state that it is in."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    same: Callable[[Any, Any], bool]


def sources_of(modules: Iterable[nn.Module], device: torch.device) -> Iterator[Source]:
    """The default generators of the CPU and of `device`, those that the modules own, Python's and NumPy's."""
    yield default_source(torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        yield default_source(device)
    for module in modules:
        for value in vars(module).values():
            yield from _owned(value)
    yield Source(random.getstate, random.setstate, _equal)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield Source(numpy.random.get_state, numpy.random.set_state, _same_numpy)


def _owned(value: Any) -> Iterator[Source]:
    """The generator that an attribute is, or those in a list or dictionary."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        yield Source(value.get_state, _setter(value), _same_tensor)
    elif isinstance(value, random.Random):
        yield Source(value.getstate, value.setstate, _equal)
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        yield Source(value.get_state, value.set_state, _same_numpy)
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        yield Source(
            lambda: pickle.dumps(bits.state), lambda state: setattr(bits, "state", pickle.loads(state)), _equal
        )
    elif type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _owned(each)


def default_source(device: torch.device) -> Source:
    """The device's default generator."""
    if device.type == "cpu":
        return Source(torch.get_rng_state, torch.set_rng_state, _same_tensor)
    module = torch.get_device_module(device)
    return Source(lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device), _same_tensor)


def _setter(generator: torch.Generator) -> Callable[[Tensor], None]:
    def put(state: Tensor) -> None:
        generator.set_state(state)

    return put


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Equal bytes, read past the dispatcher: generator states are real tensors even among fake ones."""
    first, second = (ctypes.string_at(state.data_ptr(), state.numel()) for state in (one, other))
    return first == second


def _equal(one: Any, other: Any) -> bool:
    return one == other


def _same_numpy(one: tuple, other: tuple) -> bool:
    return one[2:] == other[2:] and one[1].tobytes() == other[1].tobytes()
