"""The public entry point: ReversibleSequence, whose backward needs only the last output of its blocks.

Stored activations of n blocks take memory in proportion to n. Here backward rebuilds each block's input from its
output, so the memory of a sequence does not depend on its depth (Gomez et al., "The Reversible Residual Network",
2017). The cost is at most one additional evaluation of each branch. `recompute_context.py` explains the mechanism.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from memsave.reversible._torch_internals import uncompiled
from memsave.reversible.coupling import AdditiveCoupling, Stream
from memsave.reversible.fused import ENGINES, RecomputableBranch, refusal
from memsave.reversible.recompute_context import RecomputeContext, Step
from memsave.reversible.steps import steps_of


class InvertibleBlock(Protocol):
    """A block of a `ReversibleSequence` that is no coupling: maps (B, C, ...) to the same dtype, and back."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x to y; both have an even number of channels."""

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y."""


class ReversibleSequence(nn.Module):
    """Reversible blocks in a row, with their activations rebuilt in backward or stored.

    With `recompute=True` backward rebuilds the activations inside the blocks. With `recompute=False` they are stored:
    the same function, as a reference. The flag may be changed between steps. Under `torch.no_grad()` nothing is kept in
    either mode.

    Input and output have shape (B, C, ...), C even, and the same dtype. Between blocks the stream is float32 or wider.

    A block is a `Coupling`, whose branches are evaluated once more in backward, or any module with a method `inverse`
    (see `InvertibleBlock`), for which backward evaluates the inverse and the forward. Other modules raise TypeError.

    **Requirements.** Blocks must be deterministic, given their input, random numbers, parameters and buffers. Branches
    should end with a normalisation, because the rounding errors of the rebuilt stream grow from block to block with the
    gain of the branches: slowly if each branch ends with a GroupNorm, beyond all digits within about ten blocks if the
    branches are convolutions and ReLUs without a norm. `anchor_every=k` keeps the input of every k-th block and
    restarts there, at a cost of one stream tensor each; `memsave.reversible.verify` reports whether that is needed.

    **Grid.** `grid=2**-14` rounds the stream, and what branches add to it, to multiples of that power of two. Sums are
    then exact while no entry exceeds 2^24 grids, here 1024. The rebuilt stream then equals that of the forward exactly,
    at any depth and with bfloat16 branches, too. The rounding is part of the function in both modes; its gradient is
    taken as one (straight-through). Only for `AdditiveCoupling`.

    **Engines.** `engine` may be changed between steps. "hooks" rebuilds what any branch saved. "fused" calls branches
    that can recompute themselves (`RecomputableBranch`, such as `memsave.models.MBConv3d`) once for value and
    gradients. It needs less memory and differs from the stored network by rounding; its gradients cannot be
    differentiated again. It serves only additive couplings of such branches; the forward raises ValueError for any
    other block. "auto" chooses fused for the blocks that support it, and hooks for the others, for example those with
    hooks or a replaced forward on the modules of a branch; `engines()` returns the choice.

    Register hooks on `f` or `g`: the sequence calls these and does not call a coupling as a module. `torch.func`
    transforms do not support saved-tensor hooks; use `recompute=False` with them.
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
            steps_of(block, name=f"block {number}")  # raises TypeError for a block that cannot be inverted
            if grid is not None and getattr(type(block), "combine", None) is not AdditiveCoupling.combine:
                raise TypeError(
                    f"block {number} is a {type(block).__name__}, which is not exactly invertible on a grid; "
                    f"make it an AdditiveCoupling, or set grid=None"
                )
        self.engines()  # raises ValueError if engine="fused" cannot serve a block

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) through all blocks; ValueError when C is odd."""
        if not self.blocks:
            return x
        if self.recompute and torch.is_grad_enabled():
            return self._recomputed(x)
        stream = self.split(x)
        for step in chain.from_iterable(self.steps()):
            stream = step.forward(stream)
        return stream.merge()

    @uncompiled  # a compiled branch may save other tensors when it is rebuilt
    def _recomputed(self, x: Tensor) -> Tensor:
        context = RecomputeContext()
        streams = self.run_steps(self.split(x), context)  # no other reference, so that each step frees the one before
        (last,) = deque(streams, maxlen=1)
        return context.merge(last)

    def run_steps(self, stream: Stream, context: RecomputeContext) -> Iterator[Stream]:
        """Run all steps in the context, which also keeps the anchors; yield the stream after each step."""
        for number, steps in enumerate(self.steps()):
            if self.anchor_every and number and number % self.anchor_every == 0:
                context.keep(stream)
            for step in steps:
                stream = context.run(step, stream)
                yield stream

    def split(self, x: Tensor) -> Stream:
        """The stream before the first block, in the memory format of the fused branches if they agree on one."""
        engines = self.engines() if self.recompute else []
        fused = (block for block, engine in zip(self.blocks, engines) if engine == "fused")
        layouts = {cast(RecomputableBranch, block.f).layout for block in fused}
        return Stream.split(x, grid=self.grid, layout=layouts.pop() if len(layouts) == 1 else None)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y, up to rounding; with dropout only in evaluation mode."""
        if not self.blocks:
            return y
        stream = Stream.split(y, grid=self.grid)
        for step in reversed(list(chain.from_iterable(self.steps()))):
            stream = step.inverse(stream)
        return stream.merge()

    def steps(self) -> Iterator[list[Step]]:
        """Yield the steps of each block, first to last."""
        engines = self.engines() if self.recompute else ["hooks"] * len(self.blocks)
        for number, (block, engine) in enumerate(zip(self.blocks, engines, strict=True)):
            yield steps_of(block, name=f"blocks.{number}", fused=engine == "fused")

    def engines(self) -> list[str]:
        """The engine of each block, "fused" or "hooks"; ValueError if engine="fused" cannot serve a block."""
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
