"""The bytes that `memsave.offload` keeps in host memory: one count for the process, which a memory recorder reads.

A storage in that memory is marked, because it must not count as memory of the device: on the CPU it has the same device
as the tensors that training uses.
"""

import weakref
from collections.abc import Callable

import torch

_MARK = "is_offloaded"
_total = 0
_listeners: list[Callable[[torch.UntypedStorage], None]] = []


def host_bytes() -> int:
    """The bytes that are now in host memory."""
    return _total


def count_storage(storage: torch.UntypedStorage, *, size: int) -> None:
    """Mark a storage of host memory, and count its `size` bytes until it dies."""
    global _total
    setattr(storage, _MARK, True)  # PyTorch keeps the attributes as long as the memory
    weakref.finalize(storage, _subtract, size).atexit = False
    _total += size
    for function in _listeners:
        function(storage)


def is_in_host_memory(storage: torch.UntypedStorage) -> bool:
    """Whether `count_storage` was called for it."""
    return getattr(storage, _MARK, False)


def listen(function: Callable[[torch.UntypedStorage], None]) -> Callable[[], None]:
    """Call the function with each storage that is counted from now on; returns its remover."""
    _listeners.append(function)
    return lambda: _listeners.remove(function)


def _subtract(size: int) -> None:
    global _total
    _total -= size
