"""Operators that broadcast a parameter: elementwise operators, and those that place it beside the examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    logaddexp logaddexp2 lerp lerp_ addcmul addcmul_ addcdiv addcdiv_ masked_fill masked_fill_ clamp clamp_ clip
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


def _written(trace: OperatorTrace, operator: Operator) -> Tensor:
    """An operator that writes examples into what was computed from parameters, by the one that returns a tensor."""
    target, *others = operator.args
    function = getattr(Tensor, operator.name.removeprefix("__i").strip("_"), None)
    if function is None or target.is_leaf:
        raise LayerRefused(WRITTEN, NOT_IN_PLACE)
    with trace:
        result = function(target.clone(), *others, **operator.kwargs)
    target.detach_().copy_(result)
    trace.set(target, trace.rows(result))
    return target


def refuse_written_parameter(trace: OperatorTrace, operator: Operator) -> None:
    """Refuse an operator that writes examples into what was computed from parameters."""
    if isinstance(operator.args[0], Tensor) and trace.source(operator.args[0]) is not None:
        raise LayerRefused(
            "gets values of the examples in place",
            "use the operator that returns a new tensor, or freeze the parameter",
        )


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


@operator_rule("cat concat concatenate stack scaled_dot_product_attention gather take_along_dim index_copy")
def beside(trace: OperatorTrace, operator: Operator) -> Any:
    """An operator that takes parameters, expanded to the batch, beside the examples."""
    given = next(each for each in operator.tensors() if trace.provenance(each) is not None)
    rows = trace.rows(given)
    count = 0 if rows is WHOLE else given.shape[rows.dim]
    joins = operator.name in ("cat", "concat", "concatenate") and rows is not WHOLE
    if joins and operator.argument(1, "dim", "axis", default=0) % given.dim() == rows.dim:
        raise LayerRefused("is joined to the rows of the examples, as rows of no example", "freeze the parameter")
    mask = operator.argument(3, "attn_mask") if operator.name == "scaled_dot_product_attention" else None

    def replace(tensor: Tensor) -> Tensor:
        if tensor is mask and trace.source(tensor) is not None:
            query, key = operator.argument(0, "query"), operator.argument(1, "key")
            shape = torch.broadcast_shapes(tensor.shape, (*query.shape[:-1], key.shape[-2]))
            return trace.copies(_source(trace, tensor), shape, rows)
        return with_rows(trace, tensor, rows, count)

    return operator.run(replace)


def _source(trace: OperatorTrace, tensor: Tensor) -> Any:
    return trace.source(tensor)


@operator_rule("__setitem__")
def set_item(trace: OperatorTrace, operator: Operator) -> Any:
    """x[index] = parameter, where x or the index depends on the examples."""
    refuse_written_parameter(trace, operator)
    target, index, value = operator.args
    source = trace.source(value) if isinstance(value, Tensor) else None
    if source is None:
        return operator.function(*operator.args)
    with trace:
        part = target.detach()[index]
    rows = trace.rows(part)
    return operator.function(target, index, trace.copies(source, part.shape, rows))
