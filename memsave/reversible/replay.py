"""Evaluating a branch a second time exactly as the first time.

A branch reads more than its input: random numbers, the autocast state, and buffers that it updates (BatchNorm's
statistics, the vectors of a spectral norm). `Replay` notes these before the first evaluation, keeps only what the
branch turned out to use, and re-enters them for the second one; what the second evaluation would change in the world
outside (the global random stream, the buffers) is put back when it ends.

Parameters are not copied. If one was changed in place in between, the branch cannot be evaluated as it was, and
`Replay` says so, as autograd itself would.
"""

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import Branch


class Replay:
    """What one evaluation of `branch` at a tensor on `device` read besides its input."""

    def __init__(self, branch: Branch, *, name: str, device: torch.device):
        """Take the notes; call it just before the first evaluation, and `settle` just after."""
        self.branch = branch
        self.name = name
        device_types = dict.fromkeys(("cpu", device.type))  # ordered and without a double
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in device_types
            if torch.amp.is_autocast_available(kind)
        ]
        devices = [torch.device("cpu")] if device.type in ("cpu", "meta") else [torch.device("cpu"), device]
        self.random = [(where, random_state(where)) for where in devices]
        self.parameters = [(p, p._version) for p in branch.parameters()] if isinstance(branch, nn.Module) else []
        self.buffers = [
            (module, key, buffer._version, buffer.clone()) for module, key, buffer in training_buffers(branch)
        ]

    def settle(self) -> None:
        """Keep only what the first evaluation used: most branches draw no numbers and update no buffers."""
        self.random = [(where, was) for where, was in self.random if as_bytes(was) != as_bytes(random_state(where))]
        self.buffers = [
            (module, key, version, was)
            for module, key, version, was in self.buffers
            # BatchNorm's kernel moves its statistics past the version counter; to compare values would wait for a GPU.
            if was.is_floating_point() or getattr(module, key)._version != version
        ]

    def evaluate(self, x: Tensor) -> Tensor:
        """Return branch(x), in the state of the first evaluation; RuntimeError when a parameter has changed since."""
        for parameter, version in self.parameters:
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} of {self.name} was changed in place between "
                    f"forward and backward, so its activations cannot be rebuilt; run backward before the optimizer's "
                    f"step"
                )
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # No cache: it would keep every weight's low-precision copy alive until backward ends.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(self._random_state_as_it_was())
            stack.enter_context(self._buffers_as_they_were())
            return self.branch(x)

    @contextmanager
    def _random_state_as_it_was(self) -> Iterator[None]:
        now = [(where, random_state(where)) for where, _ in self.random]
        try:
            for where, state in self.random:
                set_random_state(where, state)
            yield
        finally:
            for where, state in now:
                set_random_state(where, state)

    @contextmanager
    def _buffers_as_they_were(self) -> Iterator[None]:
        now = [(module, key, module._buffers[key]) for module, key, _, _ in self.buffers]
        try:
            for module, key, _, was in self.buffers:
                module._buffers[key] = was.clone()  # the replay updates this copy; the notes stay good for another
            yield
        finally:
            for module, key, buffer in now:
                module._buffers[key] = buffer


def training_buffers(branch: Branch) -> list[tuple[nn.Module, str, Tensor]]:
    """The buffers that a forward may update: those of modules in training mode."""
    modules = branch.modules() if isinstance(branch, nn.Module) else ()
    return [
        (module, key, buffer)
        for module in modules
        if module.training
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]


def random_state(device: torch.device) -> Tensor:
    """The state of the device's default generator, as a uint8 tensor on the CPU."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put the device's default generator into `state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def as_bytes(state: Tensor) -> bytes:
    """The tensor's bytes, read past the dispatcher: generator states are real tensors even among fake ones."""
    return ctypes.string_at(state.data_ptr(), state.numel())
