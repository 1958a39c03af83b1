"""Host memory for what is moved off the device: pinned for CUDA, a memory-mapped file for the CPU.

The memory is allocated in chunks, which are divided into blocks and reused, so that a training step allocates nothing
after the first steps. A block is one storage and returns to its chunk when that storage dies.

- CUDA: a chunk is page-locked memory, which a GPU reads and writes while the program goes on.
- CPU: a chunk is a file that has no name, so that nothing is left of it when the process ends, however it ends. The
  space on the disk is reserved when the chunk is made: a full disk is then an error, not a crash at the first write.
  The process returns the pages after each copy; the system keeps them in its cache as long as memory is free.
- Fake tensors: a block is a fake tensor of the CPU. It has the size of the real block, without memory.
"""

import errno
import mmap
import os
import tempfile
import weakref
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memsave.host_bytes import count_storage
from memsave.offload._torch_internals import fake_mode_of

ALIGNMENT = 4096
"""Blocks begin and end at multiples of it: that of pages, which are returned as a whole."""
SMALLEST, LARGEST = 1 << 20, 64 << 20
"""Chunks grow with the memory in use from one size to the other; a larger block has its own chunk."""


class Block(NamedTuple):
    """The place of a block."""

    chunk: int
    offset: int
    size: int


class HostStore:
    """Allocates blocks of host memory.

    Args:
        device: of the tensors that are moved; its type decides which memory is used.
        folder: of the files of the CPU; None is the system's folder for temporary files.
    """

    def __init__(self, device: torch.device, *, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder
        self._chunks: list[_Chunk] = []
        self._dead: deque[Block] = deque()  # a finalizer may run at any time, also within `_place`
        self._places: weakref.WeakKeyDictionary[torch.UntypedStorage, Block] = weakref.WeakKeyDictionary()

    @property
    def capacity(self) -> int:
        """The bytes of all chunks."""
        return sum(chunk.size for chunk in self._chunks)

    def allocate(self, size: int, *, like: Tensor) -> Tensor:
        """A block of `size` bytes, uint8; a fake tensor if `like` is one.

        Raises OSError if the folder has no space left. Call it where no mode sees it (`unobserved`).
        """
        fake = fake_mode_of(like)
        if fake is not None:
            with fake:
                block = torch.empty(size, dtype=torch.uint8, device="cpu")
            count_storage(block.untyped_storage(), size=size)
            return block
        place = self._place(max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT))
        memory = self._chunks[place.chunk].memory
        block = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=place.offset)
        storage = block.untyped_storage()
        count_storage(storage, size=size)
        self._places[storage] = place
        weakref.finalize(storage, self._dead.append, place).atexit = False
        return block

    def release_pages(self, block: Tensor) -> None:
        """Let the system write the pages of a block to its file, if it has one, and give their memory to others."""
        place = self._places.get(block.untyped_storage())
        if place is not None:
            self._chunks[place.chunk].release_pages(place)

    def _place(self, size: int) -> Block:
        while self._dead:
            dead = self._dead.popleft()
            self._chunks[dead.chunk].free(dead)
        for number, chunk in enumerate(self._chunks):
            offset = chunk.take(size)
            if offset is not None:
                return Block(number, offset, size)
        wanted = max(size, min(LARGEST, max(SMALLEST, self.capacity)))
        self._chunks.append(_Pinned(wanted) if self.device.type == "cuda" else _MappedFile(wanted, self.folder))
        offset = self._chunks[-1].take(size)
        assert offset is not None
        return Block(len(self._chunks) - 1, offset, size)


class _Chunk:
    """Memory with a buffer, and the intervals of it that are free."""

    def __init__(self, memory: Any, size: int) -> None:
        self.memory, self.size = memory, size
        self._free = {0: size}  # by offset, the size of each free interval

    def take(self, size: int) -> int | None:
        """The offset of a block, from the smallest free interval that is large enough; None if there is none."""
        fitting = [(found, offset) for offset, found in self._free.items() if found >= size]
        if not fitting:
            return None
        found, offset = min(fitting)
        del self._free[offset]
        if found > size:
            self._free[offset + size] = found - size
        return offset

    def free(self, block: Block) -> None:
        """Return a block, and merge it with its free neighbours."""
        offset, size = block.offset, block.size + self._free.pop(block.offset + block.size, 0)
        before = next((start for start, length in self._free.items() if start + length == offset), None)
        if before is not None:
            offset, size = before, size + self._free.pop(before)
        self._free[offset] = size

    def release_pages(self, block: Block) -> None:
        """Only files have pages that can be given back."""


class _Pinned(_Chunk):
    """Page-locked memory; PyTorch rounds its size up to a power of two, and all of it is used."""

    def __init__(self, size: int) -> None:
        size = 1 << (size - 1).bit_length()
        super().__init__(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy(), size)


class _MappedFile(_Chunk):
    """A file without a name, mapped into memory."""

    def __init__(self, size: int, folder: Path | None) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError as error:
                where = folder or tempfile.gettempdir()
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    message = f"no space for {size} bytes of offloaded tensors in {where}; name another folder"
                    raise OSError(error.errno, message) from error
                raise
            self._mapped = mmap.mmap(file.fileno(), size)  # it keeps the file open
        super().__init__(self._mapped, size)

    def release_pages(self, block: Block) -> None:
        """Drop the pages from this process; their content stays in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, block.offset, block.size)
