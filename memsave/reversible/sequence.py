"""A sequence of reversible blocks whose backward needs their last output alone.

Stored activations of n blocks take memory in proportion to n. Here backward rebuilds each block's input from its
output, so that the memory of a sequence does not depend on its depth (Gomez et al. 2017); the price is at most one
more evaluation of each branch. The mechanism is told in `frame.py`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import AdditiveCoupling, Stream
from memsave.reversible.frame import Frame
from memsave.reversible.fused import ENGINES, RecomputableBranch, refusal
from memsave.reversible.steps import Step, steps_of


class InvertibleBlock(Protocol):
    """A module that a `ReversibleSequence` takes besides couplings: (B, C, ...) to the same dtype, and back."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x to y; C even on both sides."""

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y."""


class ReversibleSequence(nn.Module):
    """Blocks in a row: one function, with or without its activations.

    With `recompute=True` the activations inside the blocks are rebuilt in backward; with `recompute=False` they are
    stored, which gives the plain twin to compare with. The flag may be changed between steps. Under `torch.no_grad()`
    nothing is held either way.

    Input and output have shape (B, C, ...), C even, and one dtype. Between blocks the stream is float32 or wider.

    A block is a `Coupling`, whose branches are evaluated once more in backward, or any module with a method `inverse`
    (see `InvertibleBlock`), which takes an inverse and a forward there. TypeError for anything else.

    What it asks of them: to do the same when given the same input, random numbers and tensors, and of branches to be
    normalised at their end. Rounding errors of the rebuilt stream grow from block to block with the gain of the
    branches: slowly when each ends in a GroupNorm, past all digits within some ten blocks when they are convolutions
    and ReLUs without any norm. `anchor_every=k` keeps every k-th block's input and so starts afresh there, for one
    stream tensor each; `memsave.reversible.verify` says whether that is needed.

    `grid=2**-14` rounds the stream, and what branches add to it, to multiples of that power of two. Sums are then exact
    as long as no entry exceeds 2^24 grids, here 1024, and the rebuilt stream is the forward's to the bit, at any depth
    and with bfloat16 branches, too. The rounding is part of the function, stored or not; its gradient is taken to be
    one. For `AdditiveCoupling` alone.

    `engine`, which may be changed between steps, too, says how blocks are rebuilt. "hooks" make again what any branch
    saved. "fused" asks additive couplings of branches that can recompute themselves (`RecomputableBranch`, such as
    `memsave.models.MBConv3d`) for value and gradients in one call; they need less memory and differ from the stored
    network by rounding, but their gradients cannot be differentiated again; ValueError in the forward where a block is
    not of that kind. "auto" is fused for the blocks that can and hooks for the others, among them those with hooks on a
    branch's modules or another forward put on them; `engines()` says which.

    A hook belongs on `f` or `g`: the sequence calls these, and a coupling not as a module. `torch.func` transforms do
    not support saved-tensor hooks; give them `recompute=False`.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        recompute: bool = True,
        anchor_every: int | None = None,
        grid: float | None = None,
        engine: str = "auto",
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; choose one of {', '.join(ENGINES)}")
        self.engine = engine
        self.grid = grid
        if anchor_every is not None and anchor_every < 1:
            raise ValueError(f"anchor_every is {anchor_every}; give a number of blocks, or None")
        if grid is not None and not (grid > 0 and math.frexp(grid)[0] == 0.5):
            raise ValueError(f"grid is {grid}; give a power of two, such as 2**-14, or None")
        self.anchor_every = anchor_every
        for number, block in enumerate(self.blocks):
            steps_of(block, name=f"block {number}")  # or it is refused here
            if grid is not None and getattr(type(block), "combine", None) is not AdditiveCoupling.combine:
                raise TypeError(
                    f"block {number} is a {type(block).__name__}, which a stream on a grid cannot undo to the bit; "
                    f"make it an AdditiveCoupling, or set grid=None"
                )
        self.engines()  # or engine="fused" is refused here

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) through all blocks; ValueError when C is odd."""
        if not self.blocks:
            return x
        stream = self.split(x)
        if not (self.recompute and torch.is_grad_enabled()):
            for step in chain.from_iterable(self.steps()):
                stream = step.forward(stream)
            return stream.merge()
        return self._recomputed(stream)

    @torch.compiler.disable  # a compiled branch may save other tensors when it is rebuilt: a graph break instead
    def _recomputed(self, stream: Stream) -> Tensor:
        frame = Frame()
        steps = self.record(stream, frame)
        del stream  # each step lets go of the one before
        (last,) = deque(steps, maxlen=1)
        return frame.merge(last)

    def record(self, stream: Stream, frame: Frame) -> Iterator[Stream]:
        """The stream behind each step in turn, as the frame runs it, anchors being kept on the way."""
        for number, steps in enumerate(self.steps()):
            if self.anchor_every and number and number % self.anchor_every == 0:
                frame.keep(stream)
            for step in steps:
                stream = frame.run(step, stream)
                yield stream

    def split(self, x: Tensor) -> Stream:
        """The stream before the first block, laid out in memory as the blocks want it."""
        engines = self.engines() if self.recompute else []
        fused = (block for block, engine in zip(self.blocks, engines) if engine == "fused")
        layouts = {cast(RecomputableBranch, block.f).layout for block in fused}
        return Stream.split(x, grid=self.grid, layout=layouts.pop() if len(layouts) == 1 else None)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y, up to rounding; with dropout, in evaluation mode alone."""
        if not self.blocks:
            return y
        stream = Stream.split(y, grid=self.grid)
        for step in reversed(list(chain.from_iterable(self.steps()))):
            stream = step.inverse(stream)
        return stream.merge()

    def steps(self) -> Iterator[list[Step]]:
        """The steps of each block, first to last."""
        engines = self.engines() if self.recompute else ["hooks"] * len(self.blocks)
        for number, (block, engine) in enumerate(zip(self.blocks, engines, strict=True)):
            yield steps_of(block, name=f"blocks.{number}", fused=engine == "fused")

    def engines(self) -> list[str]:
        """Which engine rebuilds each block as it is now: "fused" or "hooks"; ValueError if engine="fused" cannot."""
        reasons = ["" if self.engine == "hooks" else refusal(block) for block in self.blocks]
        if self.engine == "fused" and any(reasons):
            number, reason = next((number, reason) for number, reason in enumerate(reasons) if reason)
            raise ValueError(f"engine is 'fused', but blocks.{number} {reason}; give engine='auto' or engine='hooks'")
        return ["fused" if reason is None else "hooks" for reason in reasons]

    def extra_repr(self) -> str:
        """Show the options in repr()."""
        anchors = "" if self.anchor_every is None else f", anchor_every={self.anchor_every}"
        grid = "" if self.grid is None else f", grid={self.grid}"
        fused = [refusal(block) for block in self.blocks].count(None)
        engine = f", engine={self.engine}"
        if self.engine == "auto":
            engine += f" (fused for {fused} of {len(self.blocks)} blocks, hooks for the others)"
        return f"recompute={self.recompute}{anchors}{grid}{engine}"
