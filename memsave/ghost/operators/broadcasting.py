"""Operators that broadcast a parameter: elementwise operators, and those that place it beside the examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.operators.rule import Operator, operator_rule
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rows import WHOLE, Rows

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace

WRITTEN = "gets values of the examples in place"
NOT_IN_PLACE = "use the operator that returns a new tensor, or freeze the parameter"


@operator_rule(
    """
    add add_ __add__ __radd__ __iadd__ sub sub_ subtract __sub__ __rsub__ __isub__ rsub
    mul mul_ multiply __mul__ __rmul__ __imul__
    div div_ divide true_divide __truediv__ __rtruediv__ __itruediv__ __rdiv__
    pow pow_ __pow__ __rpow__ float_power where maximum minimum fmax fmin fmod remainder atan2 hypot copysign
    logaddexp logaddexp2 lerp lerp_ addcmul addcmul_ addcdiv addcdiv_ masked_fill_ clamp clamp_ clip
    xlogy copy_ threshold mse_loss l1_loss smooth_l1_loss huber_loss
    eq ne gt ge lt le __eq__ __ne__ __gt__ __ge__ __lt__ __le__ isclose
    """
)
def elementwise(trace: OperatorTrace, operator: Operator) -> Any:
    """An operator whose element of the output depends on the same element of its broadcast arguments."""
    in_place = operator.name.startswith("__i") or (operator.name.endswith("_") and not operator.name.startswith("__"))
    if in_place and trace.source(operator.args[0]) is not None:
        return _written(trace, operator)
    shape = torch.broadcast_shapes(*(each.shape for each in operator.tensors()))
    rows = rows_in_broadcast(trace, operator, len(shape))

    def replace(tensor: Tensor) -> Tensor:
        source = trace.source(tensor)
        return tensor if source is None else trace.copies(source, shape, rows)

    return operator.run(replace)


@operator_rule("masked_fill")
def masked_fill(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`masked_fill` with a parameter as the value, or as the tensor that is filled."""
    x, mask = operator.argument(0, "input", "self"), operator.argument(1, "mask")
    value = operator.argument(2, "value")
    with trace:
        return torch.where(mask, value, x)


def _written(trace: OperatorTrace, operator: Operator) -> Tensor:
    """An operator that writes examples into what was computed from parameters, by the one that returns a tensor."""
    target, *others = operator.args
    function = getattr(Tensor, operator.name.removeprefix("__i").removeprefix("true").strip("_"), None)
    if function is None or target.is_leaf or internals.is_view(target):
        raise LayerRefused(WRITTEN, NOT_IN_PLACE)
    with trace:
        result = function(target.clone(), *others, **operator.kwargs)
    target.detach_().copy_(result)
    trace.set(target, trace.rows(result))
    return target


def rows_in_broadcast(trace: OperatorTrace, operator: Operator, dims: int) -> Rows:
    """The Rows of the broadcast of all arguments."""
    given = [each for each in operator.tensors() if trace.provenance(each) is not None]
    found = trace.rows(next((each for each in given if isinstance(trace.provenance(each), Rows)), given[0]))
    if found is WHOLE:
        return found
    tensor = next(each for each in given if trace.provenance(each) == found or trace.provenance(each) is found)
    return found.moved_to(found.dim + dims - tensor.dim())


def with_rows(trace: OperatorTrace, tensor: Tensor, rows: Rows, count: int) -> Tensor:
    """A source as copies with `count` rows along the dimension of the rows; another tensor unchanged."""
    source = trace.source(tensor)
    if source is None:
        return tensor
    if rows is WHOLE:
        return trace.copies(source, tensor.shape, rows)
    shape = list(tensor.shape)
    if rows.dim >= len(shape) or shape[rows.dim] not in (1, count):
        raise LayerRefused(
            f"has the shape {tuple(shape)} where the examples are {count} rows in dimension {rows.dim}",
            "expand it to the batch before, or freeze the parameter",
        )
    return trace.copies(source, (*shape[: rows.dim], count, *shape[rows.dim + 1 :]), rows)


@operator_rule("cat concat concatenate stack gather take_along_dim index_copy")
def beside(trace: OperatorTrace, operator: Operator) -> Any:
    """An operator that takes parameters, expanded to the batch, beside the examples."""
    given = next(each for each in operator.tensors() if trace.provenance(each) is not None)
    rows = trace.rows(given)
    count = 0 if rows is WHOLE else given.shape[rows.dim]
    joins = operator.name in ("cat", "concat", "concatenate") and rows is not WHOLE
    if joins and operator.argument(1, "dim", "axis", default=0) % given.dim() == rows.dim:
        raise LayerRefused("is joined to the rows of the examples, as rows of no example", "freeze the parameter")

    return operator.run(lambda each: with_rows(trace, each, rows, count))


@operator_rule("scaled_dot_product_attention")
def attention(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`F.scaled_dot_product_attention`, whose arguments broadcast in all but the last two dimensions."""
    query, key = operator.argument(0, "query"), operator.argument(1, "key")
    value, mask = operator.argument(2, "value"), operator.argument(3, "attn_mask")
    given = next(each for each in operator.tensors() if trace.provenance(each) is not None)
    rows = trace.rows(given)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if rows is not WHOLE:
        rows = rows.moved_to(rows.dim + len(batch) + 2 - given.dim())
        if rows.dim >= len(batch):
            raise LayerRefused("is attended to over the dimension of the examples", "keep them apart, or freeze it")

    def replace(tensor: Tensor) -> Tensor:
        source = trace.source(tensor)
        if source is None:
            return tensor
        last = (query.shape[-2], key.shape[-2]) if tensor is mask else tensor.shape[-2:]
        return trace.copies(source, (*batch, *last), rows)

    return operator.run(replace)


@operator_rule("__setitem__")
def set_item(trace: OperatorTrace, operator: Operator) -> Any:
    """x[index] = parameter, where x or the index depends on the examples."""
    target, index, value = operator.args
    if trace.source(target) is not None:
        raise LayerRefused(WRITTEN, NOT_IN_PLACE)
    source = trace.source(value) if isinstance(value, Tensor) else None
    if source is None:
        return operator.function(*operator.args)
    with trace:
        part = target.detach()[index]
    rows = trace.rows(part)
    return operator.function(target, index, trace.copies(source, part.shape, rows))
