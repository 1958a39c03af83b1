"""Tensors that are computed from trainable parameters alone, and the way back from their gradients to the parameters.

An operator may get a parameter itself, a part of it (one expert's slice), or what was computed from it: a transposed
weight, a product of two factors, rows of a table at constant positions. Autograd has recorded that computation, so that
a batch of gradients of the result gives the gradients of the parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from memsave.ghost import _torch_internals as internals
from memsave.ghost.gradients import FactoredGrad, Gradient, PerSampleGrad, ViewGrad, upcast


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of a table at positions that are the same for all examples."""

    edge: GradientEdge
    """Where the gradient of the rows enters the graph."""
    table: str
    """The name of the parameter."""
    index: Tensor
    """Negative where nothing is looked up."""
    num_embeddings: int

    def gradient(self, of_output: Tensor) -> FactoredGrad:
        """The table's gradients, from those of the output, (B, *shape of the output)."""
        batch, width = len(of_output), of_output.shape[-1]
        one_hot = self.index.reshape(1, -1).expand(batch, -1)
        return FactoredGrad(
            of_output.reshape(batch, -1, width), one_hot, transposed=True, num_embeddings=self.num_embeddings
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that depends on trainable parameters and on no example."""

    tensor: Tensor
    parameters: Mapping[str, nn.Parameter]
    """The parameters by name."""
    lookups: tuple[Lookup, ...] = ()
    base: "Source | None" = None
    """What the tensor was before it was expanded or repeated along dimensions of size 1."""
    is_view: bool = False
    """Whether operators that only move elements have made it of one parameter."""
    edge: GradientEdge | None = None
    """Where the tensor's gradient enters the graph: of its present values, also if it is written in place later. None
    for a parameter itself."""

    @classmethod
    def of_parameter(cls, name: str, parameter: nn.Parameter) -> "Source":
        """The source that is a parameter itself."""
        return cls(parameter, {name: parameter}, is_view=True)

    @classmethod
    def of_tensor(cls, tensor: Tensor, parameters: Mapping[str, nn.Parameter], **options: Any) -> "Source":
        """The source that was computed from parameters."""
        return cls(tensor, parameters, edge=get_gradient_edge(tensor), **options)

    @property
    def is_parameter(self) -> bool:
        """Whether the tensor is a parameter itself."""
        return any(self.tensor is each for each in self.parameters.values())

    def unexpanded(self) -> "Source":
        """The source before it was expanded, unless a hook changes the gradient of the expanded tensor."""
        return self if self.base is None or internals.tensor_hooks(self.tensor) else self.base.unexpanded()

    def gradients(self, of_tensor: PerSampleGrad | FactoredGrad) -> dict[str, Gradient]:
        """The gradients of the parameters, from those of the tensor, (B, *shape)."""
        of_tensor = _formed_if_complex(of_tensor)
        if self.is_view and len(self.parameters) == 1:
            ((name, parameter),) = self.parameters.items()
            if parameter is self.tensor:
                return {name: _real(of_tensor)}
            found = _of_view(self.tensor, parameter, of_tensor)
            if found is not None:
                return {name: found}
        values = of_tensor.values if isinstance(of_tensor, PerSampleGrad) else of_tensor.per_sample().values
        return self._by_autograd(values.to(self.tensor.dtype))

    def _by_autograd(self, values: Tensor) -> dict[str, Gradient]:
        used_directly = self._used_past_lookups()
        lookups = {each.edge: each for each in self.lookups if each.table not in used_directly}.values()
        tables = {each.table for each in lookups}
        direct = {name: p for name, p in self.parameters.items() if name not in tables}
        targets = [*(each.edge for each in lookups), *map(get_gradient_edge, direct.values())]
        assert self.edge is not None
        found = [each if each is None else _dense(each) for each in _batched_grad(self.edge, targets, values)]
        result: dict[str, Gradient] = {}
        for lookup, grad in zip(lookups, found, strict=False):
            if grad is not None:
                one = lookup.gradient(grad)
                before = result.get(lookup.table)
                result[lookup.table] = one if before is None else _added(before, one)
        for name, grad in zip(direct, found[len(lookups) :], strict=True):
            if grad is not None:
                result[name] = _real(PerSampleGrad(grad))
        batch = len(values)
        return {
            name: result[name] if name in result else PerSampleGrad(_zeros(parameter, batch))
            for name, parameter in self.parameters.items()
        }

    def _used_past_lookups(self) -> set[str]:
        """The tables on which the tensor also depends in another way: their whole gradient is found by autograd."""
        if not self.lookups or self.edge is None:
            return set()
        waiting, found = [self.edge.node], {each.edge.node for each in self.lookups}
        variables = []
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            variables.append(getattr(node, "variable", None))
            waiting += [following for following, _ in node.next_functions if following is not None]
        tables = {each.table: self.parameters[each.table] for each in self.lookups}
        return {name for name, table in tables.items() if any(each is table for each in variables)}


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()


def _zeros(parameter: Tensor, batch: int) -> Tensor:
    like = upcast(torch.view_as_real(parameter.detach()) if parameter.is_complex() else parameter.detach())
    return like.new_zeros(1).expand(batch, *like.shape)


def _added(one: Gradient, other: Gradient) -> PerSampleGrad:
    ones = one if isinstance(one, PerSampleGrad) else one.per_sample()
    others = other if isinstance(other, PerSampleGrad) else other.per_sample()
    return PerSampleGrad(ones.values + others.values)


def _formed_if_complex(gradient: PerSampleGrad | FactoredGrad) -> PerSampleGrad | FactoredGrad:
    """The gradient, formed if its factors are complex: the activations are then conjugated."""
    if isinstance(gradient, PerSampleGrad) or not isinstance(gradient.output_grads, Tensor):
        return gradient
    if not gradient.output_grads.is_complex():
        return gradient
    values = gradient.output_grads.transpose(1, 2) @ gradient.activations.conj()
    return PerSampleGrad(values.transpose(1, 2) if gradient.transposed else values)


def _real(gradient: PerSampleGrad | FactoredGrad) -> PerSampleGrad | FactoredGrad:
    """The gradient of a complex parameter is that of its real view."""
    if isinstance(gradient, FactoredGrad) or not gradient.values.is_complex():
        return gradient
    return PerSampleGrad(torch.view_as_real(gradient.values))


def _batched_grad(output: GradientEdge, inputs: list[GradientEdge], grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs, (B, ...), for a batch of gradients of the output."""
    if not inputs:
        return ()
    options = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(output, inputs, grads, is_grads_batched=True, **options)
    except RuntimeError:  # some backward is not supported by vmap
        try:
            each = [torch.autograd.grad(output, inputs, grad, **options) for grad in grads]
        except RuntimeError as error:
            raise ValueError(
                f"the gradient of a tensor that was computed from parameters alone cannot be traced back to them "
                f"({error}); compute it anew in each forward, by operators that do not write in place"
            ) from error
        return tuple(None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True))


