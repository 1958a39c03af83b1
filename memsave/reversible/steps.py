"""The steps of the hooks engine: half a coupling, or a whole block that has its own inverse.

Evaluating a step again creates the tensors that it saved. A half-step evaluates its branch once, for these tensors and
for inverting the step. A block with its own inverse is evaluated twice: inverse, then forward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memsave.reversible._torch_internals import is_fully_sharded, version_of
from memsave.reversible.coupling import LOW_PRECISION, AdditiveCoupling, Coupling, Stream
from memsave.reversible.fused import FusedHalfStep
from memsave.reversible.recompute_context import Rebuild, RecomputeContext, Step


class HalfStep(NamedTuple):
    """One branch of a coupling: a `Step`."""

    name: str
    coupling: Coupling
    branch: nn.Module

    def modules(self) -> Iterator[nn.Module]:
        """The coupling, which may have parameters, the branch and its submodules."""
        yield self.coupling
        yield from self.branch.modules()

    def forward(self, stream: Stream) -> Stream:
        """combine(target, branch(source))."""
        return self.coupling.half_step(stream, self.branch)

    def inverse(self, stream: Stream) -> Stream:
        """separate(target, branch(source))."""
        return self.coupling.half_step_back(stream, self.branch)

    def record(self, stream: Stream, context: RecomputeContext, number: int) -> Stream:
        """`forward`, which saves handles."""
        with context.saving_handles(number):
            return self.forward(stream)

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """Evaluate the branch once, and `combine` if that saved anything."""
        before = stream.undone() if undo else stream
        target = before.target
        with rebuild.saving():
            value = self.branch(_leaf(before.branch_input(), requires_grad=rebuild.requires_grad[1]))
            value = self.coupling.cast_to_stream(value, before)
            if undo:
                with torch.no_grad():
                    target = self.coupling.undo(target, value)
            if rebuild.is_incomplete():
                self.coupling.combine(_leaf(target, requires_grad=rebuild.requires_grad[0]), value)
        return before.pair(target, before.source)


class WholeStep(NamedTuple):
    """A block with its own inverse, y = block(x) and x = block.inverse(y): a `Step`."""

    name: str
    block: Any

    def modules(self) -> Iterator[nn.Module]:
        """The block and its submodules."""
        yield from self.block.modules()

    def forward(self, stream: Stream) -> Stream:
        """block(x)."""
        if stream.dtype in LOW_PRECISION:
            raise ValueError(
                f"{self.name} ({type(self.block).__name__}) has its own inverse(), which cannot undo the rounding of "
                f"{stream.dtype}; give the sequence a float32 input"
            )
        x = stream.merge()
        version = version_of(x)
        after = self._split(self.block(x), stream, method="forward")
        if version_of(x) != version:
            raise RuntimeError(
                f"{self.name} ({type(self.block).__name__}) changed its input in place; make its first operation out "
                f"of place (inplace=False)"
            )
        return after

    def inverse(self, stream: Stream) -> Stream:
        """block.inverse(y)."""
        return self._split(self.block.inverse(stream.merge()), stream, method="inverse")

    def record(self, stream: Stream, context: RecomputeContext, number: int) -> Stream:
        """`forward`, which saves handles."""
        with context.saving_handles(number):
            return self.forward(stream)

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """Evaluate the inverse, and the forward if that saved anything."""
        before = stream
        if undo:
            with rebuild.restored_state(), torch.no_grad():
                before = self.inverse(stream)
        if rebuild.is_incomplete():
            with rebuild.saving():
                self.block(_leaf(before.merge(), requires_grad=any(rebuild.requires_grad)))
        return before

    def _split(self, y: Any, stream: Stream, *, method: str) -> Stream:
        if not isinstance(y, Tensor) or torch.promote_types(y.dtype, stream.target.dtype) != y.dtype:
            given = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{method} of {self.name} ({type(self.block).__name__}) returned {given} for {stream.target.dtype}, "
                f"which cannot be inverted; return a tensor of that dtype, with autocast disabled inside"
            )
        return Stream.split(y, stream.dtype)


def refuse_sharded(block: nn.Module, *, name: str) -> None:
    """Raise ValueError for a block that FSDP shards as a whole: it is not called, so that FSDP would not gather it."""
    if is_fully_sharded(block):
        raise ValueError(
            f"{name} of a ReversibleSequence is sharded by fully_shard as a whole, but the sequence calls the modules "
            f"inside it; call fully_shard on these (f and g of a coupling), or on the sequence"
        )


def steps_of(block: nn.Module, *, name: str, fused: bool = False) -> list[Step]:
    """The steps of a block, with the fused engine or with hooks; TypeError if the block cannot be inverted."""
    refuse_sharded(block, name=name)
    kind = type(block)
    if fused:
        assert isinstance(block, AdditiveCoupling)
        return [FusedHalfStep(f"{name}.{each}", block, block.get_submodule(each)) for each in ("f", "g")]
    methods = (Coupling.forward, Coupling.forward_stream, Coupling.half_step, Coupling.half_step_back)
    if isinstance(block, Coupling) and all(getattr(kind, each.__name__) is each for each in methods):
        return [HalfStep(f"{name}.{each}", block, block.get_submodule(each)) for each in ("f", "g")]
    if not callable(getattr(block, "inverse", None)):
        reason = "has no inverse()"
    elif _depth(kind, "inverse") > _depth(kind, "forward"):
        reason = "overrides forward() and not inverse()"
    else:
        return [WholeStep(name, block)]
    raise TypeError(
        f"{name} of a ReversibleSequence is a {kind.__name__}, which {reason}; wrap its two branches in an "
        f"AdditiveCoupling(f, g), or give it a method inverse(y) that undoes forward(x)"
    )


def _depth(kind: type, method: str) -> int:
    """The index in the MRO of the first class that defines the method; -1 if none does (an instance attribute)."""
    return next((index for index, each in enumerate(kind.__mro__) if method in vars(each)), -1)


def _leaf(tensor: Tensor, *, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)
