"""Couplings: residual blocks whose input follows from their output.

    y1 = combine(x1, F(x2))            x2 = separate(y2, G(y1))
    y2 = combine(x2, G(y1))            x1 = separate(y1, F(x2))

F and G are any modules; they need no inverse of their own. x1, x2 are the halves of x along dimension 1 (channels). A
coupling says how a branch's value changes a half, and how to undo that:

| | combine(x, v) | separate(y, v) | source |
|---|---|---|---|
| additive | x + v | y - v | Dinh et al., "NICE" (2014); Gomez et al., "The Reversible Residual Network" (2017) |
| affine | x exp(s) + t | (y - t) exp(-s) | Dinh et al., "Density Estimation using Real NVP" (2017) |

This file is the mathematics alone. What is kept between forward and backward is decided in `sequence.py`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Coupling(nn.Module):
    """Two branches that change the halves of dimension 1 in turn; subclasses give `combine` and `separate`.

    Called by itself it is an ordinary module that stores its activations; inside a `ReversibleSequence` they are
    rebuilt. `f` and `g` map (B, C/2, ...) to (B, values C/2, ...).
    """

    values: ClassVar[int] = 1
    """The channels that a branch gives for each one that it takes."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f = f
        self.g = g

    def combine(self, target: Tensor, value: Tensor) -> Tensor:
        """Change a half (B, C/2, ...) by the value (B, values C/2, ...) of a branch; draws no random numbers."""
        raise NotImplementedError

    def separate(self, target: Tensor, value: Tensor) -> Tensor:
        """Undo `combine(., value)`, without changing either in place."""
        raise NotImplementedError

    def admit(self, value: Tensor, stream: "Stream") -> Tensor:
        """A branch's value as `combine` and `separate` get it: as wide as the stream, or they would not be inverse."""
        return value.to(stream.target.dtype)

    def undo(self, target: Tensor, value: Tensor) -> Tensor:
        """`separate`, which has to leave its arguments as they are."""
        versions = version_of(target), version_of(value)
        before = self.separate(target, value)
        if (version_of(target), version_of(value)) != versions:
            raise RuntimeError(
                f"{type(self).__name__}.separate changed one of its arguments in place, which are still needed; use "
                f"operations that are not in place there"
            )
        return before

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to y of the same shape and dtype; ValueError when C is odd."""
        return self.forward_stream(Stream.split(x)).merge()

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y, up to the rounding of one `separate` per half.

        A branch that draws random numbers (dropout in training mode) draws new ones here: not the inverse then.
        """
        return self.inverse_stream(Stream.split(y)).merge()

    def forward_stream(self, stream: "Stream") -> "Stream":
        """`forward` on the pair, as it passes from block to block."""
        return self.half_step(self.half_step(stream, self.f), self.g)

    def inverse_stream(self, stream: "Stream") -> "Stream":
        """`inverse` on the pair."""
        return self.half_step_back(self.half_step_back(stream, self.g), self.f)

    def half_step(self, stream: "Stream", branch: nn.Module) -> "Stream":
        """Change the target by the branch's value at the source; the two then change roles."""
        x = stream.branch_input()
        version = version_of(x)
        value = branch(x)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the branch {type(branch).__name__} of a coupling returned a {type(value).__name__}; return one tensor"
            )
        if version_of(x) != version:
            raise RuntimeError(
                f"the branch {type(branch).__name__} changed its input in place, and the stream with it; replace its "
                f"first in-place layer by one that is not (inplace=False)"
            )
        batch, channels, *space = stream.target.shape
        if value.shape != (batch, self.values * channels, *space):
            wanted = "as many output channels as inputs"
            wanted = wanted if self.values == 1 else f"{self.values} output channels for each input"
            raise ValueError(
                f"a branch of a coupling must keep the shape of its input, but {type(branch).__name__} turned "
                f"{tuple(stream.source.shape)} into {tuple(value.shape)}; give it {wanted}"
            )
        return stream.pair(stream.source, self.combine(stream.target, self.admit(value, stream)))

    def half_step_back(self, stream: "Stream", branch: nn.Module) -> "Stream":
        """Undo `half_step`."""
        before = stream.rewound()
        value = self.admit(branch(before.branch_input()), before)
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

    def admit(self, value: Tensor, stream: "Stream") -> Tensor:
        """The value as it is, for a sum is as wide as its wider part; rounded for a stream on a grid."""
        return stream.rounded(value) if stream.grid else value


