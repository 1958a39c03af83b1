"""Look-ups of rows of a parameter at indices that depend on the examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memsave.ghost.gradients import FactoredGrad
from memsave.ghost.operators.general import example_by_example
from memsave.ghost.operators.rule import Operator, operator_rule
from memsave.ghost.parameter_source import Source
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rows import RowSplit

if TYPE_CHECKING:
    from memsave.ghost.operator_trace import OperatorTrace

MIXING_OPTIONS = "is used with max_norm, scale_grad_by_freq or sparse, which mix examples or have no rule"


@operator_rule("embedding")
def embedding(trace: OperatorTrace, operator: Operator) -> Tensor:
    """`F.embedding(index, weight)` and `torch.embedding(weight, index)`."""
    index, padding, plain = embedding_arguments(operator.args, operator.kwargs)
    if not plain:
        raise LayerRefused(MIXING_OPTIONS, "construct it without these", final=True)
    weight = next(each for each in operator.tensors() if each.is_floating_point() and trace.source(each) is not None)
    source = trace.source(weight)
    assert source is not None
    return looked_up(trace, source, index, padding=padding)


def embedding_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int | None, bool]:
    """(the index, padding_idx, whether no other option is set) of `F.embedding` or `torch.embedding`."""
    tensors = [each for each in (*args[:2], *kwargs.values()) if isinstance(each, Tensor)]
    index = next(each for each in tensors if not each.is_floating_point())
    is_torch_embedding = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
    others = () if is_torch_embedding else ("max_norm", "norm_type")
    names = ("padding_idx", *others, "scale_grad_by_freq", "sparse")
    options = {**dict(zip(names, args[2:], strict=False)), **kwargs}
    padding = options.get("padding_idx")
    plain = options.get("max_norm") is None and not options.get("scale_grad_by_freq") and not options.get("sparse")
    return index, None if padding is None or padding < 0 else padding, plain


def looked_up(trace: OperatorTrace, source: Source, index: Tensor, *, padding: int | None = None) -> Tensor:
    """Rows of a source (V, ...) at an index (...) of the examples."""
    table = source.tensor.detach()
    rows = trace.rows(index)
    count, width = len(table), table[0].numel()

    def gradient(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> FactoredGrad | Any:
        one_hot = split.stacked(saved[0])
        one_hot = one_hot.reshape(len(one_hot), -1)
        if padding is not None:
            one_hot = one_hot.masked_fill(one_hot == padding, -1)
        grads = split.stacked(grad)
        grads = grads.reshape(len(grads), -1, width)
        factored = FactoredGrad(grads, one_hot, transposed=True, num_embeddings=count)
        if source.tensor.dim() == 2:
            return factored
        formed = factored.per_sample()
        return type(formed)(formed.values.reshape(len(grads), *table.shape), owns_values=True)

    return trace.hook(table[index], source, rows, (index,), gradient)


@operator_rule("__getitem__")
def get_item(trace: OperatorTrace, operator: Operator) -> Any:
    """parameter[index], where the index depends on the examples."""
    table, index = operator.args
    source = trace.source(table)
    if source is None:
        return operator.function(table, index)  # the index depends on parameters, without a gradient
    items = index if isinstance(index, tuple) else (index,)
    while items and isinstance(items[-1], slice) and items[-1] == slice(None):
        items = items[:-1]
    if not all(isinstance(each, Tensor) and each.dtype not in (torch.bool, torch.uint8) for each in items):
        return _general_index(trace, table, list(items))
    if len(items) == 1:
        size = len(table)
        position = items[0].long()
        with trace:
            position = torch.where(position < 0, position + size, position)
        return looked_up(trace, source, position)
    with trace:
        flat, sizes = table.flatten(0, len(items) - 1), table.shape[: len(items)]
        position = items[0]
        for each, size in zip(items[1:], sizes[1:], strict=True):
            position = position * size + each
        return flat[position]


def _general_index(trace: OperatorTrace, table: Tensor, items: list[Any]) -> Any:
    """An index tensor at one place, with full slices before it."""
    place = next((at for at, each in enumerate(items) if isinstance(each, Tensor)), 0)
    plain = all(isinstance(each, slice) and each == slice(None) for each in items[:place])
    if not plain or len(items) != place + 1 or items[place].dtype in (torch.bool, torch.uint8):
        raise LayerRefused("is indexed by the examples in a way that has no rule", "use an embedding, or freeze it")
    with trace:
        found = table.movedim(place, 0)[items[place]]
        return found.movedim(tuple(range(items[place].dim())), tuple(range(place, place + items[place].dim())))


@operator_rule("index_select")
def index_select(trace: OperatorTrace, operator: Operator) -> Any:
    """`torch.index_select(parameter, dim, index)`."""
    table, dim, index = operator.argument(0, "input"), operator.argument(1, "dim"), operator.argument(2, "index")
    if trace.source(table) is None:
        return example_by_example(trace, operator)
    with trace:
        return table.movedim(dim, 0)[index].movedim(0, dim)


@operator_rule("embedding_bag")
def embedding_bag(trace: OperatorTrace, operator: Operator) -> Any:
    """`F.embedding_bag`, for each example alone."""
    names = ("offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse")
    options = {**dict(zip(names, operator.args[2:], strict=False)), **operator.kwargs}
    if options.get("max_norm") is not None or options.get("scale_grad_by_freq") or options.get("sparse"):
        raise LayerRefused(MIXING_OPTIONS, "construct it without these", final=True)
    return example_by_example(trace, operator)
