"""Existing residual blocks as a reversible stack.

A row of blocks x -> x + F(x) computes x + F1 + F2 + ... Here two copies of x are used: each block changes one of them,
by twice its residual, and the result is their mean:

    x1 = x + 2 F1(x),    x2 = x + 2 F2(x1),    x3 = x1 + 2 F3(x2),    ...        y = (x[n-1] + x[n]) / 2

The two functions agree to first order in F. They differ to second order, because F2 is evaluated at x + 2 F1 instead of
x + F1. Each step is invertible. It is the midpoint rule for x' = F(x), of which a residual network is the Euler rule
(Chang et al., "Reversible Architectures for Arbitrarily Deep Residual Neural Networks", 2018). Parameters and cost are
those of the residual network.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import AdditiveCoupling
from memsave.reversible.sequence import ReversibleSequence


def from_residual(
    blocks: Iterable[nn.Module], *, recompute: bool = True, anchor_every: int | None = None, grid: float | None = None
) -> "ReversibleResidual":
    """Put residual blocks into a stack that rebuilds their activations: (B, C, ...) to (B, C, ...).

    The stack uses the blocks and their parameters without copies. A block is any module that keeps the shape of its
    input, with or without an activation after the sum. The stack is not the same function as the blocks in a row: with
    one block the two are equal, with several they agree to first order in what a block adds. Train the stack, or
    fine-tune it from trained blocks.

    The options are those of `ReversibleSequence`.

    The first forward raises ValueError for a block that changes the shape (a stride, more channels, a convolution as a
    shortcut), because its input cannot be rebuilt. Put such a block between two stacks.
    """
    return ReversibleResidual(blocks, recompute=recompute, anchor_every=anchor_every, grid=grid)


class ReversibleResidual(nn.Module):
    """The result of `from_residual`; `blocks` are the caller's blocks, `net` is the sequence of their couplings."""

    def __init__(self, blocks: Iterable[nn.Module], **options: Any):
        super().__init__()
        branches: list[nn.Module] = [ResidualBranch(block, number=number) for number, block in enumerate(blocks)]
        if not branches:
            raise ValueError("there are no residual blocks to make a stack of; give at least one")
        if len(branches) % 2:
            branches.append(ZeroBranch())
        pairs = zip(branches[::2], branches[1::2], strict=True)
        self.net = ReversibleSequence([AdditiveCoupling(f, g) for f, g in pairs], **options)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The caller's blocks, in order."""
        branches = (branch for pair in self.net.blocks for branch in pair.children())
        return [branch.block for branch in branches if isinstance(branch, ResidualBranch)]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to the mean of the two copies after all blocks, of the same shape."""
        one, other = self.net(torch.cat((x, x), dim=1)).chunk(2, dim=1)
        return (one + other) / 2


class ResidualBranch(nn.Module):
    """Twice the residual of a block: 2 (block(x) - x)."""

    def __init__(self, block: nn.Module, *, number: int):
        super().__init__()
        self.block, self.number = block, number

    def forward(self, x: Tensor) -> Tensor:
        """2 F(x), of x's shape."""
        y = self.block(x)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"residual block {self.number} ({type(self.block).__name__}) returned a {type(y).__name__}; wrap it "
                f"in a module that returns one tensor"
            )
        if y.shape != x.shape:
            raise ValueError(
                f"residual block {self.number} ({type(self.block).__name__}) turned {tuple(x.shape)} into "
                f"{tuple(y.shape)}, so that its input cannot be rebuilt; put it between two reversible stacks"
            )
        return 2 * (y - x)


class ZeroBranch(nn.Module):
    """A branch that adds zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of x's shape."""
        return torch.zeros_like(x)
