"""Equality of two computations of the same numbers."""

import torch


def assert_same(ones, others):
    """The tensors are equal bit for bit; on CUDA, where sums by atomic additions have no order, within rounding."""
    for one, other in zip(ones, others, strict=True):
        if one.device.type == "cuda":
            tolerance = {torch.float64: 1e-11, torch.float32: 2e-4}[one.dtype]  # AdamW divides small gradients
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(one, other)
