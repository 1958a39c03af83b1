"""Memory modes: what a sequence of couplings keeps between forward and backward."""

from functools import partial
from typing import Any

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

    form = stream.pair(torch.empty(0), torch.empty(0))  # the graph keeps `run`, which must not keep the halves

    def run(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return block.forward_stream(form.pair(target, source)).halves()

    return stream.pair(*checkpoint(run, *stream.halves(), use_reentrant=False))


class Checkpointed:
    """Replaces the forward of a module by one that is evaluated again in backward; its copy is that of a copied module.

    on: whether it does.
    """

    def __init__(self, module: nn.Module):
        self.module, self.on = module, False
        self._replaced = vars(module).get("forward")
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        own = self._replaced or partial(type(self.module).forward, self.module)
        if self.on and torch.is_grad_enabled():
            return checkpoint(own, *args, use_reentrant=False, **kwargs)
        return own(*args, **kwargs)
