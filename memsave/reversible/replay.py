"""Evaluate modules a second time exactly as the first time.

A branch reads more than its input: parameters, buffers, random numbers, the autocast state, the default device,
training flags. `Replay` records these before the first evaluation, keeps what is needed, and restores them for the
second evaluation. What the second evaluation changes outside the branch (random states, buffers) is restored when it
ends.

Parameters and buffers are recorded by reference, not copied. A tensor that was *replaced* in between is put back for
the replay. A tensor that was *changed in place* cannot be restored: the replay then raises an error, as autograd does.
Only buffers that a forward updates, such as the statistics of BatchNorm, are copied. Parameters that FSDP has sharded
are left to it: it puts whole copies in their place when the second evaluation calls the branch.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from memsave.random_state import RandomSource, random_sources
from memsave.reversible._torch_internals import (
    has_running_statistics,
    is_shard,
    storage_id,
    tensor_registries,
    version_of,
)

SMALL_BUFFER = 4096  # elements; see `_may_be_updated`


class TensorState(NamedTuple):
    """A parameter or buffer before the first evaluation of a branch."""

    registry: dict[str, Any]
    """The module's dict of parameters or buffers."""
    key: str
    tensor: Tensor
    version: int | None
    storage: int
    requires_grad: bool

    @classmethod
    def of(cls, registry: dict[str, Any], key: str) -> "TensorState":
        """Record the tensor that the registry holds now."""
        tensor = registry[key]
        return cls(registry, key, tensor, version_of(tensor), storage_id(tensor), tensor.requires_grad)

    @property
    def location(self) -> tuple[int, str]:
        """Identifies the entry of the registry."""
        return id(self.registry), self.key

    def is_changed(self) -> bool:
        """Whether the tensor may hold other values than when it was recorded."""
        return version_of(self.tensor) != self.version or storage_id(self.tensor) != self.storage


class Replay:
    """The state that one evaluation of some modules, on `device`, reads besides its input."""

    def __init__(self, modules: Iterable[nn.Module], *, name: str, device: torch.device):
        """Record the state just before the first evaluation; call `finalize` just after it."""
        modules = list(modules)
        self.name = name
        self.default_device = torch.get_default_device()
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", device.type))
            if torch.amp.is_autocast_available(kind)
        ]
        self.random: list[tuple[RandomSource, Any]] = [(each, each.get()) for each in random_sources(modules, device)]
        self.training = [(module, module.training) for module in modules]
        self.changed_by_forward: set[tuple[int, str]] = set()
        """The tensors without a copy that the first evaluation itself changed, by location."""
        tensors = [
            (registry, key, is_lazy(tensor))
            for module in modules
            for registry in tensor_registries(module)
            for key, tensor in registry.items()
            if tensor is not None and not is_shard(tensor)
        ]
        self.lazy = [(registry, key) for registry, key, lazy in tensors if lazy]
        self.tensors = [TensorState.of(registry, key) for registry, key, lazy in tensors if not lazy]
        self.updated = [
            (TensorState.of(buffers, key), buffer.detach().clone(), has_running_statistics(module))
            for module in modules
            if module.training
            for buffers in tensor_registries(module)[1:]
            for key, buffer in buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]

    def finalize(self) -> None:
        """Keep what the first evaluation used: most branches draw no random numbers and update no buffers."""
        self.random = [(each, state) for each, state in self.random if not each.same(state, each.get())]
        self.updated = [entry for entry in self.updated if _may_be_updated(*entry)]
        copied = {state.location for state, _, _ in self.updated}
        self.tensors = [state for state in self.tensors if state.location not in copied]
        self.changed_by_forward = {state.location for state in self.tensors if state.is_changed()}
        # Lazy parameters have values only after the first evaluation.
        self.tensors += [TensorState.of(registry, key) for registry, key in self.lazy]

    @contextmanager
    def restored_state(self) -> Iterator[None]:
        """Context manager: the state is that of the first evaluation; RuntimeError if it cannot be restored."""
        self._check_unchanged()
        with ExitStack() as stack:
            if torch.get_default_device() != self.default_device:  # each thread of autograd has a default of its own
                stack.enter_context(self.default_device)
            for kind, enabled, dtype in self.autocast:
                # Without the cache: it would keep a low-precision copy of every weight until backward ends.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(self._restored_tensors())
            stack.enter_context(self._restored_requires_grad())
            stack.enter_context(self._restored_training())
            stack.enter_context(self._restored_random_numbers())
            yield

    def _check_unchanged(self) -> None:
        for state in self.tensors:
            if state.is_changed():
                reason = (
                    "by its own forward in evaluation mode, so its activations cannot be rebuilt; give it train(), or "
                    "set recompute=False"
                    if state.location in self.changed_by_forward
                    else "between forward and backward, so its activations cannot be rebuilt; run backward before the "
                    "optimizer's step"
                )
                raise RuntimeError(
                    f"{state.key} of shape {tuple(state.tensor.shape)} in {self.name} was changed in place {reason}"
                )

    @contextmanager
    def _restored_random_numbers(self) -> Iterator[None]:
        current = [(each, each.get()) for each, _ in self.random]
        try:
            for each, state in self.random:
                each.set(state)
            yield
        finally:
            for each, state in current:
                each.set(state)

    @contextmanager
    def _restored_tensors(self) -> Iterator[None]:
        wanted = [(state.registry, state.key, state.tensor) for state in self.tensors]
        # The replay updates a copy of the copied buffer, so that the copy serves another replay.
        wanted += [(state.registry, state.key, copy.clone()) for state, copy, _ in self.updated]
        replaced = [(registry, key, registry.get(key)) for registry, key, t in wanted if registry.get(key) is not t]
        try:
            for registry, key, tensor in wanted:
                registry[key] = tensor
            yield
        finally:
            for registry, key, current in replaced:
                registry[key] = current

    @contextmanager
    def _restored_requires_grad(self) -> Iterator[None]:
        """Restore `requires_grad` of leaves: some programs freeze parts of a model between forward and backward."""
        changed = [s for s in self.tensors if s.tensor.is_leaf and s.tensor.requires_grad != s.requires_grad]
        try:
            for state in changed:
                state.tensor.requires_grad_(state.requires_grad)
            yield
        finally:
            for state in changed:
                state.tensor.requires_grad_(not state.requires_grad)

    @contextmanager
    def _restored_training(self) -> Iterator[None]:
        changed = [(module, module.training) for module, flag in self.training if module.training != flag]
        try:
            for module, flag in changed:
                module.training = not flag
            yield
        finally:
            for module, flag in changed:
                module.training = flag


def _may_be_updated(state: TensorState, copy: Tensor, running_statistics: bool) -> bool:
    """Whether the first evaluation may have updated this buffer.

    The kernels of BatchNorm and InstanceNorm update their statistics without the version counter, and so do other
    modules that call these kernels. Comparing values would synchronise with the GPU. Therefore small buffers are always
    replayed from their copy.
    """
    replaced = state.registry.get(state.key) is not state.tensor
    return state.is_changed() or replaced or running_statistics or copy.numel() <= SMALL_BUFFER
