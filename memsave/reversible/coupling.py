"""Couplings: residual blocks whose input can be computed from their output.

    y1 = combine(x1, F(x2))            x2 = separate(y2, G(y1))
    y2 = combine(x2, G(y1))            x1 = separate(y1, F(x2))

F and G are any modules and need no inverse. x1, x2 are the halves of x along dimension 1 (channels). A coupling defines
how a branch's value changes a half, and how to invert this change:

| | combine(x, v) | separate(y, v) | source |
|---|---|---|---|
| additive | x + v | y - v | Dinh et al., "NICE" (2014); Gomez et al., "The Reversible Residual Network" (2017) |
| affine | x exp(s) + t | (y - t) exp(-s) | Dinh et al., "Density Estimation using Real NVP" (2017) |

This file contains only the mathematics; `sequence.py` decides what is kept between forward and backward.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memsave.reversible._torch_internals import version_of

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Coupling(nn.Module):
    """Two branches that change the halves of dimension 1 in turn; subclasses define `combine` and `separate`.

    Called directly it is an ordinary module that stores its activations; a `ReversibleSequence` rebuilds them. `f` and
    `g` map (B, C/2, ...) to (B, values C/2, ...).
    """

    values: ClassVar[int] = 1
    """Output channels of a branch per input channel."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f = f
        self.g = g

    def combine(self, target: Tensor, value: Tensor) -> Tensor:
        """Change a half (B, C/2, ...) by a branch's value (B, values C/2, ...); must not draw random numbers."""
        raise NotImplementedError

    def separate(self, target: Tensor, value: Tensor) -> Tensor:
        """Invert `combine(., value)`; must not change its arguments in place."""
        raise NotImplementedError

    def cast_to_stream(self, value: Tensor, stream: "Stream") -> Tensor:
        """A branch's value in the dtype of the stream; `combine` and `separate` are inverse in that dtype only."""
        return value.to(stream.target.dtype)

    def undo(self, target: Tensor, value: Tensor) -> Tensor:
        """`separate`, checked for changes of its arguments in place: RuntimeError."""
        versions = version_of(target), version_of(value)
        before = self.separate(target, value)
        if (version_of(target), version_of(value)) != versions:
            raise RuntimeError(
                f"{type(self).__name__}.separate changed one of its arguments in place, and both are needed later; "
                f"use out-of-place operations there"
            )
        return before

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to y of the same shape and dtype; ValueError when C is odd."""
        return self.forward_stream(Stream.split(x)).merge()

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y, up to the rounding of one `separate` per half.

        Not the inverse if a branch draws random numbers (dropout in training mode), because it draws new ones here.
        """
        return self.inverse_stream(Stream.split(y)).merge()

    def forward_stream(self, stream: "Stream") -> "Stream":
        """`forward` on the pair of halves."""
        return self.half_step(self.half_step(stream, self.f), self.g)

    def inverse_stream(self, stream: "Stream") -> "Stream":
        """`inverse` on the pair of halves."""
        return self.half_step_back(self.half_step_back(stream, self.g), self.f)

    def half_step(self, stream: "Stream", branch: nn.Module) -> "Stream":
        """Change the target by the branch's value at the source, then swap target and source."""
        x = stream.branch_input()
        version = version_of(x)
        value = branch(x)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the branch {type(branch).__name__} of a coupling returned a {type(value).__name__}; return one tensor"
            )
        if version_of(x) != version:
            raise RuntimeError(
                f"the branch {type(branch).__name__} changed its input in place, which also changes the stream; "
                f"make its first layer out of place (inplace=False)"
            )
        batch, channels, *space = stream.target.shape
        if value.shape != (batch, self.values * channels, *space):
            wanted = "as many output channels as inputs"
            wanted = wanted if self.values == 1 else f"{self.values} output channels for each input"
            raise ValueError(
                f"a branch of a coupling must keep the shape of its input, but {type(branch).__name__} turned "
                f"{tuple(stream.source.shape)} into {tuple(value.shape)}; give it {wanted}"
            )
        return stream.pair(stream.source, self.combine(stream.target, self.cast_to_stream(value, stream)))

    def half_step_back(self, stream: "Stream", branch: nn.Module) -> "Stream":
        """Invert `half_step`."""
        before = stream.undone()
        value = self.cast_to_stream(branch(before.branch_input()), before)
        return before.pair(self.undo(before.target, value), before.source)


class AdditiveCoupling(Coupling):
    """The block y1 = x1 + f(x2), y2 = x2 + g(y1) on the two halves of dimension 1.

    `f` and `g` map (B, C/2, ...) to (B, C/2, ...).
    """

    def combine(self, target: Tensor, value: Tensor) -> Tensor:
        """target + value."""
        return target + value

    def separate(self, target: Tensor, value: Tensor) -> Tensor:
        """target - value."""
        return target - value

    def cast_to_stream(self, value: Tensor, stream: "Stream") -> Tensor:
        """The value, rounded if the stream has a grid; no cast, because a sum has the wider dtype of its terms."""
        return stream.rounded(value) if stream.grid else value


