"""The ledger of storages: which bytes live, from when to when.

A tensor is a view; what occupies memory is its untyped storage, and several tensors share one. So the ledger's unit is
the storage, here called a block: one birth, one death, a size. PyTorch keeps the Python object of a storage alive as
long as the C++ storage itself lives, even when no Python name refers to it (a tensor that only autograd has saved, for
example). Two things follow, and the whole package stands on them:

- a weak reference to that object dies exactly when the memory is released, and its callback is the death event;
- `id(storage)` names a living storage, and the callback removes the name before Python can hand it out again.

The ledger holds no tensor and no storage, only weak references, so it never prolongs a life. It writes down what
happened and leaves the questions (whose block, what for) to the binding at the end: `events` is the list of changes
(block, bytes) in the order in which they happened, and a block's `birth` and `death` are positions in it. State k is
memory after the first k events; state 0 is what existed at the start. A storage that the ledger meets as the argument
of an operation without having seen its birth existed before, or came from outside: it is counted from state 0.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Block:
    """One storage: its size, what it was first seen as, and the events between which it lived."""

    bytes: int
    """Current size, the last one when the block has died."""
    shape: tuple[int, ...]
    dtype: str
    device: str
    module: str | None
    """Qualified name of the module in whose forward or backward it was born; None outside every module."""
    phase: str
    birth: int
    """The state in which it first lives; 0 for what existed before."""
    death: int | None = None
    """The state in which it no longer lives; None while it does."""
    start_bytes: int = 0
    """Its size in state 0: nonzero only for what existed before."""


class _StorageRef(weakref.ref):
    """A weak reference that knows its block."""

    __slots__ = ("block", "key")
    block: int
    key: int


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an operator's arguments or results: tensors, sequences of them, dicts of keywords."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def storages_of(tensor: torch.Tensor) -> Iterator[tuple[torch.UntypedStorage, torch.Tensor]]:
    """Yield (storage, the tensor that shows it): one for a dense tensor, several for sparse or wrapper tensors."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        names = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        parts = [getattr(tensor, name) for name in names]
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
        context: asked at each birth for the (phase, module) of the program; it may look at `events`.
        before_death: called ahead of each death.
        device: limits the ledger to the storages of one device; None takes all.
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
        """Yield the blocks of a tensor, those that the ledger knows."""
        for storage, _ in storages_of(tensor):
            ref = self._alive.get(id(storage))
            if ref is not None:
                yield ref.block

    def existed(self, tensor: torch.Tensor) -> None:
        """Note a tensor that must have existed before: unknown storages count from the start."""
        for storage, shown in storages_of(tensor):
            self._note(storage, shown, born=False)

    def produced(self, tensor: torch.Tensor) -> None:
        """Note a result of an operation: an unknown storage is a birth, a known one may have been resized."""
        for storage, shown in storages_of(tensor):
            self._note(storage, shown, born=True)

    def close(self) -> None:
        """Stop watching: the blocks that live now have no death."""
        self._alive.clear()

    def _note(self, storage: torch.UntypedStorage, tensor: torch.Tensor, *, born: bool) -> None:
        key = id(storage)
        size = storage.nbytes()
        known = self._alive.get(key)
        if known is not None:
            if self.blocks[known.block].bytes != size:
                self._change(known.block, size)
            return
        if self._device is not None and not self._counts(tensor.device):
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
