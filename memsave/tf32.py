"""TF32: products of float32 numbers with 10 bits of their fractions, which CUDA may use for matrices and convolutions.

PyTorch allows it for cuDNN's convolutions by default, and for matrix products on request.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


def allows_tf32(device: torch.device) -> bool:
    """Whether float32 products on the device may be rounded to TF32."""
    return device.type == "cuda" and any(each.fp32_precision == "tf32" for each in _operators())


def without_tf32() -> AbstractContextManager[None]:
    """Context in which float32 products on CUDA are those of float32."""
    return tf32(allowed=False)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Context in which float32 products on CUDA are rounded to TF32, or are not."""
    before = [each.fp32_precision for each in _operators()]
    try:
        for each in _operators():
            each.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for each, precision in zip(_operators(), before, strict=True):
            each.fp32_precision = precision


def _operators() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn  # its annotations lack conv and rnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
