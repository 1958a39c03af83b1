"""The ledger of storages: which bytes were alive, and when.

A tensor is a view of an untyped storage, which occupies the memory and may be shared by several tensors. Therefore the
unit of the ledger is the storage, here called a block: one birth, one death, a size. PyTorch keeps the Python object of
a storage alive as long as the C++ storage, even if no Python name refers to it (for example a tensor that only autograd
has saved). The package relies on two consequences:

- a weak reference to that object dies exactly when the memory is released, and its callback is the death event;
- `id(storage)` identifies a living storage, and the callback removes the id before Python can reuse it.

The ledger holds weak references only, no tensor and no storage, so it extends no lifetime. It records events; owner and
category of a block are determined after the recording. `events` is the list of changes (block, bytes) in order of time,
and `birth` and `death` of a block are positions in this list. State k is the memory after the first k events; state 0
is the memory at the start. If a storage appears as an argument of an operation and its birth was not recorded, it
existed before or came from outside: it is counted from state 0.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from memsave.host_bytes import is_in_host_memory
from memsave.profiler._torch_internals import inner_tensors, is_wrapper


@dataclass(slots=True)
class Block:
    """One storage: its size, its first tensor, and the events of its birth and death."""

    bytes: int
    """Current size; the last size after the death."""
    shape: tuple[int, ...]
    dtype: str
    device: str
    module: str | None
    """Qualified name of the module whose forward or backward created it; None outside every module."""
    phase: str
    birth: int
    """The first state in which it is alive; 0 if it existed before."""
    death: int | None = None
    """The first state in which it is no longer alive; None while it is alive."""
    start_bytes: int = 0
    """Its size in state 0; 0 if it did not exist before."""


class _StorageRef(weakref.ref):
    """A weak reference to a storage, with the number of its block."""

    __slots__ = ("block", "key")
    block: int
    key: int


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an operator's arguments or results: tensors, sequences of them, dicts of keywords.

    Called twice per operator; `torch.utils._pytree` takes two to ten times as long on such small trees.
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def storages_of(tensor: torch.Tensor) -> Iterator[tuple[torch.UntypedStorage, torch.Tensor]]:
    """Yield (storage, tensor that views it): one pair for a dense tensor, several for sparse and wrapper tensors."""
    if is_wrapper(type(tensor)):
        parts = inner_tensors(tensor)
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage(), tensor
        return
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        parts = []
    for part in parts:
        yield from storages_of(part)


class Ledger:
    """Blocks and events of one recording.

    Args:
        context: called at each birth; returns the current (phase, module).
        before_death: called before each death is recorded.
        device: records only the storages of this device; None records all.
    """

    def __init__(
        self,
        *,
        context: Callable[[], tuple[str, str | None]],
        before_death: Callable[[], None],
        device: torch.device | None = None,
    ) -> None:
        self.blocks: list[Block] = []
        self.events: list[tuple[int, int]] = []
        self._alive: dict[int, _StorageRef] = {}
        self._context = context
        self._before_death = before_death
        self._device = device

    def find(self, tensor: torch.Tensor) -> Iterator[int]:
        """Yield the known blocks of a tensor."""
        for storage, _ in storages_of(tensor):
            ref = self._alive.get(id(storage))
            if ref is not None:
                yield ref.block

    def existed(self, tensor: torch.Tensor) -> None:
        """Record a tensor that existed before: its unknown storages count from state 0."""
        for storage, view in storages_of(tensor):
            self._record(storage, view, born=False)

    def produced(self, tensor: torch.Tensor) -> None:
        """Record a result of an operation: an unknown storage is a birth; a known one may have been resized."""
        for storage, view in storages_of(tensor):
            self._record(storage, view, born=True)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record the new size of a known storage, which something else than an operator has changed."""
        ref = self._alive.get(id(storage))
        if ref is not None:
            self._change(ref.block, storage.nbytes())

    def close(self) -> None:
        """Stop recording: blocks that are alive now get no death."""
        self._alive.clear()

    def _record(self, storage: torch.UntypedStorage, tensor: torch.Tensor, *, born: bool) -> None:
        key = id(storage)
        size = storage.nbytes()
        ref = self._alive.get(key)
        if ref is not None:
            if self.blocks[ref.block].bytes != size:
                self._change(ref.block, size)
            return
        if self._device is not None and not self._counts(tensor.device):
            return
        if is_in_host_memory(storage):  # also where the device is the CPU
            return
        phase, module = self._context() if born else ("before", None)
        ref = _StorageRef(storage, self._died)
        ref.key, ref.block = key, len(self.blocks)
        self._alive[key] = ref
        block = Block(
            bytes=0,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=str(tensor.device),
            module=module,
            phase=phase,
            birth=0,
        )
        self.blocks.append(block)
        if born:
            self._change(ref.block, size)
            block.birth = len(self.events)
        else:
            block.bytes = block.start_bytes = size

    def _counts(self, device: torch.device) -> bool:
        wanted = self._device
        return wanted is None or (device.type == wanted.type and wanted.index in (None, device.index))

    def _change(self, index: int, size: int) -> None:
        block = self.blocks[index]
        if size != block.bytes:
            self.events.append((index, size - block.bytes))
            block.bytes = size

    def _died(self, ref: _StorageRef) -> None:
        if self._alive.get(ref.key) is not ref:
            return
        self._before_death()
        del self._alive[ref.key]
        block = self.blocks[ref.block]
        if block.bytes:
            self.events.append((ref.block, -block.bytes))
        block.death = len(self.events)
