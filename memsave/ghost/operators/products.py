"""Products of a parameter and the examples: y = x W' + b, with gradients held as factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memsave.ghost.gradients import FactoredGrad, PerSampleGrad, flatten_positions, upcast
from memsave.ghost.operators.broadcasting import with_rows
from memsave.ghost.operators.rule import Operator, operator_rule
from memsave.ghost.parameter_source import Source
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.row_changes import without_ellipsis
from memsave.ghost.rows import WHOLE, Rows, RowSplit

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace


@operator_rule("linear")
def linear(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`F.linear(x, weight, bias)`, with x (..., d), weight (p, d), bias (p,)."""
    x, weight = operator.argument(0, "input"), operator.argument(1, "weight")
    bias = operator.argument(2, "bias")
    if trace.provenance(x) is None:  # the weight or the bias depends on the examples
        with trace:
            y = x @ weight.transpose(-1, -2)
            return y if bias is None else y + bias
    of_weight, of_bias = trace.source(weight), None if bias is None else trace.source(bias)
    if weight.dim() != 2 or (of_weight is None and trace.provenance(weight) is not None):
        with trace:
            y = x @ weight.transpose(-1, -2) if weight.dim() > 1 else (x * weight).sum(-1)
            return y if bias is None else y + bias
    rows = _rows_of_product(trace, x)
    y = F.linear(x, weight if of_weight is None else weight.detach(), bias if of_bias is None else bias.detach())
    if of_weight is not None:
        y = trace.hook(y, of_weight, rows, (x,), _factors)
    if of_bias is not None:
        y = trace.hook(y, of_bias, rows, (), _sum_of_positions)
    return y


def _rows_of_product(trace: OperatorTrace, x: Tensor) -> Rows:
    rows = trace.rows(x)
    if rows is not WHOLE and rows.dim == x.dim() - 1:
        raise LayerRefused("is multiplied over the dimension of the examples", "keep them apart, or freeze it")
    return rows


