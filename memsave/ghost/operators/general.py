"""Any other operator: run for each example alone, with that example's own copy of the parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.operators.rule import Operator
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rows import WHOLE, Rows

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace


def example_by_example(trace: OperatorTrace, operator: Operator) -> Any:
    """Run the operator on each example's rows and copy of the parameters, and join the outputs.

    The rows of an example must be next to each other in every argument.
    """
    if operator.name.endswith("_") and not operator.name.endswith("__"):
        raise LayerRefused("is used by an operator that writes in place", "use the one that returns a new tensor")
    batch = trace.context.batch_size
    arguments = {id(each): each for each in operator.tensors()}.values()
    along_batch = WHOLE if batch == 1 else Rows(0)
    copies = {
        id(each): trace.copies(source, (batch, *each.shape), along_batch)
        for each in arguments
        if (source := trace.source(each)) is not None
    }
    rows = {id(each): trace.rows(each) for each in arguments if trace.provenance(each) is not None}

    def of_example(example: int) -> Any:
        def replace(tensor: Tensor) -> Tensor:
            if id(tensor) in copies:
                return copies[id(tensor)][example]
            return _part(tensor, rows[id(tensor)], example, batch) if id(tensor) in rows else tensor

        return operator.run(replace)

    outputs = [of_example(example) for example in range(batch)]
    if batch == 1:
        return outputs[0]
    shapes = _shapes(operator)
    leaves, spec = zip(*(internals.tree_flatten(each) for each in outputs), strict=True)
    columns = zip(*leaves, strict=True)
    joined = [_joined(column, shape, operator.name) for column, shape in zip(columns, shapes, strict=True)]
    return internals.tree_unflatten(joined, spec[0])


def _part(tensor: Tensor, rows: Rows, example: int, batch: int) -> Tensor:
    """The rows of one example."""
    if rows is WHOLE:
        return tensor
    count = tensor.shape[rows.dim] // batch
    expected = [b for b in range(batch) for _ in range(count)]
    if rows.examples is not None and torch.as_tensor(rows.examples).tolist() != expected:
        raise LayerRefused(
            "is used with examples whose rows are not next to each other, by an operator that has no rule",
            "sort the rows by example, or freeze the parameter",
        )
    return tensor.narrow(rows.dim, example * count, count)


def _shapes(operator: Operator) -> list[Any]:
    """The shapes of the operator's outputs for all examples."""
    with torch.no_grad(), internals.unobserved():
        outputs = operator.run(lambda each: torch.empty_like(each, device="meta"))
    return [getattr(each, "shape", None) for each in internals.tree_flatten(outputs)[0]]


def _joined(parts: tuple[Any, ...], shape: Any, name: str) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    dims = [d for d in range(parts[0].dim()) if parts[0].shape[d] != shape[d]]
    if len(dims) != 1:
        raise LayerRefused(f"is used by {name}, whose output has no dimension of the examples", "freeze the parameter")
    return torch.cat(parts, dims[0])