class AffineCoupling(Coupling):
    """The block y1 = x1 exp(s) + t with (s, t) = f(x2), y2 = x2 exp(s') + t' with (s', t') = g(y1).

    `f` and `g` map (B, C/2, ...) to (B, C, ...): the first half of their channels is the raw log-scale, the second half
    the shift. The log-scale is `limit` tanh(raw / limit), so a block scales a half by at most exp(limit) and at least
    exp(-limit): rounding errors of the rebuilt stream grow with this factor.
    """

    values = 2

    def __init__(self, f: nn.Module, g: nn.Module, *, limit: float = 1.0):
        super().__init__(f, g)
        if not 0 < limit < float("inf"):
            raise ValueError(f"limit is {limit}; give a positive and finite bound of the log-scale, such as 1")
        self.limit = limit

    def combine(self, target: Tensor, value: Tensor) -> Tensor:
        """target exp(s) + t."""
        log_scale, shift = self._parts(value)
        return target * log_scale.exp() + shift

    def separate(self, target: Tensor, value: Tensor) -> Tensor:
        """(target - t) exp(-s)."""
        log_scale, shift = self._parts(value)
        return (target - shift) * (-log_scale).exp()

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = value.chunk(2, dim=1)
        return self.limit * torch.tanh(raw / self.limit), shift


class Stream:
    """The pair of halves (target, source) that passes from block to block.

    A coupling is two half-steps of the same form, `combine(target, branch(source))`, each followed by a swap:

        F: (x1, x2) -> (x2, y1)        G: (x2, y1) -> (y1, y2)

    so forward, inverse and rebuild do not distinguish F and G. The halves are float32 or wider in any compute dtype of
    the branches: a bfloat16 stream drifts by a factor of two over 128 blocks. `dtype` is that of the sequence's input:
    a branch receives its source in this dtype, and `merge` returns it.

    With a `grid`, a power of two, all entries are multiples of it. Their sums are exact in float32 up to 2^24 grids,
    so that subtraction inverts addition exactly.
    """

    __slots__ = ("dtype", "grid", "source", "target")

    def __init__(self, target: Tensor, source: Tensor, dtype: torch.dtype, *, grid: float | None = None):
        self.target = target
        self.source = source
        self.dtype = dtype
        self.grid = grid

    @classmethod
    def split(
        cls,
        x: Tensor,
        dtype: torch.dtype | None = None,
        *,
        grid: float | None = None,
        layout: torch.memory_format | None = None,
    ) -> "Stream":
        """Split x (B, C, ...) into two dense halves (B, C/2, ...) in float32 or wider.

        `dtype` (of the branches) and `layout` (of the halves) default to those of x. Raises ValueError if x has no
        floating-point dtype or C is odd.
        """
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"a reversible block needs floating-point numbers, but its input is {x.dtype}; convert it")
        if x.dim() < 2 or x.shape[1] % 2:
            raise ValueError(
                f"a reversible block needs an even number of channels in dimension 1 to split, but its input has "
                f"shape {tuple(x.shape)}; change the channels to an even number"
            )
        stream_dtype = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
        layout = memory_format(x) if layout is None else layout
        x1, x2 = (half.to(stream_dtype).contiguous(memory_format=layout) for half in x.chunk(2, dim=1))
        stream = cls(x1, x2, x.dtype if dtype is None else dtype, grid=grid)
        return stream.pair(stream.rounded(x1), stream.rounded(x2)) if grid else stream

    def merge(self) -> Tensor:
        """Concatenate the halves: (B, C, ...) in the dtype of the input."""
        return torch.cat((self.target, self.source), dim=1).to(self.dtype)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(target, source)."""
        return self.target, self.source

    def branch_input(self) -> Tensor:
        """The input of a branch: the source in the dtype of the sequence's input."""
        return self.source.to(self.dtype)

    def pair(self, target: Tensor, source: Tensor) -> "Stream":
        """A stream of these halves, with the same dtype and grid."""
        return Stream(target, source, self.dtype, grid=self.grid)

    def undone(self) -> "Stream":
        """The pair with the swap of the last half-step undone: `target` is the half which that step changed."""
        return self.pair(self.source, self.target)

    def rounded(self, value: Tensor) -> Tensor:
        """Round to multiples of the grid; the gradient is that of the identity."""
        return _Rounded.apply(value.to(self.target.dtype), self.grid)


class _Rounded(torch.autograd.Function):
    """Round to the nearest multiple of a power of two; straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: float) -> Tensor:
        return torch.round(value / grid).mul_(grid)  # scaling by a power of two is exact

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format for a dense copy of x: channels_last if x has it, so that a replay runs the same kernels."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
        return channels_last
    return torch.contiguous_format
