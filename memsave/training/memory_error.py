"""Telling an allocation that failed from other errors, on every device."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory has run out."""
    # The CPU's allocator raises a RuntimeError that only its words tell apart.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
