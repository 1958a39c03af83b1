"""Layers that are differentiated by their own forward, and what autograd's graph shows about them.

Such a layer runs with proxies, detached leaf copies in place of its parameters. Two things are then read from the graph
of the losses:

- the gradient of each proxy over the whole batch, which the sum of the per-example gradients must equal; a weight that
  the layer cached, or random numbers that it draws again, would make them differ;
- whether the graph reaches the proxies through the layer's norm hook only. A hook on an inner module, or a tensor kept
  as an attribute, may pass something else of the layer to the loss; the gradient of that would be lost.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memsave.ghost._torch_internals import WeakIdKeyDictionary, leaf_of

_owner_of_proxy = WeakIdKeyDictionary()  # proxy to its ParameterProxies

# tolerance of the sum against the batch's gradient: relative to the parameter's norms, and to the whole norms
AGREEMENT = {torch.float64: (1e-5, 1e-12), torch.float32: (1e-3, 1e-6)}


@dataclass(eq=False)
class ParameterProxies:
    """The proxies of one use of a layer in a forward."""

    layer: str
    tolerance: float
    """The smallest tolerance, for a layer that ran in a narrower type than its replay."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The proxies by parameter name."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, the sum of the per-example gradients."""
    norms: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, the sum of their norms."""

    def make(self, name: str, parameter: Tensor) -> Tensor:
        """Make the proxy of a parameter."""
        proxy = self.tensors[name] = parameter.detach().requires_grad_()
        _owner_of_proxy[proxy] = self
        return proxy

    def record_grads(self, name: str, gradients: Tensor) -> None:
        """Record the per-example gradients (B, ...) of a parameter; of a complex one, as real numbers."""
        self.sums[name] = gradients.sum(0)
        self.norms[name] = gradients.flatten(1).norm(dim=1).sum()

    def mismatches(self, batch_gradients: Iterable[Tensor | None], *, scale: float) -> Iterator[str]:
        """The parameters whose sum differs from the batch's gradient; values that are not finite are not compared.

        `scale`: the sum of the norms of the whole gradients, because a gradient that cancels to zero is all rounding.
        """
        for (name, proxy), expected in zip(self.tensors.items(), batch_gradients, strict=True):
            total = self.sums.get(name)
            if expected is None and total is None:
                continue
            expected = torch.zeros_like(proxy) if expected is None else expected
            expected = torch.view_as_real(expected) if expected.is_complex() else expected
            total = torch.zeros_like(expected) if total is None else total
            norms = self.norms.get(name, expected.new_zeros(()))
            relative, absolute = AGREEMENT.get(proxy.real.dtype, (3e-2, 1e-2))
            difference = (total - expected).norm()
            bound = max(self.tolerance, relative) * (norms + expected.norm()) + max(self.tolerance, absolute) * scale
            if difference.isfinite() and difference > bound:
                yield name


def refuse_mismatches(
    proxies: Iterable[ParameterProxies], batch_gradients: Iterable[Tensor | None], *, squared: Tensor | None
) -> None:
    """Raise ValueError if per-example gradients do not sum to the batch's, given in the order of the proxies.

    `squared`: the squared norms of the whole gradients, (B,).
    """
    remaining = iter(batch_gradients)
    scale = 0.0 if squared is None else squared.clamp(min=0).sqrt().nan_to_num(0, 0, 0).sum().item()
    for each in proxies:
        for name in each.mismatches([next(remaining) for _ in each.tensors], scale=scale):
            raise ValueError(
                f"the per-example gradients of {each.layer}.{name} do not sum to the gradient of the batch: the layer "
                f"keeps a weight from an earlier forward (torch.nn.utils.parametrize.cached does that), draws random "
                f"numbers, or mixes examples; freeze it, or replace it by another layer"
            )


def _hook_spec(node: Any) -> Any:
    """The HookSpec of a norm hook's node, else None."""
    return getattr(node, "hook_spec", None)


def _walk(start: list[Any], stop: set[Any]) -> tuple[set[Any], list[Any]]:
    """(nodes reachable from `start` except through `stop`, the norm hooks of layers with proxies among them).

    The inner graphs of these layers are not entered.
    """
    waiting, found, hooks = [node for node in start if node is not None and node not in stop], set[Any](), []
    found.update(waiting)
    while waiting:
        node = waiting.pop()
        following, spec = node.next_functions, _hook_spec(node)
        if spec is not None and spec.proxies is not None:
            hooks.append(node)
            following = following[1:]  # the first is the layer's output; its tensor arguments are among the others
        for each, _ in following:
            if each is not None and each not in found and each not in stop:
                found.add(each)
                waiting.append(each)
    return found, hooks


def _parts_of_graph(losses: Tensor) -> Iterator[tuple[ParameterProxies | None, set[Any]]]:
    """The nodes outside all layers with proxies (None), then the nodes inside each of these layers."""
    outside, hooks = _walk([losses.grad_fn], set())
    yield None, outside
    done = set(hooks)
    while hooks:
        hook = hooks.pop()
        inside, inner_hooks = _walk([hook.next_functions[0][0]], outside)
        yield hook.hook_spec.proxies, inside
        hooks += [each for each in inner_hooks if each not in done]
        done.update(inner_hooks)


def layers_reached(losses: Tensor) -> set[str]:
    """The names of the layers whose norm hooks a backward of the losses passes."""
    specs = (_hook_spec(node) for _, nodes in _parts_of_graph(losses) for node in nodes)
    return {spec.name for spec in specs if spec is not None}


def layers_with_side_outputs(losses: Tensor) -> set[str]:
    """The names of the layers with proxies on which the losses also depend past the layer's norm hook."""
    found = set()
    for own, nodes in _parts_of_graph(losses):
        leaves = (leaf_of(node) for node in nodes)
        owners = {_owner_of_proxy[each] for each in leaves if each is not None and each in _owner_of_proxy}
        found |= {owner.layer for owner in owners if owner is not own}
    return found
