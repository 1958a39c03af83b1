"""One's own residual blocks as a reversible stack.

Blocks x -> x + F(x) in a row add up: x + F1 + F2 + ... Here two copies of x take turns, each changed by every other
block by twice as much, and their mean is the result:

    x1 = x + 2 F1(x),    x2 = x + 2 F2(x1),    x3 = x1 + 2 F3(x2),    ...        y = (x[n-1] + x[n]) / 2

To first order of F that is the same sum; to the second it is not, since F2 sees x + 2 F1 in the place of x + F1. Each
step can be undone: it is the midpoint rule for x' = F(x), of which a residual network is the Euler rule (Chang et al.,
"Reversible Architectures for Arbitrarily Deep Residual Neural Networks", 2018). Parameters and cost stay as they were.
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

    The blocks are used as they are, with their parameters, and may be any modules that keep the shape of their input,
    with an activation behind the sum or without. The stack is not the function that the blocks were in a row: with one
    block it is; with several the two agree to first order of what a block adds. Train it, or fine-tune it from there.

    The options are those of `ReversibleSequence`.

    Raises ValueError, at the first forward, for a block that changes the shape (a stride, more channels, a convolution
    as a shortcut): nothing can be rebuilt across it. Leave it between two stacks.
    """
    return ReversibleResidual(blocks, recompute=recompute, anchor_every=anchor_every, grid=grid)


class ReversibleResidual(nn.Module):
    """The stack that `from_residual` makes; `blocks` are the caller's own, `net` is the sequence of their couplings."""

    def __init__(self, blocks: Iterable[nn.Module], **options: Any):
        super().__init__()
        own = list(blocks)
        if not own:
            raise ValueError("there are no residual blocks to make a stack of; give at least one")
        branches: list[nn.Module] = [ResidualBranch(block, number=number) for number, block in enumerate(own)]
        if len(branches) % 2:
            branches.append(Nothing())
        pairs = zip(branches[::2], branches[1::2], strict=True)
        self.net = ReversibleSequence([AdditiveCoupling(f, g) for f, g in pairs], **options)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The caller's blocks, in their order."""
        branches = (branch for pair in self.net.blocks for branch in pair.children())
        return [branch.block for branch in branches if isinstance(branch, ResidualBranch)]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to the mean of the two copies behind all blocks, of the same shape."""
        one, other = self.net(torch.cat((x, x), dim=1)).chunk(2, dim=1)
        return (one + other) / 2


class ResidualBranch(nn.Module):
    """Twice what a residual block adds to its input: 2 (block(x) - x)."""

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
                f"{tuple(y.shape)}, so that its input cannot be rebuilt; leave it between two reversible stacks"
            )
        return 2 * (y - x)


class Nothing(nn.Module):
    """A branch that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of x's shape."""
        return torch.zeros_like(x)
