"""Side outputs of a layer: tensors that carry its gradient past the tap.

A layer that is differentiated by its own forward has one tapped output. A hook on an inner module, or a tensor kept as
an attribute, may give the loss something else of the layer; its gradient would be lost. So such a layer runs with
traced stand-ins in the place of its parameters, and autograd's graph must reach them through the layer's tap alone.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_traced = WeakIdKeyDictionary()


def trace(parameter: Tensor, name: str) -> Tensor:
    """A stand-in for a parameter of the layer of this name, for which autograd's graph can be searched."""
    stand_in = parameter.detach().requires_grad_()
    _traced[stand_in] = name
    return stand_in


def nodes(losses: Tensor) -> Iterator[Any]:
    """The nodes of the graph of the losses; a traced layer's own graph is left out, its inputs are not."""
    waiting, found = [losses.grad_fn], {losses.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        following = node.next_functions
        if getattr(getattr(node, "layer", None), "traced", False):
            following = following[1:]  # the first is the output; the layer's inputs are among the others
        for each, _ in following:
            if each not in found:
                found.add(each)
                waiting.append(each)


def tapped_layers(losses: Tensor) -> set[str]:
    """The names of the layers whose taps a backward of the losses passes."""
    return {node.layer.name for node in nodes(losses) if type(node).__name__ == "TapBackward"}


def side_outputs(losses: Tensor) -> set[str]:
    """The names of the traced layers on whose parameters the losses depend past the layer's tap."""
    variables = (getattr(node, "variable", None) for node in nodes(losses))
    return {_traced[each] for each in variables if each is not None and each in _traced}
