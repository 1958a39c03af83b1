"""The per-example squared gradient norm is itself a gradient.

A layer runs with its parameters detached, so that autograd forms the gradient of its input as ever and none of its
weights. Its output then passes through `Tap`, an identity with one input more: a probe of shape (B,), whose value
nobody reads. The backward of the tap sees the output's gradient, which together with the layer's input is all that the
layer's per-example gradients depend on, and returns as the probe's gradient their squared norms. Autograd adds these up
over the model, so that

    torch.autograd.grad(losses.sum(), probe)  =  |grad of losses[b]|^2 for every b

whatever the control flow, checkpoints or replays in between: they are all graph. What a backward is for stands in the
call's own record, which every tap of that forward holds.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from memsave.ghost.gradients import (
    Dense,
    Gradient,
    InputTiles,
    Outer,
    cheapest,
    has_values,
    held_bytes,
    inner,
    magnitude,
    wide,
)
from memsave.ghost.graph import Traced
from memsave.ghost.groups import Groups
from memsave.ghost.refusals import Refusal, raise_refusals
from memsave.ghost.separation import Look

PerExample = Callable[[tuple[Tensor, ...], Tensor], dict[str, Gradient]]
"""(the layer's saved inputs, the output's gradient) to the per-example gradients by parameter name."""

ROUNDING = 4  # of Gram entries, each a product of two sums, in units of the last digit
COMPARED = 2**12  # elements of each example's activations that are compared between two passes, about
REPEATED = {torch.float64: 1e-8, torch.float32: 1e-4}  # sums of what a tap sees in two passes, relative to the norm


_holders = WeakIdKeyDictionary()  # parameter to a weak reference to the clipper that holds it


def hold(clipper: Any, parameters: Iterable[Tensor]) -> None:
    """Note that the gradients of these parameters are that clipper's."""
    reference = ref(clipper)
    for parameter in parameters:
        _holders[parameter] = reference


def release(clipper: Any) -> None:
    """Note that the clipper holds none any more."""
    for parameter in [p for p, holder in _holders.items() if holder() in (None, clipper)]:
        del _holders[parameter]


def clipper_of(parameter: Tensor) -> Any:
    """The clipper that holds the parameter, or None."""
    holder: ReferenceType | None = _holders.get(parameter)
    return None if holder is None else holder()


class Phase(Enum):
    """What a backward is for."""

    IDLE = auto()
    CHECK = auto()
    """Of some examples' losses alone: do they reach the rows of the others?"""
    NORM = auto()
    SUM = auto()


