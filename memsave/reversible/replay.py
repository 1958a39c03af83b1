"""Evaluating modules a second time exactly as the first time.

A branch reads more than its input: parameters, buffers, random numbers, the autocast state, training flags. `Replay`
notes these before the first evaluation, keeps only what is needed, and re-enters them for the second one; what the
second evaluation would change in the world outside (random streams, buffers) is put back when it ends.

Parameters and buffers are noted, not copied. One that was *replaced* in between is put back for the replay; one that
was *changed in place* cannot be, and is answered with an error, as autograd itself would. Copies are made of those
buffers alone that a forward updates, such as BatchNorm's statistics.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from memsave.reversible.coupling import version_of
from memsave.reversible.randomness import Source, sources_of

SMALL = 4096  # elements; see `_is_updated`


class Note(NamedTuple):
    """A parameter or buffer as a branch first saw it."""

    registry: dict[str, Any]
    """The module's `_parameters` or `_buffers`."""
    key: str
    tensor: Tensor
    version: int | None
    storage: int
    needs_grad: bool

    @classmethod
    def of(cls, registry: dict[str, Any], key: str) -> "Note":
        """Take the note."""
        tensor = registry[key]
        storage = tensor.untyped_storage()._cdata
        return cls(registry, key, tensor, version_of(tensor), storage, tensor.requires_grad)

    def changed(self) -> bool:
        """Whether the tensor's values may differ from those noted."""
        return version_of(self.tensor) != self.version or self.tensor.untyped_storage()._cdata != self.storage


class Replay:
    """What one evaluation of some modules at a tensor on `device` read besides its input."""

    def __init__(self, modules: Iterable[nn.Module], *, name: str, device: torch.device):
        """Take the notes; call it just before the first evaluation, and `settle` just after."""
        modules = list(modules)
        self.name = name
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", device.type))
            if torch.amp.is_autocast_available(kind)
        ]
        self.random: list[tuple[Source, Any]] = [(each, each.get()) for each in sources_of(modules, device)]
        self.training = [(module, module.training) for module in modules]
        self.own: set[tuple[int, str]] = set()
        """What the first evaluation itself changed, past the copies."""
        registries = [(module, registry) for module in modules for registry in (module._parameters, module._buffers)]
        self.lazy = [
            (r, key) for _, r in registries for key, tensor in r.items() if tensor is not None and is_lazy(tensor)
        ]
        self.notes = [
            Note.of(registry, key)
            for _, registry in registries
            for key, tensor in registry.items()
            if tensor is not None and not is_lazy(tensor)
        ]
        self.updated = [
            (Note.of(module._buffers, key), buffer.detach().clone(), isinstance(module, _NormBase))
            for module in modules
            if module.training
            for key, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]

    def settle(self) -> None:
        """Keep only what the first evaluation used: most branches draw no numbers and update no buffers."""
        self.random = [(each, was) for each, was in self.random if not each.same(was, each.get())]
        self.updated = [entry for entry in self.updated if _is_updated(*entry)]
        ours = {(id(note.registry), note.key) for note, _, _ in self.updated}
        self.notes = [note for note in self.notes if (id(note.registry), note.key) not in ours]
        self.own = {(id(note.registry), note.key) for note in self.notes if note.changed()}
        self.notes += [Note.of(registry, key) for registry, key in self.lazy]  # these have become tensors only now

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, the state is that of the first evaluation; RuntimeError when that cannot be had again."""
        for note in self.notes:
            if note.changed():
                why = (
                    "by its own forward in evaluation mode, so its activations cannot be rebuilt; give it train(), or "
                    "set recompute=False"
                    if (id(note.registry), note.key) in self.own
                    else "between forward and backward, so its activations cannot be rebuilt; run backward before the "
                    "optimizer's step"
                )
                raise RuntimeError(
                    f"{note.key} of shape {tuple(note.tensor.shape)} in {self.name} was changed in place {why}"
                )
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # No cache: it would keep every weight's low-precision copy alive until backward ends.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(self._tensors_as_they_were())
            stack.enter_context(self._gradients_as_they_were())
            stack.enter_context(self._flags_as_they_were())
            stack.enter_context(self._random_numbers_as_they_were())
            yield

    @contextmanager
    def _random_numbers_as_they_were(self) -> Iterator[None]:
        now = [(each, each.get()) for each, _ in self.random]
        try:
            for each, was in self.random:
                each.set(was)
            yield
        finally:
            for each, state in now:
                each.set(state)

    @contextmanager
    def _tensors_as_they_were(self) -> Iterator[None]:
        # An updated buffer is replayed on a copy of its copy, so that the notes stay good for another replay.
        wanted = [(note.registry, note.key, note.tensor) for note in self.notes]
        wanted += [(note.registry, note.key, was.clone()) for note, was, _ in self.updated]
        now = [(registry, key, registry.get(key)) for registry, key, was in wanted if registry.get(key) is not was]
        try:
            for registry, key, was in wanted:
                registry[key] = was
            yield
        finally:
            for registry, key, tensor in now:
                registry[key] = tensor

    @contextmanager
    def _gradients_as_they_were(self) -> Iterator[None]:
        """What was trainable is so again: some code freezes parts of a model between forward and backward."""
        changed = [note for note in self.notes if note.tensor.is_leaf and note.tensor.requires_grad != note.needs_grad]
        try:
            for note in changed:
                note.tensor.requires_grad_(note.needs_grad)
            yield
        finally:
            for note in changed:
                note.tensor.requires_grad_(not note.needs_grad)

    @contextmanager
    def _flags_as_they_were(self) -> Iterator[None]:
        changed = [(module, module.training) for module, was in self.training if module.training != was]
        try:
            for module, flag in changed:
                module.training = not flag
            yield
        finally:
            for module, flag in changed:
                module.training = flag


def _is_updated(note: Note, was: Tensor, normalisation: bool) -> bool:
    """Whether the first evaluation may have moved this buffer.

    The kernels of BatchNorm and InstanceNorm move their statistics past the version counter, and so may other modules
    that call them; to compare values would wait for a GPU. Small buffers are therefore replayed from their copy anyhow.
    """
    moved = note.changed() or note.registry.get(note.key) is not note.tensor
    return moved or normalisation or was.numel() <= SMALL
