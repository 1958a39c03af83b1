"""Gaussian noise, added in place through small buffers, to each gradient once.

A gradient that is summed over several processes gets its noise in rank 0, before the sum. A sharded gradient gets it
in each process, on that process's shard.

Numbers are drawn in float64, because PyTorch's float32 normals on the CPU come from 24-bit uniforms and end at 5.77
standard deviations. A value beyond would prove that an example was present, more often than delta permits.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from memsave.privacy.correlated import inverse_series, series
from memsave.privacy.errors import PrivacyError
from memsave.privacy.randomness import SecretStream
from memsave.processes import is_sharded, local_part, process_rank

CHUNK = 2**20  # numbers drawn at a time: 8 MiB


class GaussianNoise:
    """Adds noise to gradients, one step after the other.

    Args:
        parameters: the parameters whose `.grad` gets noise; float32 or wider, on one device.
        stream: random numbers with no other use.
        secure: discard one number, then draw each number as half the sum of four. This protects against attacks on the
            gaps between floating-point numbers (Holohan and Braghin, arXiv 2107.10138, section 5.1; also the secure
            mode of Opacus). It takes a second buffer.
        noise, bands: see `correlated.py`; the standard deviation must then be the same in every step.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        stream: SecretStream,
        secure: bool = False,
        noise: str = "independent",
        bands: int = 1,
    ):
        self.parameters, self.stream, self.secure, self.noise = list(parameters), stream, secure, noise
        if noise != "independent" and any(map(is_sharded, self.parameters)):
            raise PrivacyError(
                f"noise={noise} needs whole gradients, and FSDP shards them; train with DDP, or with independent noise"
            )
        size = min(CHUNK, max((p.numel() for p in self.parameters), default=0))
        device = self.parameters[0].device if self.parameters else None
        count = 1 + (noise == "regenerated")
        self._total, *self._others = (torch.empty(size, dtype=torch.float64, device=device) for _ in range(count))
        self._drawn = [torch.empty(size, dtype=torch.float64, device=device)] if secure else []
        self._weights = (series if noise == "banded" else inverse_series)(noise, bands=bands, steps=bands).tolist()
        self._states: deque[np.ndarray] = deque(maxlen=bands - 1)  # of the stream before earlier steps, newest first
        self._past: list[list[Tensor]] = []  # the noise of bands - 1 earlier steps, newest first
        if noise == "banded" and process_rank() == 0:
            self._past = [[torch.zeros_like(p).view(-1) for p in self.parameters] for _ in range(bands - 1)]

    def add_(self, *, std: float) -> None:
        """Add noise of standard deviation `std` (of z, if it is correlated) to every gradient; whole ones in rank 0."""
        before = self.stream.get_state()
        earlier = [SecretStream.at(state) for state in self._states] if self.noise == "regenerated" else []
        for number, parameter in enumerate(self.parameters):
            assert parameter.grad is not None
            if process_rank() > 0 and not is_sharded(parameter):
                continue
            if not is_sharded(parameter):
                parameter.grad = parameter.grad.contiguous()
            flat = local_part(parameter.grad).view(-1)
            for first in range(0, len(flat), CHUNK):
                part = slice(first, first + CHUNK)
                noise = self._draw(self.stream, self._total[: len(flat[part])]).mul_(std)
                for weight, stream in zip(self._weights[1:], earlier):
                    noise.add_(self._draw(stream, self._others[0][: len(noise)]), alpha=weight * std)
                for weight, past in zip(self._weights[1:], self._past):
                    noise.sub_(past[number][part], alpha=weight)
                flat[part].add_(noise)
                if self._past:  # the oldest noise is not needed any more
                    self._past[-1][number][part] = noise
        if self._past:
            self._past.insert(0, self._past.pop())
        if self.noise == "regenerated":
            self._states.appendleft(before)

    def _draw(self, stream: SecretStream, out: Tensor) -> Tensor:
        """Fill `out` (n,) with standard normal numbers."""
        if not self.secure:
            return stream.fill_normal(out)
        one = self._drawn[0][: len(out)]
        stream.fill_normal(one[:1])
        out.zero_()
        for _ in range(4):
            out += stream.fill_normal(one)
        return out.div_(2)

    def get_past(self) -> Tensor:
        """What correlated noise needs from earlier steps, newest first: (k, WORDS) int64, or (k, all parameters)."""
        if self._past:
            return torch.stack([torch.cat(noise).cpu() for noise in self._past])
        return torch.from_numpy(np.array(self._states, dtype=np.uint64).view(np.int64))

    def set_past(self, past: Tensor) -> None:
        """Continue after a `get_past`."""
        self._states.clear()
        if self.noise == "regenerated":
            self._states.extend(past.numpy().view(np.uint64))
        for values, noise in zip(past, self._past):
            for part, kept in zip(values.split([len(each) for each in noise]), noise, strict=True):
                kept.copy_(part)
