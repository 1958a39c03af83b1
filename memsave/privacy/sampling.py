"""Poisson sampling: each example is in a batch with probability q, independently of the others.

The accountants assume this sampling. Batches differ in size and may be empty. A shuffled epoch would be another
mechanism, with a larger epsilon than the computed one.
"""

from collections.abc import Iterator

import torch
from torch import Generator

from memsave.privacy.accounting import PrivacyError


def poisson_batches(*, size: int, sample_rate: float, generator: Generator) -> Iterator[list[int]]:
    """Yield endless batches of indices in 0 .. size - 1; each is drawn when it is requested."""
    if not 0 < sample_rate <= 1:
        raise PrivacyError(
            f"the sample rate is {sample_rate:g}; it must be above 0 and at most 1, so lower the batch size to at most "
            f"the {size} examples"
        )
    while True:  # in float64: float32 uniforms have 24 bits, and a rate of their grid is not the one accounted for
        drawn = torch.rand(size, dtype=torch.float64, device=generator.device, generator=generator) < sample_rate
        yield drawn.nonzero().flatten().tolist()
