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

from memsave.reversible.coupling import LOW_PRECISION, Coupling, Stream


@dataclass
class Rebuild:
    """How a step makes again what it saved."""

    state: Callable[[], AbstractContextManager[Any]]
    """Enter it to evaluate: random numbers, autocast and tensors are as they were, and what autograd saves is kept."""
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
        with rebuild.state():
            value = self.branch(_leaf(before.branch_input(), needs=rebuild.needs[1]))
            if undo:
                with torch.no_grad():
                    target = self.coupling.separate(target, value)
            if rebuild.wanting():
                self.coupling.combine(_leaf(target, needs=rebuild.needs[0]), value)
        return Stream(target, before.source, before.dtype)


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
        return Stream.split(self.block(stream.merge()), stream.dtype)

    def inverse(self, stream: Stream) -> Stream:
        """block.inverse(y)."""
        return Stream.split(self.block.inverse(stream.merge()), stream.dtype)

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """The inverse, and the forward where that saved anything."""
        before = stream
        if undo:
            with rebuild.state(), torch.no_grad():
                before = self.inverse(stream)
        if rebuild.wanting():
            with rebuild.state():
                self.block(_leaf(before.merge(), needs=any(rebuild.needs)))
        return before


def steps_of(block: nn.Module, *, name: str) -> list[Step]:
    """The steps of a block; TypeError for one that cannot be undone."""
    kind = type(block)
    own = [
        method for method in ("forward", "forward_stream", "half_step", "half_step_back") if _overridden(kind, method)
    ]
    if isinstance(block, Coupling) and not own:
        return [HalfStep(f"{name}.{each}", block, block.get_submodule(each)) for each in ("f", "g")]
    invertible = callable(getattr(block, "inverse", None))
    if isinstance(block, Coupling):
        invertible = _overridden(kind, "inverse")
    if not invertible:
        reason = f"overrides {own[0]}() and not inverse()" if isinstance(block, Coupling) else "has no inverse()"
        raise TypeError(
            f"{name} of a ReversibleSequence is a {kind.__name__}, which {reason}; wrap its two branches in an "
            f"AdditiveCoupling(f, g), or give it a method inverse(y) that undoes forward(x)"
        )
    return [WholeStep(name, block)]


def _overridden(kind: type, method: str) -> bool:
    return issubclass(kind, Coupling) and getattr(kind, method) is not getattr(Coupling, method)


def _leaf(tensor: Tensor, *, needs: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs)
