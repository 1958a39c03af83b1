"""Gaussian noise, added in place through one small buffer, to each gradient once.

A gradient that is summed over several processes gets its noise in rank 0, before the sum. A sharded gradient gets it
in each process, on that process's shard.

Numbers are drawn in float64, because PyTorch's float32 normals on the CPU come from 24-bit uniforms and end at 5.77
standard deviations. A value beyond would prove that an example was present, more often than delta permits.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from memsave.processes import is_sharded, local_part, process_rank

CHUNK = 2**20  # numbers drawn at a time: 8 MiB


class GaussianNoise:
    """Adds noise to gradients.

    Args:
        parameters: the parameters whose `.grad` gets noise; float32 or wider, on one device.
        generator: a generator on that device with no other use.
        secure: discard one number, then draw each number as half the sum of four. This protects against attacks on the
            gaps between floating-point numbers (Holohan and Braghin, arXiv 2107.10138, section 5.1; also the secure
            mode of Opacus). It takes a second buffer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, generator: Generator, secure: bool = False):
        self.parameters, self.generator, self.secure = list(parameters), generator, secure
        size = min(CHUNK, max((p.numel() for p in self.parameters), default=0))
        self._buffers = [
            torch.empty(size, dtype=torch.float64, device=generator.device) for _ in range(2 if secure else 1)
        ]

    def add_(self, *, std: float) -> None:
        """Add noise of standard deviation `std` to every gradient; to a whole one only in rank 0."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            if process_rank() > 0 and not is_sharded(parameter):
                continue
            if not is_sharded(parameter):
                parameter.grad = parameter.grad.contiguous()
            for part in local_part(parameter.grad).view(-1).split(CHUNK):
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
