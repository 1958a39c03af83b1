"""Keep the tensors that autograd saves for backward in host memory.

    offload = ActivationOffload(model)               # one for all steps, so that host memory is reused
    for batch in batches:
        with offload(keep=[batch]):
            loss = model(batch).square().mean()
        loss.backward()

Saved-tensor hooks replace every large tensor that autograd would save by a handle. What is copied is the storage, as it
is what autograd would keep alive: tensors that view the same storage share one copy, and a handle rebuilds its view
with the same strides. Backward copies a storage back when it opens the first handle of it, and the copy is freed when
the last tensor that views it is. On CUDA, opening a storage also starts the copy of the one that was saved before it,
which backward needs next (see `transfers.py` for the order of copies).

Gradients are those of the same step without offloading, bit for bit: copies have the same bytes, strides and alignment.

- A storage that is still alive is not copied back: the handle then views the storage itself.
- A tensor that was changed in place after it was saved raises an error in backward, as without offloading.
- Parameters, their views, buffers and the tensors of `keep` stay on the device: they exist in any case.
- The hooks of a `memsave.reversible` sequence or of a checkpoint apply inside of them; what these save themselves (the
  output and the anchors of the sequence, the inputs of the checkpoint) is offloaded.
- Backward may run repeatedly (`retain_graph`), and gradients may be differentiated again.

What a forward itself holds, such as the skip connections of a U-Net until they are merged, stays on the device.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memsave.offload._torch_internals import (
    PLAIN_TYPES,
    storage_id,
    unobserved,
    version_counter,
    version_of,
    view_of,
)
from memsave.offload.transfers import WAITING_BYTES, Incoming, Transfers

MIN_BYTES = 64 << 10
"""Smaller storages stay on the device: copying them costs more than their memory is worth."""
ALIGNMENT = 512
"""Bytes to which CUDA's allocator aligns memory; a part of a storage keeps its address modulo this number."""


class ActivationOffload:
    """Calling it gives the context manager for one forward, see the module's docstring.

    Args:
        model: its parameters and buffers stay on the device, which is that of its first parameter.
        min_bytes: storages below this size stay on the device.
        folder: of the memory-mapped files of the CPU; None is the system's folder for temporary files.
        waiting_bytes: the device's memory that copies to the host may hold at the same time, on CUDA.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        min_bytes: int = MIN_BYTES,
        folder: Path | None = None,
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self.model, self.min_bytes = model, min_bytes
        self._options: dict[str, Any] = {"folder": folder, "waiting_bytes": waiting_bytes}
        self._transfers: dict[torch.device, Transfers] = {}  # the model may be moved between steps

    @contextmanager
    def __call__(self, keep: Iterable[Any] = ()) -> Iterator[None]:
        """Context manager of one forward. Tensors among `keep`, such as those of the batch, stay on the device."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        device = next((each.device for each in tensors), torch.device("cpu"))
        if device not in self._transfers:
            self._transfers[device] = Transfers(device, **self._options)
        tensors += [each for each in keep if isinstance(each, Tensor)]
        kept = {storage_id(each) for each in tensors if _is_plain(each.data)}
        forward = _Forward(self._transfers[device], min_bytes=self.min_bytes, kept=kept)
        pack = forward.pack
        with saved_tensors_hooks(_MovingHook(pack), _open):
            yield


class _MovingHook:
    """A pack hook that says of itself that backward finds every tensor as it was saved, and evaluates nothing again."""

    only_moves = True

    def __init__(self, function: Callable[[Tensor], "Handle | Kept | Tensor"]) -> None:
        self.function = function

    def __call__(self, tensor: Tensor) -> "Handle | Kept | Tensor":
        return self.function(tensor)


class Kept(NamedTuple):
    """A saved tensor that stays on the device, without its graph: the output of a node would else refer to the node."""

    tensor: Tensor
    version: int


@dataclass(eq=False, slots=True)
class Handle:
    """Takes the place of a saved tensor in the graph: a view of a copied storage."""

    copy: "StorageCopy"
    counter: Tensor
    """An empty tensor with the version counter of the saved one."""
    version: int
    dtype: torch.dtype
    offset: int
    """In bytes from the start of the whole storage."""
    size: torch.Size
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        self.copy.handles += 1

    def __del__(self) -> None:
        self.copy.handles -= 1


def _open(packed: "Handle | Kept | Tensor") -> Tensor:
    """The saved tensor."""
    if isinstance(packed, Tensor):
        return packed
    if isinstance(packed, Kept):
        _check_version(packed.tensor, packed.version, size=packed.tensor.shape)
        return packed.tensor
    _check_version(packed.counter, packed.version, size=packed.size)
    storage, start = packed.copy.open(like=packed.counter)
    offset = (packed.offset - start) // packed.dtype.itemsize
    with unobserved():
        return view_of(
            storage, packed.counter, dtype=packed.dtype, offset=offset, size=packed.size, stride=packed.stride
        )


def _check_version(counter: Tensor, version: int, *, size: torch.Size) -> None:
    if version_of(counter) != version:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: a saved "
            f"tensor of shape {tuple(size)} is at version {version_of(counter)}, and was saved at version {version}"
        )