class AffineCoupling(Coupling):
    """The block y1 = x1 exp(s) + t with (s, t) = f(x2), y2 = x2 exp(s') + t' with (s', t') = g(y1).

    `f` and `g` map (B, C/2, ...) to (B, C, ...): the first half of their channels is the raw log-scale, the second the
    shift. The log-scale is `limit` tanh(raw / limit), so that a block neither stretches nor shrinks a half by more than
    exp(limit): rounding errors of the rebuilt stream grow with it.
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
    """The pair carried between blocks.

    A coupling is two half-steps of one form, `combine(target, branch(source))`, after which the two change roles:

        F: (x1, x2) -> (x2, y1)        G: (x2, y1) -> (y1, y2)

    so forward, inverse and rebuild need no case for F and G. The pair is float32 or wider whatever the branches
    compute in: a bfloat16 stream drifts by a factor of two over 128 blocks. A branch sees its source in the dtype
    that came in, and `merge` returns that dtype.

    A stream on a `grid`, a power of two, holds multiples of it alone. Sums of them are exact in float32 up to 2^24
    grids, so that subtraction undoes addition to the bit.
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
        """Cut x (B, C, ...) into two dense halves (B, C/2, ...) in float32 or wider.

        `dtype`, of the branches, and `layout`, of the halves, are x's if not given.
        """
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"a reversible block needs floating-point numbers, but its input is {x.dtype}; convert it")
        if x.dim() < 2 or x.shape[1] % 2:
            raise ValueError(
                f"a reversible block needs an even number of channels in dimension 1 to split, but its input has "
                f"shape {tuple(x.shape)}; change the channels to an even number"
            )
        wide = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
        layout = memory_format(x) if layout is None else layout
        x1, x2 = (half.to(wide).contiguous(memory_format=layout) for half in x.chunk(2, dim=1))
        stream = cls(x1, x2, x.dtype if dtype is None else dtype, grid=grid)
        return stream.pair(stream.rounded(x1), stream.rounded(x2)) if grid else stream

    def merge(self) -> Tensor:
        """Join the halves: (B, C, ...) in the dtype that came in."""
        return torch.cat((self.target, self.source), dim=1).to(self.dtype)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(target, source)."""
        return self.target, self.source

    def branch_input(self) -> Tensor:
        """What a branch sees: the source in the dtype that came in."""
        return self.source.to(self.dtype)

    def pair(self, target: Tensor, source: Tensor) -> "Stream":
        """Other halves of the same kind."""
        return Stream(target, source, self.dtype, grid=self.grid)

    def rewound(self) -> "Stream":
        """The same pair with its roles before the last half-step: `target` is what that step changed."""
        return self.pair(self.source, self.target)

    def rounded(self, value: Tensor) -> Tensor:
        """The nearest multiple of the grid, with the gradient of the value."""
        return _Rounded.apply(value.to(self.target.dtype), self.grid)


class _Rounded(torch.autograd.Function):
    """To the nearest multiple of a power of two; the gradient passes through."""

    @staticmethod
    def forward(ctx, value, grid):
        return torch.round(value / grid).mul_(grid)  # scaling by a power of two rounds nothing

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def version_of(tensor: Tensor) -> int | None:
    """The count of in-place changes; None for a tensor of inference mode, which has none."""
    return None if tensor.is_inference() else tensor._version


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that a dense copy of x should keep, so that replayed kernels see what the first ones saw."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
        return channels_last
    return torch.contiguous_format
