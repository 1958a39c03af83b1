"""Detection of out-of-memory errors on every device."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    # The CPU allocator raises a plain RuntimeError, which only its message identifies.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
