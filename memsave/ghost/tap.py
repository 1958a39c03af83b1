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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from memsave.ghost.gradients import Gradient, Outer, cheapest, inner, magnitude

PerExample = Callable[[tuple[Tensor, ...], Tensor], dict[str, Gradient]]
"""(the layer's saved inputs, the output's gradient) to the per-example gradients by parameter name."""

ROUNDING = 4  # of Gram entries, each a product of two sums, in units of the last digit


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
        self.rematerialised = False
        """Whether some activations are not stored but made again in the backward."""
        self.ledger: dict[nn.Parameter, list[Gradient]] = {}
        self.magnitudes: dict[nn.Parameter, Tensor] = {}
        self.keep_all = False
        """Whether the ledger keeps parameters that are used once, too: the sum is formed from it."""
        self.mixed: dict[str, Tensor] = {}
        """By layer, in the order of the backward: whether examples of CHECK reached the rows of others."""
        self.kept: Tensor | None = None
        """The examples of CHECK or SUM, (B,); None for all of them."""
        self.weights: Tensor = probe
        """In SUM, the clip factors, (B,)."""
        self.buffers: list[tuple[str, Tensor, int]] = []
        """(name, buffer, version) before the forward."""

    def count(self, parameter: nn.Parameter) -> None:
        """Note a use in the forward."""
        self.uses[parameter] = self.uses.get(parameter, 0) + 1

    def add(self, parameter: nn.Parameter, gradient: Gradient) -> Tensor:
        """Enter a use; returns what it adds to the squared norms, (B,)."""
        gradient = cheapest(gradient, summed=self.keep_all)
        squared = inner(gradient, gradient)
        for earlier in self.ledger.get(parameter, ()):
            squared = squared + 2 * inner(gradient, earlier)
        several = self.uses.get(parameter, 0) > 1
        if several or isinstance(gradient, Outer):
            before = self.magnitudes.get(parameter, 0.0)
            after = self.magnitudes[parameter] = before + magnitude(gradient)
            squared = squared + ROUNDING * torch.finfo(squared.dtype).eps * (after**2 - before**2)
        if self.keep_all or several:
            self.ledger.setdefault(parameter, []).append(gradient)
        return squared


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
        """The output's gradient as it came, and by phase: the probe's, or the parameters'."""
        (grad,) = grads
        call, nothing = ctx.call, [None] * (3 + ctx.count + len(ctx.parameters))
        if call.phase is Phase.IDLE:
            raise RuntimeError(
                "an ordinary backward ran through a model with a GhostClipper attached; call clipper.backward(losses), "
                "or clipper.close() first"
            )
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):  # or Gram products would be bfloat16
            if call.phase is Phase.CHECK:
                others = grad[~call.kept]
                mixed = ((others != 0) & ~others.isnan()).any()  # 0 x inf is NaN: no sign of anything
                call.mixed[ctx.layer.name] = call.mixed.get(ctx.layer.name, mixed) | mixed
                return grad, None, *nothing
            saved = tuple(each.detach() for each in ctx.saved_tensors)  # or what is kept would keep the graph
            gradients = ctx.layer.per_example(saved, grad)
            named = [(p, gradients[name]) for p, name in zip(ctx.parameters, ctx.layer.names, strict=True)]
            if call.phase is Phase.NORM:
                squared = torch.zeros_like(call.probe)
                for parameter, gradient in named:
                    squared += call.add(parameter, gradient)
                return grad, squared, *nothing
            sums = []
            for parameter, gradient in named:
                gradient = gradient if call.kept is None else gradient.keep(call.kept)
                sums.append(gradient.weighted_sum(call.weights).to(parameter.dtype))
            return grad, None, *nothing[: 3 + ctx.count], *sums


@dataclass(frozen=True)
class Tapped:
    """What a tap needs to know of one use of a layer."""

    name: str
    names: tuple[str, ...]
    per_example: PerExample
