"""Additive coupling: a residual block whose input follows from its output.

    y1 = x1 + F(x2)            x2 = y2 - G(y1)
    y2 = x2 + G(y1)            x1 = y1 - F(x2)

F and G are any modules that keep the shape of their input; they need no inverse of their own. x1, x2 are the halves
of x along dimension 1 (channels). Dinh et al., "NICE" (2014); Gomez et al., "The Reversible Residual Network" (2017).

This file is the mathematics alone. What is kept between forward and backward is decided in `sequence.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Branch = Callable[[Tensor], Tensor]
LOW_PRECISION = (torch.float16, torch.bfloat16)


class AdditiveCoupling(nn.Module):
    """The block y1 = x1 + f(x2), y2 = x2 + g(y1) on the two halves of dimension 1.

    Called by itself it is an ordinary module that stores its activations; inside a `ReversibleSequence` they are
    rebuilt. `f` and `g` map (B, C/2, ...) to (B, C/2, ...).
    """

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to y of the same shape and dtype; ValueError when C is odd."""
        return self.forward_stream(Stream.split(x)).merge()

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y, up to the rounding of one subtraction per half.

        A branch that draws random numbers (dropout in training mode) draws new ones here: not the inverse then.
        """
        return self.inverse_stream(Stream.split(y)).merge()

    def forward_stream(self, stream: "Stream") -> "Stream":
        """`forward` on the pair, as it passes from block to block."""
        return stream.step(self.f).step(self.g)

    def inverse_stream(self, stream: "Stream") -> "Stream":
        """`inverse` on the pair."""
        return stream.step_back(self.g).step_back(self.f)


class Stream:
    """The pair carried between blocks, and the half-steps that F and G make on it.

    A coupling block is two half-steps of one form, `target + branch(source)`, after which the two change roles:

        F: (x1, x2) -> (x2, y1)        G: (x2, y1) -> (y1, y2)

    so forward, inverse and rebuild need no case for F and G. The pair is float32 or wider whatever the branches
    compute in: a bfloat16 stream drifts by a factor of two over 128 blocks. A branch sees its source in the dtype
    that came in, and `merge` returns that dtype.
    """

    __slots__ = ("dtype", "source", "target")

    def __init__(self, target: Tensor, source: Tensor, dtype: torch.dtype):
        self.target = target
        self.source = source
        self.dtype = dtype

    @classmethod
    def split(cls, x: Tensor) -> "Stream":
        """Cut x (B, C, ...) into two dense halves (B, C/2, ...) in float32 or wider."""
        if x.dim() < 2 or x.shape[1] % 2:
            raise ValueError(
                f"a reversible block needs an even number of channels in dimension 1 to split, but its input has "
                f"shape {tuple(x.shape)}; change the channels to an even number"
            )
        wide = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
        layout = memory_format(x)
        x1, x2 = (half.to(wide).contiguous(memory_format=layout) for half in x.chunk(2, dim=1))
        return cls(x1, x2, x.dtype)

    def merge(self) -> Tensor:
        """Join the halves: (B, C, ...) in the dtype that came in."""
        return torch.cat((self.target, self.source), dim=1).to(self.dtype)

    def halves(self) -> tuple[Tensor, Tensor]:
        """(target, source)."""
        return self.target, self.source

    def branch_input(self) -> Tensor:
        """What a branch sees: the source in the dtype that came in."""
        return self.source.to(self.dtype)

    def add(self, value: Tensor) -> "Stream":
        """The half-step, given the value of its branch at `branch_input()`."""
        return Stream(self.source, self.target + value, self.dtype)

    def step(self, branch: Branch) -> "Stream":
        """target + branch(source), roles changed."""
        x = self.branch_input()
        version = version_of(x)
        value = branch(x)
        if version_of(x) != version:
            raise RuntimeError(
                f"the branch {type(branch).__name__} changed its input in place, and the stream with it; replace its "
                f"first in-place layer by one that is not (inplace=False)"
            )
        if value.shape != self.target.shape:
            raise ValueError(
                f"a branch of a coupling must keep the shape of its input, but {type(branch).__name__} turned "
                f"{tuple(self.source.shape)} into {tuple(value.shape)}; give it as many output channels as inputs"
            )
        return self.add(value)

    def rewound(self) -> "Stream":
        """The same pair with its roles before the last half-step: `target` is what that step changed."""
        return Stream(self.source, self.target, self.dtype)

    def step_back(self, branch: Branch) -> "Stream":
        """Undo `step(branch)`."""
        before = self.rewound()
        return before.subtract(branch(before.branch_input()))

    def subtract(self, value: Tensor) -> "Stream":
        """The inverse half-step on a rewound pair, given the value of its branch."""
        return Stream(self.target - value, self.source, self.dtype)


def version_of(tensor: Tensor) -> int | None:
    """The count of in-place changes; None for a tensor of inference mode, which has none."""
    return None if tensor.is_inference() else tensor._version


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that a dense copy of x should keep, so that replayed kernels see what the first ones saw."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
        return channels_last
    return torch.contiguous_format
