"""Memory modes: what a sequence of couplings keeps between forward and backward."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memsave.reversible import AdditiveCoupling, ReversibleSequence, Stream
from memsave.reversible.steps import refuse_sharded

MEMORY_MODES = ("stored", "checkpoint", "reversible")


def check_memory(mode: str) -> str:
    """Return the mode; ValueError if it is not one of MEMORY_MODES."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"memory is {mode!r}; choose one of {', '.join(MEMORY_MODES)}")
    return mode


def run_blocks(sequence: nn.Module, x: Tensor, *, memory: str) -> Tensor:
    """Map x (B, C, ...) through a `ReversibleSequence` of `AdditiveCoupling`s; the function is the same in every mode.

    "checkpoint" keeps the input of each block. In the other modes the attribute `recompute` of the sequence decides
    whether it keeps all activations or only its output.
    """
    if memory != "checkpoint" or not torch.is_grad_enabled():
        return sequence(x)
    assert isinstance(sequence, ReversibleSequence)
    stream = Stream.split(x, grid=sequence.grid)
    for number, block in enumerate(sequence.blocks):
        assert isinstance(block, AdditiveCoupling)
        refuse_sharded(block, name=f"block {number}")
        stream = _checkpointed(block, stream)
    return stream.merge()


def _checkpointed(block: AdditiveCoupling, stream: Stream) -> Stream:
    """Checkpoint one block on the pair of halves, because merging them between blocks would round under autocast."""

    def run(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return block.forward_stream(stream.pair(target, source)).halves()

    return stream.pair(*checkpoint(run, *stream.halves(), use_reentrant=False))
