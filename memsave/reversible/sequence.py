"""A sequence of reversible blocks whose backward needs their last output alone.

Stored activations of n blocks take memory in proportion to n. Here backward rebuilds each block's input from its
output, so that the memory of a sequence does not depend on its depth (Gomez et al. 2017); the price is at most one
more evaluation of each branch. The mechanism is told in `frame.py`.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import AdditiveCoupling, Branch, Stream
from memsave.reversible.frame import Frame


class ReversibleSequence(nn.Module):
    """Blocks in a row: one function, with or without its activations.

    With `recompute=True` the activations inside the blocks are rebuilt in backward; with `recompute=False` they are
    stored, which gives the plain twin to compare with. The flag may be changed between steps. Under `torch.no_grad()`
    nothing is held either way.

    Input and output have shape (B, C, ...), C even, and one dtype. Between blocks the stream is float32 or wider.

    What it asks of the branches: to do the same when given the same input, random numbers and tensors, and to be
    normalised at their end. Rounding errors of the rebuilt stream grow from block to block with the gain of the
    branches: slowly when each ends in a GroupNorm, past all digits within some ten blocks when they are convolutions
    and ReLUs without any norm. Compare with `recompute=False` when in doubt.

    A hook belongs on `f` or `g`: the sequence calls these, and a block not as a module. `torch.func` transforms do not
    support saved-tensor hooks; give them `recompute=False`.
    """

    def __init__(self, blocks: Iterable[AdditiveCoupling], *, recompute: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute
        for number, block in enumerate(self.blocks):
            if type(block) is not AdditiveCoupling:  # the forward of a subclass would not be called
                raise TypeError(
                    f"block {number} of a ReversibleSequence is a {type(block).__name__}, not an "
                    f"AdditiveCoupling itself; wrap its two branches in an AdditiveCoupling(f, g)"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) through all blocks; ValueError when C is odd."""
        if not self.blocks:
            return x
        stream = Stream.split(x)
        if not (self.recompute and torch.is_grad_enabled()):
            for block in self.couplings():
                stream = block.forward_stream(stream)
            return stream.merge()
        frame = Frame()
        for name, branch in self._branches():
            stream = frame.run(branch, stream, name=name)
        output = stream.merge()
        frame.keep(stream, output)
        return output

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y, up to rounding; with dropout, in evaluation mode alone."""
        if not self.blocks:
            return y
        stream = Stream.split(y)
        for block in reversed(list(self.couplings())):
            stream = block.inverse_stream(stream)
        return stream.merge()

    def couplings(self) -> Iterator[AdditiveCoupling]:
        """The blocks, first to last."""
        for block in self.blocks:
            assert isinstance(block, AdditiveCoupling)
            yield block

    def _branches(self) -> Iterator[tuple[str, Branch]]:
        for number, block in enumerate(self.couplings()):
            yield f"blocks.{number}.f", block.f
            yield f"blocks.{number}.g", block.g

    def extra_repr(self) -> str:
        """Show the flag in repr()."""
        return f"recompute={self.recompute}"