class _Forward:
    """The storages that one forward has saved."""

    def __init__(self, transfers: Transfers, *, min_bytes: int, kept: set[int]) -> None:
        self.transfers, self.min_bytes, self.kept = transfers, min_bytes, kept
        self.copies: list[weakref.ref[StorageCopy]] = []
        self.by_key: weakref.WeakValueDictionary[tuple[int, ...], StorageCopy] = weakref.WeakValueDictionary()
        self.prefetched: Callable[[], StorageCopy | None] = lambda: None
        self.recent: torch.UntypedStorage | None = None
        """The storage that was copied back last, if another node has saved it, too: often that node runs next."""
        self.lock = RLock()  # autograd runs nodes of different devices in different threads

    def pack(self, tensor: Tensor) -> Handle | Kept | Tensor:
        """What autograd saves in the place of a tensor."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        with unobserved():
            if not self._is_offloaded(tensor):
                return Kept(tensor.detach(), version_of(tensor))
            version, storage = version_of(tensor), tensor.untyped_storage()
            first, length = _needed_bytes(tensor)
            key = (storage_id(tensor), version, first, length)
            copy = self.by_key.get(key)
            if copy is None or copy.original() is not storage:  # else the number of a dead storage was used again
                copy = StorageCopy(self, tensor, first, length)
                self.by_key[key] = copy
                self.copies.append(weakref.ref(copy))
            offset = int(tensor.storage_offset()) * tensor.element_size()
            return Handle(copy, version_counter(tensor), version, tensor.dtype, offset, tensor.shape, tensor.stride())

    def _is_offloaded(self, tensor: Tensor) -> bool:
        return (
            _is_plain(tensor)
            and tensor.device == self.transfers.device
            and _needed_bytes(tensor)[1] >= self.min_bytes
            and storage_id(tensor) not in self.kept
        )

    def prefetch_before(self, number: int) -> None:
        """Start to copy back the storage that was saved before this one, unless it is on the device."""
        if not self.transfers.is_asynchronous:
            return
        for earlier in range(number - 1, -1, -1):
            copy = self.copies[earlier]()
            if copy is not None:
                before = self.prefetched()
                if before is not None and before is not copy:
                    before.drop_prefetched()
                if copy.prefetch():
                    self.prefetched = weakref.ref(copy)
                return


class StorageCopy:
    """One storage, or a part of it, in host memory."""

    def __init__(self, forward: _Forward, tensor: Tensor, first: int, length: int) -> None:
        storage = tensor.untyped_storage()
        self.forward, self.number, self.first = forward, len(forward.copies), first
        self.outgoing = self.handles = 0
        self.original = weakref.ref(storage)
        self.restored: Callable[[], torch.UntypedStorage | None] = lambda: None
        self.incoming: Incoming | None = None  # prefetched, and not yet used
        self.like = version_counter(tensor)
        source = view_of(storage, tensor, dtype=torch.uint8, offset=first, size=(length,), stride=(1,))
        self.block = forward.transfers.allocate(source)
        self.outgoing = forward.transfers.to_host(source, self.block)

    def __del__(self) -> None:
        """The graph was freed: release the device's memory of copies that have not ended, or were not used."""
        self.forward.transfers.release(self.outgoing)
        self.drop_prefetched()

    def on_device(self) -> tuple[torch.UntypedStorage, int] | None:
        """(a living storage with the bytes, the position of its first byte in the whole storage), or None."""
        found, start = self.original(), 0
        if found is None:
            found, start = self.restored(), self.first
        return None if found is None else (found, start)

    def open(self, *, like: Tensor) -> tuple[torch.UntypedStorage, int]:
        """(a storage on the device with the bytes, the position of its first byte in the whole storage)."""
        with self.forward.lock:
            found = self.on_device()
            if found is None or found[0] is not self.forward.recent:
                self.forward.recent = None  # before other memory is allocated
            if found is None:
                incoming = self.incoming or self.forward.transfers.to_device(self.block, like=like)
                self.incoming = None
                storage = incoming.wait().untyped_storage()
                self.restored = weakref.ref(storage)
                found = storage, self.first
                if self.handles > 1:
                    self.forward.recent = storage
            elif self.handles == 1:
                self.forward.recent = None
            self.forward.prefetch_before(self.number)
            return found

    def prefetch(self) -> bool:
        """Start to copy the bytes back; returns whether they are then prefetched."""
        if self.on_device() is not None:
            return False
        if self.incoming is None:
            self.incoming = self.forward.transfers.to_device(self.block, like=self.like)
        return True

    def drop_prefetched(self) -> None:
        """Free the memory of a prefetched copy that was not used; it is reused after the copy."""
        if self.incoming is not None:
            self.incoming.wait()
            self.incoming = None


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a plain view of its storage."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def _needed_bytes(tensor: Tensor) -> tuple[int, int]:
    """(first byte, number of bytes) of the storage to copy: all of it, or the tensor's part if that is below half."""
    whole, offset = tensor.untyped_storage().nbytes(), int(tensor.storage_offset())
    if not tensor.numel():
        return 0, 0
    start = offset * tensor.element_size() // ALIGNMENT * ALIGNMENT
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (offset + span) * tensor.element_size() - start
    return (0, whole) if 2 * length >= whole else (start, length)
