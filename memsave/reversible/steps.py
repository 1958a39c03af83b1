"""One step of the stream, forward and rebuilt: half a coupling, or a block with an inverse of its own.

A step is rebuilt by evaluating what it evaluated once more, which makes again what it saved, and by undoing it on the
way. A half-step's branch is evaluated once for both. A block with its own inverse is evaluated twice: inverse, forward.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import LOW_PRECISION, AdditiveCoupling, Coupling, Stream, version_of
from memsave.reversible.fused import FusedHalfStep


@dataclass
class Rebuild:
    """How a step makes again what it saved."""

    state: Callable[[], AbstractContextManager[Any]]
    """Enter it to evaluate: random numbers, autocast and tensors are as they were."""
    saving: Callable[[], AbstractContextManager[Any]]
    """The same, and what autograd saves is kept."""
    wanting: Callable[[], bool]
    """Whether something that was saved in the forward has not been made again yet."""
    needs: tuple[bool, bool]
    """Whether (target, source) required a gradient."""


class Step(Protocol):
    """What `frame.Frame` asks of a step."""

    @property
    def name(self) -> str:
        """How messages call it."""

    def modules(self) -> Iterator[nn.Module]:
        """What it reads besides the stream."""

    def forward(self, stream: Stream) -> Stream:
        """The stream behind the step."""

    def inverse(self, stream: Stream) -> Stream:
        """The stream before the step, on new random numbers."""


class HookedStep(Step, Protocol):
    """A step whose saved tensors are made again."""

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """The stream before the step, from the one behind it; or, without `undo`, from itself."""


class HalfStep(NamedTuple):
    """One branch of a coupling."""

    name: str
    coupling: Coupling
    branch: nn.Module

    def modules(self) -> Iterator[nn.Module]:
        """The coupling itself, in case that it has parameters, and the branch with all that is inside."""
        yield self.coupling
        yield from self.branch.modules()

    def forward(self, stream: Stream) -> Stream:
        """combine(target, branch(source))."""
        return self.coupling.half_step(stream, self.branch)

    def inverse(self, stream: Stream) -> Stream:
        """separate(target, branch(source))."""
        return self.coupling.half_step_back(stream, self.branch)

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """One evaluation of the branch, and one of `combine` where that saved anything."""
        before = stream.rewound() if undo else stream
        target = before.target
        with rebuild.saving():
            value = self.branch(_leaf(before.branch_input(), needs=rebuild.needs[1]))
            value = self.coupling.admit(value, before)
            if undo:
                with torch.no_grad():
                    target = self.coupling.undo(target, value)
            if rebuild.wanting():
                self.coupling.combine(_leaf(target, needs=rebuild.needs[0]), value)
        return before.pair(target, before.source)


class WholeStep(NamedTuple):
    """A block that knows its inverse: y = block(x), x = block.inverse(y)."""

    name: str
    block: Any

    def modules(self) -> Iterator[nn.Module]:
        """The block with all that is inside."""
        yield from self.block.modules()

    def forward(self, stream: Stream) -> Stream:
        """block(x)."""
        if stream.dtype in LOW_PRECISION:
            raise ValueError(
                f"{self.name} ({type(self.block).__name__}) has an inverse of its own, whose rounding in "
                f"{stream.dtype} could not be undone; give the sequence a float32 input"
            )
        x = stream.merge()
        version = version_of(x)
        after = self._split(self.block(x), stream, method="forward")
        if version_of(x) != version:
            raise RuntimeError(
                f"{self.name} ({type(self.block).__name__}) changed its input in place; make its first operation one "
                f"that is not (inplace=False)"
            )
        return after

    def inverse(self, stream: Stream) -> Stream:
        """block.inverse(y)."""
        return self._split(self.block.inverse(stream.merge()), stream, method="inverse")

    def _split(self, y: Any, stream: Stream, *, method: str) -> Stream:
        if not isinstance(y, Tensor) or torch.promote_types(y.dtype, stream.target.dtype) != y.dtype:
            given = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{method} of {self.name} ({type(self.block).__name__}) gave {given} for {stream.target.dtype}, which "
                f"could not be undone; return a tensor of that dtype, with autocast switched off inside"
            )
        return Stream.split(y, stream.dtype)

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """The inverse, and the forward where that saved anything."""
        before = stream
        if undo:
            with rebuild.state(), torch.no_grad():
                before = self.inverse(stream)
        if rebuild.wanting():
            with rebuild.saving():
                self.block(_leaf(before.merge(), needs=any(rebuild.needs)))
        return before


def steps_of(block: nn.Module, *, name: str, fused: bool = False) -> list[Step]:
    """The steps of a block, for the engine that serves it; TypeError for one that cannot be undone."""
    kind = type(block)
    if fused:
        assert isinstance(block, AdditiveCoupling)
        return [FusedHalfStep(f"{name}.{each}", block, block.get_submodule(each)) for each in ("f", "g")]
    plain = (Coupling.forward, Coupling.forward_stream, Coupling.half_step, Coupling.half_step_back)
    if isinstance(block, Coupling) and all(getattr(kind, each.__name__) is each for each in plain):
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
    """How far up among its base classes the method is defined; -1 for one that the instance itself has."""
    return next((number for number, each in enumerate(kind.__mro__) if method in vars(each)), -1)


def _leaf(tensor: Tensor, *, needs: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs)
