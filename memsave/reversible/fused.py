"""The fused engine: half a coupling as one node of the graph, for branches that know how to recompute themselves.

    forward     y1 = x1 + F(x2)                              nothing is saved
    backward    x1 = y1 - F(x2)     dx2 += J_F(x2)' dy1      in one call of the branch, which needs x2 and dy1 alone

Hooks (`frame.py`) make again whatever a branch saved, all of it at once. A `RecomputableBranch` takes value and
gradients apart by itself, in chunks perhaps, so that less than one branch's activations ever exists. Parameter
gradients go back to autograd node by node, as any layer's do; what is written in `frame.py` of who holds whom, and of
state, holds here, too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import AdditiveCoupling, Stream

if TYPE_CHECKING:
    from memsave.reversible.frame import Frame

ENGINES = ("auto", "fused", "hooks")


@runtime_checkable
class RecomputableBranch(Protocol):
    """A branch F that gives value and gradients without a graph; a module whose `forward` is F, too.

    `layout` is the memory format in which it takes x and grad without a copy. The tensors that the last two methods
    return, or give to `found`, are new, and the caller's to overwrite.
    """

    layout: torch.memory_format

    def refusal(self) -> str | None:
        """Why it cannot do so as it is now, after its name; None if it can."""

    def tensors(self) -> Sequence[Tensor]:
        """The parameters that it reads."""

    def evaluate(self, x: Tensor) -> Tensor:
        """F(x), of x's shape."""

    def differentiate(
        self, x: Tensor, grad: Tensor, *, found: Callable[[Tensor], None]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The gradients of sum(grad F(x)) by x and by each of `tensors()`, changing neither argument.

        Calls `found` with F(x), the very bits of `evaluate`, as soon as it has it, and holds on to it no longer. Draws
        the random numbers of one `evaluate`.
        """


class FusedHalfStep(NamedTuple):
    """One recomputable branch of an additive coupling."""

    name: str
    coupling: AdditiveCoupling
    branch: Any

    def modules(self) -> Iterator[nn.Module]:
        """The branch with all that is inside."""
        yield from self.branch.modules()

    def forward(self, stream: Stream) -> Stream:
        """target + branch(source), without a graph."""
        with torch.no_grad():
            value = self._admitted(self.branch.evaluate(stream.branch_input()), stream)
            return stream.pair(stream.source, _in_place_of(value, stream.target, torch.add))

    def inverse(self, stream: Stream) -> Stream:
        """target - branch(source), without a graph."""
        with torch.no_grad():
            before = stream.rewound()
            value = self._admitted(self.branch.evaluate(before.branch_input()), before)
            return before.pair(_in_place_of(value, before.target, torch.sub), before.source)

    def run(self, stream: Stream, frame: "Frame", number: int) -> Stream:
        """`forward` as one node of the graph: step `number` of the frame."""
        changed = _Half.apply(frame, number, stream, *stream.halves(), *self.branch.tensors())
        return stream.pair(stream.source, changed)

    def gradients(self, stream: Stream, grad: Tensor, *, undo: bool) -> tuple[Stream, Tensor, Sequence[Tensor]]:
        """(the stream before the step, the gradient of the source, those of the branch's tensors).

        `stream` is the one behind the step; or, without `undo`, the one before it.
        """
        held = [stream.rewound() if undo else stream]
        del stream

        def found(value: Tensor) -> None:
            if undo:  # at once, so that what is behind the step is let go of
                before = held.pop()
                value = self._admitted(value, before)
                held.append(before.pair(_in_place_of(value, before.target, torch.sub), before.source))

        x = held[0].branch_input()
        by_x, by_tensors = self.branch.differentiate(x, grad.to(x.dtype), found=found)
        return held[0], by_x.to(held[0].source.dtype), by_tensors

    def _admitted(self, value: Tensor, stream: Stream) -> Tensor:
        if value.shape != stream.target.shape:
            raise ValueError(
                f"{self.name} ({type(self.branch).__name__}) evaluated {tuple(stream.source.shape)} to "
                f"{tuple(value.shape)}; give it as many output channels as inputs"
            )
        return self.coupling.admit(value, stream)


def refusal(coupling: nn.Module) -> str | None:
    """Why hooks have to serve this block, in words that follow its name; None if the fused engine can."""
    kind = type(coupling)
    own = ("combine", "separate", "admit", "undo", "forward", "forward_stream", "half_step", "half_step_back")
    if any(getattr(kind, each, None) is not getattr(AdditiveCoupling, each) for each in own):
        return f"is a {kind.__name__} and no AdditiveCoupling"
    assert isinstance(coupling, AdditiveCoupling)
    for name, branch in (("f", coupling.f), ("g", coupling.g)):
        if not isinstance(branch, RecomputableBranch):
            return f"has a {type(branch).__name__} as {name}, which cannot recompute itself"
        why = branch.refusal()
        if why is not None:
            return f"cannot recompute {name}: {why}"
        for inner, module in branch.named_modules():
            if "forward" in vars(module):
                return f"has another forward on {'.'.join(filter(None, (name, inner)))}"
            if any(_matters(hook) for each in HOOKS for hook in vars(module)[each].values()):
                return f"has a hook on {'.'.join(filter(None, (name, inner)))}"
    return None


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _matters(hook: Any) -> bool:
    """Whether the hook has to run: not one that is marked `observes_only = True`, as a memory recorder's may be."""
    return not getattr(hook, "observes_only", False)


def _in_place_of(value: Tensor, target: Tensor, operation: Callable[..., Tensor]) -> Tensor:
    """operation(target, value), in the memory of the value where that is wide enough."""
    return operation(target, value, out=value) if value.dtype == target.dtype else operation(target, value)


class _Half(torch.autograd.Function):
    """Saves nothing: the frame has the stream."""

    @staticmethod
    def forward(ctx, frame, number, stream, target, source, *tensors):
        ctx.frame, ctx.number = frame, number
        return frame.records[number].step.forward(stream.pair(target, source)).source

    @staticmethod
    def backward(ctx, *grads):
        with torch.no_grad():
            by_source, by_tensors = ctx.frame.differentiate(ctx.number, grads[0])
        found = [grads[0], by_source, *by_tensors]
        if torch.is_grad_enabled():  # under create_graph=True
            name = ctx.frame.records[ctx.number].step.name
            found = _Once.apply(name, torch.empty(0, requires_grad=True), *found)
        return None, None, None, *found


class _Once(torch.autograd.Function):
    """What the fused engine returns has no derivative of its own."""

    @staticmethod
    def forward(ctx, name, anchor, *grads):
        ctx.name = name
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.name} was differentiated twice, which the fused engine cannot; give the sequence engine='hooks'"
        )
