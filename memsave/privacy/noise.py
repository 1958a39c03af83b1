"""Gaussian noise, in place, through one buffer as large as the largest parameter."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn


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
        largest = max((p.numel() for p in self.parameters), default=0)
        self._buffers = [
            torch.empty(largest, dtype=torch.float32, device=generator.device) for _ in range(2 if secure else 1)
        ]

    def add_(self, *, std: float) -> None:
        """Add noise of standard deviation `std` to every gradient, in float32."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.add_(self._draw(parameter.numel(), std).view(parameter.shape))

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