class Call:
    """One forward of the model: its batch size, its probe, what its backward is for, and its ledger.

    The ledger, keyed by parameter, holds one entry per use. Each new use adds its own squared norm and twice its inner
    product with the uses before it: |g1 + g2|^2 = |g1|^2 + 2 <g1, g2> + |g2|^2.

    Where terms cancel, such a sum of products has fewer digits than the gradient itself, and might come out too small.
    So a bound on its rounding error is added, ROUNDING eps m^2 with m the norm that the terms would have if nothing
    cancelled: a norm is then never too small, and too large by less than a thousandth even in float32, unless most of
    it cancels.
    """

    def __init__(self, *, batch_size: int, probe: Tensor):
        self.batch_size = batch_size
        self.probe = probe
        self.phase = Phase.IDLE
        self.layers: set[str] = set()
        """The names of the layers that ran."""
        self.uses: dict[nn.Parameter, int] = {}
        self.without_grad: set[str] = set()
        """The names of trainable layers that ran without grad."""
        self.traced: list[Traced] = []
        """The uses of layers that are differentiated by their own forward."""
        self.refusals: list[Refusal] = []
        """What the forward came upon."""
        self.task: int | None = None
        """Autograd's number of the backward that is running; a backward inside of it has another."""
        self.rematerialised = False
        """Whether some activations are not stored but made again in the backward."""
        self.ledger: dict[nn.Parameter, list[Gradient]] = {}
        self.magnitudes: dict[nn.Parameter, Tensor] = {}
        self.repeated: dict[str, Tensor] = {}
        """By layer, whether SUM saw the activations and gradients whose norms were measured."""
        self.keep_all = False
        """Whether the ledger keeps parameters that are used once, too: the sum is formed from it."""
        self.look: Look | None = None
        """What CHECK sees."""
        self.kept: Tensor | None = None
        """The examples of SUM, (B,); None for all of them."""
        self.weights: Tensor = probe
        """In SUM, the clip factors, (B,)."""
        self.tiles = InputTiles()
        """Products of the last input, for the next layer that sees the same."""
        self.room = 0
        """Bytes that may still be kept to save time."""
        self.plan: dict[str, tuple[str, int]] = {}
        """By use of a parameter, how its norm was found, and the bytes that its sum is formed from."""
        self.groups: Groups | None = None
        """In NORM, whose sums are formed on the way, each with factors of its own; None for one factor an example."""
        self.factors: Callable[[Tensor], Tensor] = torch.ones_like
        """From a group's norms (B,)."""
        self.lowest: Tensor = torch.ones_like(probe)
        """The smallest factor of any group, (B,)."""
        self.summed: set[int] = set()
        """The groups whose sums were added to `.grad`."""
        self._squares: dict[int, Tensor] = {}
        self._seen: dict[nn.Parameter, int] = {}
        self._passed: dict[int, int] = {}

    def count(self, parameter: nn.Parameter) -> None:
        """Note a use in the forward."""
        self.uses[parameter] = self.uses.get(parameter, 0) + 1

    def end(self) -> None:
        """Let go of what the backward held; no other may follow."""
        self.phase, self.kept, self.look = Phase.IDLE, None, None
        self.ledger.clear()
        self.magnitudes.clear()
        self.traced.clear()
        self.tiles = InputTiles()

    def refuse(self, refusal: Refusal) -> None:
        """Note what cannot be clipped; the forward raises all that it came upon at its end, a recomputation at once."""
        if graph_task() != -1:
            raise_refusals([refusal])
        self.refusals.append(refusal)

    @contextmanager
    def one_backward(self, losses: Tensor) -> Iterator[None]:
        """Within runs a backward of the losses; the taps know by its number when another one runs inside of it."""
        self.task = None

        def note(_: Tensor) -> None:
            self.task = graph_task()

        handle = losses.register_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def refuse_inner_backward(self, name: str) -> None:
        """The gradients of a backward inside the backward do not come from this one, nor do its norms reach it."""
        if self.task is not None and self.task != graph_task():
            raise ValueError(
                f"{name} was differentiated by a backward inside the backward, whose norms would be lost (reentrant "
                f"checkpoints and some reversible layers do that); freeze it, or use memsave.reversible or checkpoints "
                f"with use_reentrant=False"
            )

    def refuse_unlike_passes(self) -> None:
        """Sums of other activations than those whose norms were measured could exceed the bound."""
        for name, same in self.repeated.items():
            if has_values(same) and not same:
                raise ValueError(
                    f"{name} got other activations when they were computed again than those whose norms were measured "
                    f"(dropout with preserve_rng_state=False, or a random generator of its own); keep the random state "
                    f"in checkpoints, or take passes=1"
                )

    def add(self, parameter: nn.Parameter, gradient: Gradient, name: str) -> Tensor:
        """Enter a use; returns what it adds to the squared norms, (B,)."""
        seen = self._seen[parameter] = self._seen.get(parameter, 0) + 1
        if seen > self.uses.get(parameter, 0):
            raise ValueError(
                f"{name} was used {seen} times in the backward and {self.uses.get(parameter, 0)} times in the forward; "
                f"run the same layers when activations are computed again"
            )
        gradient = self._in_its_form(gradient, name)
        squared = inner(gradient, gradient, tiles=self.tiles)
        for earlier in self.ledger.get(parameter, ()):
            squared = squared + 2 * inner(gradient, earlier)
        several = self.uses.get(parameter, 0) > 1
        if several or isinstance(gradient, Outer):
            before = self.magnitudes.get(parameter, 0.0)
            after = self.magnitudes[parameter] = before + magnitude(gradient)
            squared = squared + ROUNDING * torch.finfo(squared.dtype).eps * (after**2 - before**2)
        if self.keep_all or several:
            self.ledger.setdefault(parameter, []).append(gradient)
        if self.groups is not None:
            self._pass(self.groups, parameter, squared)
        return squared

    def _in_its_form(self, gradient: Gradient, name: str) -> Gradient:
        chosen = cheapest(gradient, summed=self.keep_all, room=self.room)
        if not isinstance(gradient, Outer):
            return chosen
        kept = held_bytes(chosen) if self.keep_all else 0
        if self.keep_all and isinstance(chosen, Dense):  # one of those that are kept becomes the sum
            self.room -= max(0, kept - kept // len(chosen.values) - held_bytes(gradient))
        form = "gradients formed" if isinstance(chosen, Dense) else "Gram matrices"
        self.plan[name] = (form, kept)
        return chosen

    def _pass(self, groups: Groups, parameter: nn.Parameter, squared: Tensor) -> None:
        """Clip the parameter's group and form its sum, if this was the last use of any of its members."""
        group = groups.number[parameter]
        self._squares[group] = self._squares.get(group, 0.0) + squared
        self._passed[group] = self._passed.get(group, 0) + 1
        if self._passed[group] == sum(self.uses.get(member, 0) for member in groups.members[group]):
            self._clip(groups, group)

    def _clip(self, groups: Groups, group: int) -> None:
        self.summed.add(group)
        squared = self._squares.pop(group)
        factors = self.factors(root(squared))
        self.lowest = torch.minimum(self.lowest, factors)
        self.add_sums(groups.members[group], factors)

    def clip_the_rest(self) -> None:
        """The groups of which some use has no part in the losses."""
        if self.groups is not None:
            for group in list(self._squares):
                self._clip(self.groups, group)

    def add_sums(self, parameters: Iterable[nn.Parameter], weights: Tensor) -> None:
        """The clipped sums into `.grad`, the smallest parameter first, each freeing what its sum was formed from."""
        kept = weights != 0
        whole = not has_values(kept) or bool(kept.all())
        for parameter in sorted((p for p in parameters if p in self.ledger), key=Tensor.numel):
            gradients = sorted(self.ledger.pop(parameter), key=lambda each: isinstance(each, Outer) and each.one_hot)
            while gradients:
                gradient = gradients.pop(0)
                add_sum(parameter, gradient if whole else gradient.keep(kept), weights)


def root(squared: Tensor) -> Tensor:
    """Norms from their squares, which rounding may have made negative; NaN stays."""
    return torch.where(squared < 0, 0.0, squared).sqrt()


def graph_task() -> int:
    """Autograd's number of the backward that is running in this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


def add_sum(parameter: nn.Parameter, gradient: Gradient, weights: Tensor) -> None:
    """Add sum_b weights[b] g_b to `.grad`, in place where that is float32 or wider.

    The gradients of a complex parameter are of its real view.
    """
    before = parameter.grad
    if parameter.is_complex():
        total = torch.view_as_complex(gradient.weighted_sum(weights).contiguous()).to(parameter.dtype)
        parameter.grad = total if before is None else before.add_(total)
        return
    in_place = before is not None and before.dtype not in (torch.float16, torch.bfloat16)
    total = gradient.weighted_sum(weights, into=before if in_place else None, spare=True)
    if not in_place:
        total = total.to(parameter.dtype)
        parameter.grad = total.contiguous() if before is None else before.add_(total)


class Tap(torch.autograd.Function):
    """The identity on a layer's output (B, ...), with the layer's norms as the gradient of the probe."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, probe: Tensor, layer: "Tapped", call: Call, count: int, *tensors: Tensor
    ) -> Tensor:
        """`tensors` are `count` saved inputs, then the layer's trainable parameters in the order of `layer.names`."""
        ctx.layer, ctx.call, ctx.count = layer, call, count
        ctx.save_for_backward(*tensors[:count])
        ctx.parameters = tensors[count:]
        return output.detach()  # not a view to autograd, or what follows could not work in place on it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The output's gradient as it came, and in NORM the probe's; SUM adds to the parameters'."""
        (grad,) = grads
        call, nothing = ctx.call, [None] * (3 + ctx.count + len(ctx.parameters))
        if call.phase is Phase.IDLE:
            raise RuntimeError(
                "an ordinary backward ran through a model with a GhostClipper attached; call clipper.backward(losses), "
                "or clipper.close() first"
            )
        call.refuse_inner_backward(ctx.layer.name)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):  # or Gram products would be bfloat16
            if call.phase is Phase.CHECK:
                _ = ctx.saved_tensors  # a checkpoint keeps what it computed again until that is asked for
                call.look.note(ctx.layer.name, grad)
                return grad, None, *nothing
            saved = tuple(each.detach() for each in ctx.saved_tensors)  # or what is kept would keep the graph
            gradients = ctx.layer.per_example(saved, grad)
            if not call.keep_all and call.groups is None:
                formed = () if ctx.layer.traced is None else tuple(each.values for each in gradients.values())
                _compare_passes(ctx, (grad, *saved, *formed))
            named = [(p, name, gradients.pop(name)) for p, name in zip(ctx.parameters, ctx.layer.names, strict=True)]
            if call.phase is Phase.NORM:
                squared = torch.zeros_like(call.probe)
                for parameter, name, gradient in named:
                    if ctx.layer.traced is not None:
                        ctx.layer.traced.note(name, gradient.values)
                    squared += call.add(parameter, gradient, f"{ctx.layer.name}.{name}")
                return grad, squared, *nothing
            for parameter, _, gradient in named:  # into .grad, and not to autograd, which would hold it beside that
                add_sum(parameter, gradient if call.kept is None else gradient.keep(call.kept), call.weights)
            return grad, None, *nothing


