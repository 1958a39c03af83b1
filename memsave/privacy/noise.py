"""Gaussian noise, in place, through one small buffer.

Numbers are drawn in float64: PyTorch's float32 normals on the CPU come from uniforms of 24 bits and end at 5.77
standard deviations. What lies beyond would tell with certainty that an example was there, more often than delta allows.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

PIECE = 2**20  # numbers drawn at a time: 8 MiB


class GaussianNoise:
    """Adds noise to gradients.

    Args:
        parameters: whose `.grad` is noised; float32 or wider, on one device.
        generator: on that device; nothing else may draw from it.
        secure: draw each number as half the sum of four, after one that is thrown away, which hides the gaps between
            floating-point numbers that could give the sum away (Holohan and Braghin, arXiv 2107.10138, section 5.1;
            the construction of Opacus's secure mode). It takes a second buffer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, generator: Generator, secure: bool = False):
        self.parameters, self.generator, self.secure = list(parameters), generator, secure
        size = min(PIECE, max((p.numel() for p in self.parameters), default=0))
        self._buffers = [
            torch.empty(size, dtype=torch.float64, device=generator.device) for _ in range(2 if secure else 1)
        ]

    def add_(self, *, std: float) -> None:
        """Add noise of standard deviation `std` to every gradient."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
            for part in parameter.grad.view(-1).split(PIECE):
                part.add_(self._draw(len(part), std))

    def _draw(self, count: int, std: float) -> Tensor:
        drawn = self._buffers[0][:count]
        if not self.secure:
            return drawn.normal_(0, std, generator=self.generator)
        one = self._buffers[1][:count]
        one[:1].normal_(0, std, generator=self.generator)
        drawn.zero_()
        for _ in range(4):
            drawn += one.normal_(0, std, generator=self.generator)
        return drawn.div_(2)
