"""The bytes that `memsave.offload` keeps in host memory and copies, which a memory recorder reads: of the process.

A storage in that memory is marked, because it must not count as memory of the device: on the CPU it has the same device
as the tensors that training uses.
"""

import weakref
from collections.abc import Callable

import torch

TO_HOST, TO_DEVICE = "copy to host", "copy to device"
"""The directions of a copy."""
_MARK = "is_offloaded"
_total = 0
_listeners: list[Callable[[torch.UntypedStorage], None]] = []
_copy_listeners: list[Callable[[str, int], None]] = []


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


def count_copy(direction: str, *, size: int) -> None:
    """Tell all listeners of a copy of `size` bytes that starts now; direction: TO_HOST or TO_DEVICE."""
    for function in _copy_listeners:
        function(direction, size)


def listen_to_copies(function: Callable[[str, int], None]) -> Callable[[], None]:
    """Call the function with (direction, bytes) of each copy from now on; returns its remover."""
    _copy_listeners.append(function)
    return lambda: _copy_listeners.remove(function)


def _subtract(size: int) -> None:
    global _total
    _total -= size