def _compare_passes(ctx: Any, tensors: tuple[Tensor, ...]) -> None:
    """Note whether SUM sees what NORM saw: the sums are otherwise of other gradients than were measured."""
    rows = [each.reshape(len(tensors[0]) if each.dim() and len(each) == len(tensors[0]) else 1, -1) for each in tensors]
    rows = [each[:, :: max(1, each.shape[1] // COMPARED) | 1] for each in rows]
    rows = [wide(each) if each.is_floating_point() or each.is_complex() else each.double() for each in rows]
    sums = [each.sum(1) for each in rows]
    if ctx.call.phase is Phase.NORM:
        ctx.measured = [(s, torch.linalg.vector_norm(each, dim=1)) for s, each in zip(sums, rows, strict=True)]
        return
    for now, (before, norm), tensor in zip(sums, ctx.measured, tensors, strict=True):
        close = (now - before).abs() <= REPEATED.get(tensor.dtype, 1e-2) * norm
        same = (close | (now == before) | now.isnan() & before.isnan()).all()
        ctx.call.repeated[ctx.layer.name] = ctx.call.repeated.get(ctx.layer.name, same) & same


@dataclass(frozen=True)
class Tapped:
    """What a tap needs to know of one use of a layer."""

    name: str
    names: tuple[str, ...]
    per_example: PerExample
    traced: Traced | None = None
    """Given where the layer is differentiated by its own forward; its tensor arguments are among the saved ones."""
