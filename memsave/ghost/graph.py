"""Layers that are differentiated by their own forward: what autograd's graph tells of them.

Such a layer runs with stand-ins in the place of its parameters. Two things are then read from the graph of the losses:

- the gradient of each stand-in over the whole batch, which the sum of the per-example gradients must equal; a weight
  that the layer cached, or random numbers that it draws anew, would make them differ;
- whether the graph reaches the stand-ins through the layer's tap alone. A hook on an inner module, or a tensor kept as
  an attribute, may give the loss something else of the layer; its gradient would be lost.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_traced = WeakIdKeyDictionary()  # stand-in to the use that it was made for

# of the sum with the batch's gradient: relative to the norms of the parameter's gradients, and of the whole gradients
AGREEMENT = {torch.float64: (1e-5, 1e-12), torch.float32: (1e-3, 1e-6)}


@dataclass(eq=False)
class Traced:
    """One use of a layer in a forward."""

    name: str
    tolerance: float
    """At least this, where the layer ran in a narrower type than it runs again in."""
    stand_ins: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """By parameter, the sum of the per-example gradients."""
    sizes: dict[str, Tensor] = field(default_factory=dict)
    """By parameter, the sum of their norms."""

    def stand_in(self, key: str, parameter: Tensor) -> Tensor:
        """What takes the place of a parameter."""
        found = self.stand_ins[key] = parameter.detach().requires_grad_()
        _traced[found] = self
        return found

    def note(self, key: str, gradients: Tensor) -> None:
        """The per-example gradients (B, ...) of a parameter; of a complex one, as real numbers."""
        self.sums[key] = gradients.sum(0)
        self.sizes[key] = gradients.flatten(1).norm(dim=1).sum()

    def differing(self, batch_gradients: Iterable[Tensor | None], *, scale: float) -> Iterator[str]:
        """The parameters whose sum is not the gradient over the batch; what is not finite is not compared.

        `scale`: the sum of the norms of the whole gradients, for a gradient that cancels to nothing is all rounding.
        """
        for (key, stand_in), whole in zip(self.stand_ins.items(), batch_gradients, strict=True):
            total = self.sums.get(key)
            if whole is None and total is None:
                continue
            whole = torch.zeros_like(stand_in) if whole is None else whole
            whole = torch.view_as_real(whole) if whole.is_complex() else whole
            total = torch.zeros_like(whole) if total is None else total
            size = self.sizes.get(key, whole.new_zeros(()))
            relative, absolute = AGREEMENT.get(stand_in.real.dtype, (3e-2, 1e-2))
            difference = (total - whole).norm()
            bound = max(self.tolerance, relative) * (size + whole.norm()) + max(self.tolerance, absolute) * scale
            if difference.isfinite() and difference > bound:
                yield key


def refuse_differing(uses: Iterable[Traced], gradients: Iterable[Tensor | None], *, squared: Tensor | None) -> None:
    """Refuse layers whose per-example gradients do not sum to the batch's, given in the order of the stand-ins.

    `squared`: the squared norms of the whole gradients, (B,).
    """
    left = iter(gradients)
    scale = 0.0 if squared is None else squared.clamp(min=0).sqrt().nan_to_num(0, 0, 0).sum().item()
    for use in uses:
        for key in use.differing([next(left) for _ in use.stand_ins], scale=scale):
            raise ValueError(
                f"the per-example gradients of {use.name}.{key} do not sum to the gradient of the batch: the layer "
                f"keeps something of the weight from an earlier forward (torch.nn.utils.parametrize.cached does that), "
                f"draws random numbers, or mixes examples; freeze it, or put another layer in its place"
            )


def _is_traced(node: Any) -> bool:
    return getattr(getattr(node, "layer", None), "traced", None) is not None


def _walk(start: list[Any], stop: set[Any]) -> tuple[set[Any], list[Any]]:
    """(the nodes from here on, but for those to stop at; the traced taps among them, whose own graph is left out)."""
    waiting, found, taps = [node for node in start if node is not None and node not in stop], set[Any](), []
    found.update(waiting)
    while waiting:
        node = waiting.pop()
        following = node.next_functions
        if _is_traced(node):
            taps.append(node)
            following = following[1:]  # the first is the output; the layer's tensor arguments are among the others
        for each, _ in following:
            if each is not None and each not in found and each not in stop:
                found.add(each)
                waiting.append(each)
    return found, taps


def _parts(losses: Tensor) -> Iterator[tuple[Traced | None, set[Any]]]:
    """The nodes outside of traced layers (None), then those inside each."""
    outside, taps = _walk([losses.grad_fn], set())
    yield None, outside
    done = set(taps)
    while taps:
        tap = taps.pop()
        inside, further = _walk([tap.next_functions[0][0]], outside)
        yield tap.layer.traced, inside
        taps += [each for each in further if each not in done]
        done.update(further)


def tapped_layers(losses: Tensor) -> set[str]:
    """The names of the layers whose taps a backward of the losses passes."""
    return {node.layer.name for _, nodes in _parts(losses) for node in nodes if type(node).__name__ == "TapBackward"}


def side_outputs(losses: Tensor) -> set[str]:
    """The names of the traced layers on whose parameters the losses depend past the layer's tap."""
    found = set()
    for own, nodes in _parts(losses):
        variables = (getattr(node, "variable", None) for node in nodes)
        uses = {_traced[each] for each in variables if each is not None and each in _traced}
        found |= {use.name for use in uses if use is not own}
    return found
