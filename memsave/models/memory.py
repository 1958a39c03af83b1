"""What a row of couplings keeps between forward and backward, by one word."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memsave.reversible import AdditiveCoupling, ReversibleSequence, Stream

MEMORY_MODES = ("stored", "checkpoint", "reversible")


def check_memory(mode: str) -> str:
    """The mode; ValueError for any other word."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"memory is {mode!r}; choose one of {', '.join(MEMORY_MODES)}")
    return mode


def run_blocks(sequence: nn.Module, x: Tensor, *, memory: str) -> Tensor:
    """(B, C, ...) through a `ReversibleSequence` of `AdditiveCoupling`s, one function in every mode.

    "checkpoint" keeps each block's input; in the other modes the sequence's own `recompute` says whether it keeps all
    activations or its output alone.
    """
    if memory != "checkpoint" or not torch.is_grad_enabled():
        return sequence(x)
    assert isinstance(sequence, ReversibleSequence)
    stream = Stream.split(x, grid=sequence.grid)
    for block in sequence.blocks:
        assert isinstance(block, AdditiveCoupling)
        stream = _checkpointed(block, stream)
    return stream.merge()


def _checkpointed(block: AdditiveCoupling, stream: Stream) -> Stream:
    """One block under a checkpoint: on the pair, since a join between blocks would round it under autocast."""

    def run(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return block.forward_stream(stream.pair(target, source)).halves()

    return stream.pair(*checkpoint(run, *stream.halves(), use_reentrant=False))
