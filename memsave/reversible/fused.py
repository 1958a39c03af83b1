"""The fused engine: half a coupling as one autograd node, for branches that can recompute themselves.

    forward     y1 = x1 + F(x2)                              nothing is saved
    backward    x1 = y1 - F(x2)     dx2 += J_F(x2)' dy1      one call of the branch, with x2 and dy1 as arguments

The hooks engine (`recompute_context.py`) rebuilds everything that a branch saved, all at once. A `RecomputableBranch`
computes its value and its gradients itself, for example in chunks, so that less than one branch's activations exist at
a time. Parameter gradients are returned to autograd by each node, as by any layer. The rules on ownership and state in
`recompute_context.py` apply here, too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from memsave.reversible._torch_internals import hooks_of, is_fully_sharded
from memsave.reversible.coupling import AdditiveCoupling, Stream
from memsave.reversible.recompute_context import Rebuild, RecomputeContext
from memsave.reversible.stream_nodes import anchor_like

ENGINES = ("auto", "fused", "hooks")


@runtime_checkable
class RecomputableBranch(Protocol):
    """A module whose `forward` is F and that can also compute F and its gradients without a graph.

    `layout` is the memory format in which it reads x and grad without a copy. The tensors that the last two methods
    return, or pass to `found`, are new, and the caller may overwrite them.
    """

    layout: torch.memory_format

    def refusal(self) -> str | None:
        """Why the branch cannot recompute itself in its current state, for an error message; None if it can."""

    def tensors(self) -> Sequence[Tensor]:
        """The parameters that F reads."""

    def evaluate(self, x: Tensor) -> Tensor:
        """F(x), of x's shape."""

    def differentiate(
        self, x: Tensor, grad: Tensor, *, found: Callable[[Tensor], None]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The gradients of sum(grad F(x)) with respect to x and to each of `tensors()`; changes neither argument.

        Calls `found` with F(x), bit for bit the result of `evaluate`, as soon as F(x) is computed, and keeps no
        reference to it. Draws the random numbers of one `evaluate`.
        """


class FusedHalfStep(NamedTuple):
    """One recomputable branch of an additive coupling: a `Step`."""

    name: str
    coupling: AdditiveCoupling
    branch: Any

    def modules(self) -> Iterator[nn.Module]:
        """The branch and its submodules."""
        yield from self.branch.modules()

    def forward(self, stream: Stream) -> Stream:
        """target + branch(source), without a graph."""
        with torch.no_grad():
            value = self._checked(self.branch.evaluate(stream.branch_input()), stream)
            return stream.pair(stream.source, _into_value(torch.add, stream.target, value))

    def inverse(self, stream: Stream) -> Stream:
        """target - branch(source), without a graph."""
        with torch.no_grad():
            before = stream.undone()
            return self._subtract(self.branch.evaluate(before.branch_input()), before)

    def record(self, stream: Stream, context: RecomputeContext, number: int) -> Stream:
        """`forward` as one autograd node."""
        changed = _FusedFunction.apply(self, context, number, stream, *stream.halves(), *self.branch.tensors())
        return stream.pair(stream.source, changed)

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """The inverse, in the state of the forward; nothing was saved."""
        with rebuild.restored_state():
            return self.inverse(stream) if undo else stream

    def gradients(self, stream: Stream, grad: Tensor, *, undo: bool) -> tuple[Stream, Tensor, Sequence[Tensor]]:
        """(the stream before the step, the gradient of the source, the gradients of the branch's tensors).

        `stream` is the stream after the step with `undo`, and the stream before it without.
        """
        held = [stream.undone() if undo else stream]
        del stream

        def found(value: Tensor) -> None:
            if undo:  # immediately, so that the stream after the step is freed
                held.append(self._subtract(value, held.pop()))

        x = held[0].branch_input()
        grad_x, grad_tensors = self.branch.differentiate(x, grad.to(x.dtype), found=found)
        return held[0], grad_x.to(held[0].source.dtype), grad_tensors

    def _subtract(self, value: Tensor, before: Stream) -> Stream:
        value = self._checked(value, before)
        return before.pair(_into_value(torch.sub, before.target, value), before.source)

    def _checked(self, value: Tensor, stream: Stream) -> Tensor:
        if value.shape != stream.target.shape:
            raise ValueError(
                f"{self.name} ({type(self.branch).__name__}) evaluated {tuple(stream.source.shape)} to "
                f"{tuple(value.shape)}; give it as many output channels as inputs"
            )
        return self.coupling.cast_to_stream(value, stream)


def refusal(coupling: nn.Module) -> str | None:
    """Why this block needs the hooks engine, as a phrase that follows its name; None if the fused engine can serve it.

    The phrase says, for example, "has a hook on f".
    """
    kind = type(coupling)
    methods = ("combine", "separate", "cast_to_stream", "undo", "forward", "forward_stream", "half_step")
    if any(getattr(kind, each, None) is not getattr(AdditiveCoupling, each) for each in (*methods, "half_step_back")):
        return f"is a {kind.__name__} and no AdditiveCoupling"
    assert isinstance(coupling, AdditiveCoupling)
    for name, branch in (("f", coupling.f), ("g", coupling.g)):
        if not isinstance(branch, RecomputableBranch):
            return f"has a {type(branch).__name__} as {name}, which cannot recompute itself"
        for inner, module in branch.named_modules():
            if is_fully_sharded(module):
                where = ".".join(filter(None, (name, inner)))
                return f"has {where} sharded by fully_shard, which would not gather what the fused engine reads"
        reason = branch.refusal()
        if reason is not None:
            return f"cannot recompute {name}: {reason}"
        for inner, module in branch.named_modules():
            if "forward" in vars(module):
                return f"has a replaced forward on {'.'.join(filter(None, (name, inner)))}"
            if not all(map(_only_observes, hooks_of(module))):
                return f"has a hook on {'.'.join(filter(None, (name, inner)))}"
    return None


def _only_observes(hook: Any) -> bool:
    """Whether the hook may be skipped: it has `observes_only = True`, as the hooks of a memory recorder have."""
    return getattr(hook, "observes_only", False)


def _into_value(operation: Callable[..., Tensor], target: Tensor, value: Tensor) -> Tensor:
    """operation(target, value), in the memory of `value` if the dtypes are equal."""
    return operation(target, value, out=value) if value.dtype == target.dtype else operation(target, value)


class _FusedFunction(torch.autograd.Function):
    """Saves nothing: backward takes the stream from the context."""

    @staticmethod
    def forward(
        ctx: Any, step: Any, context: Any, number: int, stream: Any, target: Tensor, source: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.step, ctx.context, ctx.number = step, context, number
        return step.forward(stream.pair(target, source)).source

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grad_source, grad_tensors = ctx.context.differentiate(ctx.number, ctx.step.gradients, grads[0])
        outputs = [grads[0], grad_source, *grad_tensors]
        if torch.is_grad_enabled():  # under create_graph=True
            outputs = _OnceDifferentiable.apply(ctx.step.name, anchor_like(grads[0]), *outputs)
        return None, None, None, None, *outputs


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on gradients, which raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} was differentiated twice, which the fused engine does not support; give the sequence "
            f"engine='hooks'"
        )
