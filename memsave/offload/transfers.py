"""Copies between one device and host memory.

**CUDA.** All copies run in one stream of their own, beside the stream that computes, in the order in which they are
issued. Blocks of host memory can therefore be reused at once: a copy into a block runs after earlier copies from it. No
copy makes the program wait.

- To the host: the copy stream waits for the kernels that were issued before. The memory on the device must stay until
  the copy has ended, and PyTorch's allocator could give it to a later kernel as soon as it is free. `Transfers`
  therefore holds a reference, until so many bytes wait that the oldest copy must give way: the computing stream then
  waits for the end of that copy. The bytes that wait are the memory that is exchanged for time.
- To the device: memory is allocated in the computing stream, and filled in the copy stream. The computing stream waits
  for it when the tensor is used (`Incoming.wait`).

**CPU.** Copies run at once. **Fake tensors** are held as the tensors of their device would be, so that they count.
"""

import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memsave.host_bytes import TO_DEVICE, TO_HOST, count_copy
from memsave.offload._torch_internals import fake_mode_of, unobserved
from memsave.offload.host_store import HostStore

WAITING_BYTES = 64 << 20
"""The bytes whose copies to the host may wait at the same time, if there are several copies."""


class Incoming(NamedTuple):
    """Bytes on the device, and the event at which their copy ends; None if it has ended."""

    tensor: Tensor
    copied: Any

    def wait(self) -> Tensor:
        """The bytes; kernels that are issued from now on run after the copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(self.copied)
        return self.tensor


class _Outgoing(NamedTuple):
    source: Tensor
    computing: Any  # the stream in which the source was made
    copied: Any  # an event

    def wait(self) -> None:
        if self.copied is not None:
            self.computing.wait_event(self.copied)


class Transfers:
    """Copies between `device` and blocks of host memory.

    Args:
        device: with its index, if there are several.
        folder: see `HostStore`.
        waiting_bytes: see `WAITING_BYTES`.
    """

    def __init__(self, device: torch.device, *, folder: Path | None = None, waiting_bytes: int = WAITING_BYTES) -> None:
        self.device, self.waiting_bytes = device, waiting_bytes
        self.store = HostStore(device, folder=folder)
        self._waiting: OrderedDict[int, _Outgoing] = OrderedDict()  # by number, oldest first
        self._number = 0
        self._stream: Any = None

    @property
    def is_asynchronous(self) -> bool:
        """Whether copies run beside the computation."""
        return self.device.type == "cuda"

    def allocate(self, like: Tensor) -> Tensor:
        """A block of host memory with the size of `like`, which is uint8 and on the device."""
        with unobserved():
            return self.store.allocate(like.numel(), like=like)

    def to_host(self, source: Tensor, block: Tensor) -> int:
        """Copy `source`, uint8 on the device, into a block; returns the number of the copy, for `release`."""
        self._number += 1
        count_copy(TO_HOST, size=source.numel())
        with unobserved():
            if not self.is_asynchronous:
                block.copy_(source)
                self.store.release_pages(block)
                return self._number
            computing = copied = None
            if fake_mode_of(source) is None:
                computing, stream = torch.cuda.current_stream(source.device), self._copy_stream()
                stream.wait_stream(computing)
                with torch.cuda.stream(stream):
                    block.copy_(source, non_blocking=True)
                    copied = stream.record_event()
        self._waiting[self._number] = _Outgoing(source, computing, copied)
        while len(self._waiting) > 1 and self._bytes_waiting() > self.waiting_bytes:
            self.release(next(iter(self._waiting)))
        return self._number

    def to_device(self, block: Tensor, *, like: Tensor) -> Incoming:
        """Copy a block to the device. `like` is a tensor there; the memory that this allocates is seen by all modes."""
        target = like.new_empty(block.numel(), dtype=torch.uint8)
        count_copy(TO_DEVICE, size=block.numel())
        with unobserved():
            if not self.is_asynchronous:
                target.copy_(block)
                self.store.release_pages(block)
                return Incoming(target, None)
            if fake_mode_of(like) is not None:
                return Incoming(target, None)
            stream = self._copy_stream()
            stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may still be read there
            with torch.cuda.stream(stream):
                target.copy_(block, non_blocking=True)
                return Incoming(target, stream.record_event())

    def release(self, number: int) -> None:
        """Release the device's memory of a copy to the host; it is reused after the copy. Then does nothing."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting.wait()

    def release_all(self) -> None:
        """`release` for all copies."""
        for number in list(self._waiting):
            self.release(number)

    def synchronize(self) -> None:
        """Wait until all copies have ended, so that the program can read host memory."""
        if self._stream is not None:
            self._stream.synchronize()

    def _bytes_waiting(self) -> int:
        return sum(each.source.numel() for each in list(self._waiting.values()))

    def _copy_stream(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
            # PyTorch does not know of the copies, and would give pinned memory to others while they run
            weakref.finalize(self, self._stream.synchronize).atexit = False
        return self._stream