def _factors(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> FactoredGrad:
    return FactoredGrad(flatten_positions(split.stacked(grad)), flatten_positions(split.stacked(saved[0])))


def _transposed_factors(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> FactoredGrad:
    factors = _factors(saved, grad, split)
    return FactoredGrad(factors.output_grads, factors.activations, transposed=True)


def _sum_of_positions(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> PerSampleGrad:
    return PerSampleGrad(upcast(flatten_positions(split.stacked(grad))).sum(1))


@operator_rule("inner")
def inner(trace: OperatorTrace, operator: Operator) -> Tensor:
    """The sums over the last dimensions of both."""
    one, other = operator.argument(0, "input"), operator.argument(1, "other")
    with trace:
        if one.dim() < 2 or other.dim() < 2:
            return (one * other).sum(-1)
        if trace.source(other) is not None:
            return (one @ other.flatten(0, -2).T).unflatten(-1, tuple(other.shape[:-1]))
        y = (other @ one.flatten(0, -2).T).unflatten(-1, tuple(one.shape[:-1]))
        kept = other.dim() - 1
        return y.permute(*range(kept, y.dim()), *range(kept))


@operator_rule("matmul __matmul__ __rmatmul__ mm bmm mv dot")
def matmul(trace: OperatorTrace, operator: Operator) -> Tensor:
    """x @ W and W @ x, of any dimensions."""
    one, other = operator.argument(0, "input"), operator.argument(1, "other", "mat2", "vec", "tensor")
    if operator.name == "__rmatmul__":
        one, other = other, one
    left, right = trace.source(one), trace.source(other)
    if one.dim() == 1 or other.dim() == 1:
        return _with_vector(trace, one, other)
    if right is not None and other.dim() == 2:
        y = one @ other.detach()
        return trace.hook(y, right, _rows_of_product(trace, one), (one,), _transposed_factors)
    if left is not None and one.dim() == 2 and _keeps_rows_before(trace, other):
        with trace:  # (x' W')'
            return matmul_transposed(trace, left, other)
    source, x = (left, other) if left is not None else (right, one)
    assert source is not None
    rows = trace.rows(x)
    batch = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    if rows is not WHOLE:
        rows = rows.moved_to(rows.dim + len(batch) + 2 - x.dim())
        if rows.dim == len(batch) and source is right:
            x = one.expand(*batch, *one.shape[-2:])  # with the dimensions of the output
            return trace.hook(one @ other.detach(), source, rows, (x,), _formed(tuple(other.shape)))
        if rows.dim == len(batch) + 1 and source is left:
            with trace:
                return (other.transpose(-1, -2) @ one.transpose(-1, -2)).transpose(-1, -2)
        if rows.dim >= len(batch):
            raise LayerRefused("is multiplied over the dimension of the examples", "keep them apart, or freeze it")
    copies = trace.copies(source, (*batch, *source.tensor.shape[-2:]), rows)
    return copies @ other if source is left else one @ copies


def _formed(shape: tuple[int, ...]) -> Any:
    """The gradient of W (..., d, p) in y = x W, with x (..., n, d) and the examples among the n rows."""

    def gradient(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> PerSampleGrad:
        x, g = upcast(split.stacked(saved[0])), upcast(split.stacked(grad))  # (B, S, ..., d) and (B, S, ..., p)
        if split.trivial:  # one row of each example
            x, g = x.unsqueeze(1), g.unsqueeze(1)
        values = x.conj().movedim(1, -1) @ g.movedim(1, -2)  # (B, ..., d, p)
        return PerSampleGrad(
            values.sum_to_size(len(values), *[1] * (values.dim() - 1 - len(shape)), *shape).reshape(-1, *shape)
        )

    return gradient


def _keeps_rows_before(trace: OperatorTrace, x: Tensor) -> bool:
    rows = trace.rows(x)
    return rows is WHOLE or rows.dim < x.dim() - 2 or rows.dim == x.dim() - 1


def matmul_transposed(trace: OperatorTrace, weight: Source, x: Tensor) -> Tensor:
    """W @ x as F.linear(x', W)'."""
    return F.linear(x.transpose(-1, -2), weight.tensor).transpose(-1, -2)


def _with_vector(trace: OperatorTrace, one: Tensor, other: Tensor) -> Tensor:
    """A product with a vector, as a product with a matrix of one row or column."""
    with trace:
        if one.dim() == 1 and other.dim() == 1:
            return (one * other).sum(-1)
        if other.dim() == 1:
            return (one @ other.unsqueeze(-1)).squeeze(-1)
        return (one.unsqueeze(0) @ other).squeeze(-2)


@operator_rule("addmm addbmm baddbmm")
def added_product(trace: OperatorTrace, operator: Operator) -> Tensor:
    """beta input + alpha (a @ b)."""
    start = operator.argument(0, "input")
    one, other = operator.argument(1, "mat1", "batch1"), operator.argument(2, "mat2", "batch2")
    with trace:
        product = one @ other
        product = product.sum(0) if operator.name == "addbmm" else product
        return operator.kwargs.get("beta", 1) * start + operator.kwargs.get("alpha", 1) * product


@operator_rule("einsum")
def einsum(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`torch.einsum`: as a linear layer where one operand is a parameter and shares letters with x or y alone."""
    if not isinstance(operator.args[0], str):
        raise LayerRefused("is used without an equation", "give einsum an equation")
    equation, *operands = operator.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    equation = without_ellipsis(equation, operands)
    terms, _, result = equation.partition("->")
    letters = terms.split(",")
    sources = [trace.source(each) for each in operands]
    if "." not in equation and result and len(operands) == 2 and sum(each is not None for each in sources) == 1:
        weight = 0 if sources[0] is not None else 1
        found = _einsum_as_linear(
            trace, operands[1 - weight], letters[1 - weight], operands[weight], letters[weight], result
        )
        if found is not None:
            return found
    given = [(x, term) for x, term in zip(operands, letters, strict=True) if trace.provenance(x) is not None]
    x, term = given[0]
    rows = trace.rows(x)
    if rows is WHOLE:
        return operator.run(lambda each: with_rows(trace, each, rows, 0))
    if "." in equation or term[rows.dim] not in result:
        raise LayerRefused("is used in an einsum without a letter of the examples in its result", "write all letters")
    row, count = term[rows.dim], x.shape[rows.dim]
    for place, source in enumerate(sources):
        if source is not None and row not in letters[place]:
            letters[place] = row + letters[place]
            operands[place] = trace.copies(source, (count, *source.tensor.shape), rows.moved_to(0))
        elif source is not None:
            operands[place] = with_rows(trace, operands[place], rows.moved_to(letters[place].index(row)), count)
    return torch.einsum(f"{','.join(letters)}->{result}", *operands)


def _einsum_as_linear(
    trace: OperatorTrace, x: Tensor, of_x: str, weight: Tensor, of_weight: str, result: str
) -> Tensor | None:
    """y[kept, new] = sum_contracted x[kept, contracted] W[new, contracted]; None for other equations."""
    contracted = [each for each in of_weight if each in of_x and each not in result]
    new = [each for each in of_weight if each not in of_x]
    kept = [each for each in of_x if each not in of_weight]
    plain = all(len(set(each)) == len(each) for each in (of_x, of_weight, result))
    if not plain or len(contracted) + len(new) != len(of_weight) or set(kept + new) != set(result) or not contracted:
        return None
    if len(kept) + len(contracted) != len(of_x):
        return None
    with trace:
        inputs = x.permute([of_x.index(each) for each in kept + contracted]).flatten(len(kept))
        table = weight.permute([of_weight.index(each) for each in new + contracted])
        sizes = table.shape[: len(new)]
        table = table.flatten(len(new)) if new else table.flatten().unsqueeze(0)
        table = table.flatten(0, len(new) - 1) if len(new) > 1 else table
        y = F.linear(inputs, table)
        y = y.unflatten(-1, tuple(sizes)) if len(new) != 1 and new else y
        y = y if new else y.squeeze(-1)
        order = kept + new
        return y.permute([order.index(each) for each in result])
