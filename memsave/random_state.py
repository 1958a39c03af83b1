"""Read, restore and compare the state of random number generators: PyTorch's, Python's and NumPy's.

Imports torch alone. `memsave.reversible` replays a branch with the random numbers of its first evaluation, and
`memsave.training` stores the generators of a run in its checkpoints.
"""

import ctypes
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RandomSource(NamedTuple):
    """One random number generator, by the functions that read, set and compare its state."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    same: Callable[[Any, Any], bool]


class RandomSnapshot:
    """The states of all default generators at construction: PyTorch's (CPU and `device`), Python's and NumPy's."""

    def __init__(self, device: torch.device):
        self.sources = list(random_sources([], device))
        self.start = self.current()

    def current(self) -> list[Any]:
        """The current state of each generator."""
        return [source.get() for source in self.sources]

    def restore(self) -> None:
        """Set each generator to its state at construction."""
        for source, state in zip(self.sources, self.start, strict=True):
            source.set(state)

    def same(self, states: list[Any], others: list[Any]) -> bool:
        """Whether two results of `current` are equal."""
        return all(source.same(a, b) for source, a, b in zip(self.sources, states, others, strict=True))


def get_random_state(model: nn.Module) -> dict[str, Tensor]:
    """The states of the default generators of the CPU and of the model's device: uint8 CPU tensors by device type."""
    devices = (torch.device("cpu"), next(model.parameters()).device)
    return {device.type: default_source(device).get() for device in devices}


def set_random_state(model: nn.Module, states: dict[str, Tensor]) -> None:
    """Restore the result of `get_random_state`; a state for a device type that the model is not on is ignored."""
    default_source(torch.device("cpu")).set(states["cpu"])
    device = next(model.parameters()).device
    if device.type != "cpu" and device.type in states:
        default_source(device).set(states[device.type])


def random_sources(modules: Iterable[nn.Module], device: torch.device) -> Iterator[RandomSource]:
    """The default generators (CPU, `device`, Python, NumPy) and all generators stored as attributes of the modules."""
    yield default_source(torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        yield default_source(device)
    for module in modules:
        for value in vars(module).values():
            yield from _sources_in(value)
    yield RandomSource(random.getstate, random.setstate, _equal)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield RandomSource(numpy.random.get_state, numpy.random.set_state, _same_numpy)


def default_source(device: torch.device) -> RandomSource:
    """PyTorch's default generator of the device."""
    if device.type == "cpu":
        return RandomSource(torch.get_rng_state, torch.set_rng_state, _same_tensor)
    module = torch.get_device_module(device)
    return RandomSource(
        lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device), _same_tensor
    )


def _sources_in(value: Any) -> Iterator[RandomSource]:
    """The generator that `value` is, or the generators inside a list, tuple or dict."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        yield RandomSource(value.get_state, _setter(value), _same_tensor)
    elif isinstance(value, random.Random):
        yield RandomSource(value.getstate, value.setstate, _equal)
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        yield RandomSource(value.get_state, value.set_state, _same_numpy)
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        yield RandomSource(
            lambda: pickle.dumps(bits.state), lambda state: setattr(bits, "state", pickle.loads(state)), _equal
        )
    elif type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _sources_in(each)


def _setter(generator: torch.Generator) -> Callable[[Tensor], None]:
    def set_state(state: Tensor) -> None:
        generator.set_state(state)

    return set_state


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Compare the bytes directly: under FakeTensorMode generator states are real, but torch.equal returns no value."""
    first, second = (ctypes.string_at(state.data_ptr(), state.numel()) for state in (one, other))
    return first == second


def _equal(one: Any, other: Any) -> bool:
    return one == other


def _same_numpy(one: tuple, other: tuple) -> bool:
    return one[2:] == other[2:] and one[1].tobytes() == other[1].tobytes()