def _of_view(view: Tensor, parameter: Tensor, gradient: PerSampleGrad | FactoredGrad) -> Gradient | None:
    """The gradient of a contiguous parameter, from that of a view of it; None if it is no simple view."""
    if not _shares_memory(view, parameter) or not _is_injective(view) or not parameter.is_contiguous():
        return None
    size, stride, offset = tuple(view.shape), view.stride(), int(view.storage_offset() - parameter.storage_offset())
    if isinstance(gradient, FactoredGrad):
        if len(size) != 2:
            return None
        if stride[0] < stride[1]:
            gradient, size, stride = replace(gradient, transposed=not gradient.transposed), size[::-1], stride[::-1]
        if size == tuple(parameter.shape):
            return gradient
    elif view.is_contiguous() and view.numel() == parameter.numel():
        return PerSampleGrad(gradient.values.reshape(len(gradient.values), *parameter.shape))
    return ViewGrad(gradient, tuple(parameter.shape), size, tuple(stride), offset)


def _shares_memory(view: Tensor, parameter: Tensor) -> bool:
    if view.dtype != parameter.dtype or view.is_complex() or view.is_conj() or view.is_neg():
        return False
    if internals.tensor_hooks(view):
        return False
    return internals.storage_id(view) == internals.storage_id(parameter)


def _is_injective(view: Tensor) -> bool:
    """Whether no two elements share memory."""
    reach = 0
    for step, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return False
            reach += (size - 1) * step
    return True
