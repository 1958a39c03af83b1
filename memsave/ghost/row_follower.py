"""The Rows of an operator's outputs, from those of its inputs.

An operator that only moves elements (a view, a permutation, an index) is applied to the numbers of the rows themselves:
a dimension of the result whose slices contain one number each is the dimension of the examples. Any other operator
keeps the dimension. Where neither is known, the result is `Lost`, and the use of a parameter with it is refused.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.rows import Lost, Provenance, Rows, uniform_rows


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


MOVING = names(
    """
    view reshape flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T mT
    squeeze unsqueeze squeeze_ unsqueeze_ expand expand_as view_as reshape_as broadcast_to repeat tile
    repeat_interleave roll flip narrow select chunk split split_with_sizes tensor_split hsplit vsplit
    unbind unfold __getitem__ index_select pad diagonal
    """
)
"""Operators whose outputs consist of elements of their first argument."""
JOINING = names("cat concat concatenate stack")
REDUCING = names(
    """
    sum mean amax amin max min prod std var norm vector_norm logsumexp any all argmax argmin median
    nanmean nansum count_nonzero
    """
)
PRODUCTS = names("matmul mm bmm __matmul__ __rmatmul__ mv dot")
GATHERING = names("gather take_along_dim scatter scatter_ scatter_add scatter_add_ scatter_reduce")
ADDING_AT = names("index_add index_add_ index_copy index_copy_")

Given = Sequence[tuple[Tensor, Provenance]]
"""The tensor arguments that depend on examples."""


@dataclass(frozen=True)
class Filling(Lost):
    """A tensor to which rows are being added; the example of a row is not known before it gets one."""

    rows: Rows


class RowFollower:
    """Finds the Rows of outputs; remembers what it found for operators that depend on shapes alone."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._moves: dict[Any, list[Rows | None]] = {}

    def after(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Sequence[Tensor],
        given: Given,
    ) -> list[Provenance]:
        """The provenance of each output."""
        if name in ADDING_AT or name == "__setitem__":
            return [self._after_adding_at(name, args, kwargs, given) or Lost(name)]
        found = next(((t, r) for t, r in given if isinstance(r, Rows)), None)
        if found is None:
            return [Lost(given[0][1].operator if isinstance(given[0][1], Lost) else name)] * len(outputs)
        x, rows = found
        takes_patches = name == "unfold" and getattr(function, "__module__", "") == "torch.nn.functional"
        if name in MOVING and args and args[0] is x and not takes_patches:
            return [each or Lost(name) for each in self._moved(name, function, args, kwargs, x, rows, len(outputs))]
        one: Rows | None = None
        if name in JOINING:
            one = _after_join(name, args, kwargs, given)
        elif name in REDUCING and not (len(args) > 1 and isinstance(args[1], Tensor)):
            one = _after_reduction(name, args, kwargs, x, rows)
        elif name in GATHERING:
            one = _after_gathering(args, kwargs, rows, outputs)
        elif name in ("embedding", "one_hot"):
            one = rows
        elif name == "einsum":
            one = _after_einsum(args, given)
        elif name in PRODUCTS:
            one = _after_product(args, outputs[0], given)
        elif name == "_pack_padded_sequence":
            one = _after_packing(function, args, kwargs, x, rows)
        elif name == "_pad_packed_sequence":
            one = _after_unpacking(function, args, x, rows)
        elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return [rows, *_states_after(args, rows, len(outputs) - 1)]
        else:
            return [_kept(each, given) or Lost(name) for each in outputs]
        return [one or Lost(name)] * len(outputs)

    def _moved(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        rows: Rows,
        count: int,
    ) -> Sequence[Rows | None]:
        if name == "__getitem__" and rows.dim == 0 and isinstance(args[1], Tensor) and args[1].dim():
            index = args[1]
            if index.dtype == torch.bool:
                return [rows.at(index.nonzero()[:, 0], dim=0)]
            if index.dim() == 1:
                return [rows.at(index, dim=0)]
        if name == "index_select" and len(args) == 3 and args[1] % x.dim() == rows.dim:
            return [rows.at(args[2], dim=rows.dim)]
        others = [each for each in internals.tree_flatten((args[1:], kwargs))[0] if isinstance(each, Tensor)]
        if any(internals.is_fake(each) for each in others):
            return [None] * count
        if others or isinstance(rows.examples, Tensor):
            return self._move(name, function, args, kwargs, x.shape, rows)
        key = (name, tuple(x.shape), rows, repr((args[1:], kwargs)))
        if key not in self._moves:
            self._moves[key] = self._move(name, function, args, kwargs, x.shape, rows)
        return self._moves[key]

    def _move(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: Sequence[int],
        rows: Rows,
    ) -> list[Rows | None]:
        """Apply the operator to the numbers of the examples."""
        rest = list(args[1:])
        if any(isinstance(each, torch.dtype) for each in rest):  # a view of another type
            return [None]
        if name == "pad":
            if (kwargs.get("mode") or (rest[1] if len(rest) > 1 else "constant")) != "constant":
                return [rows]  # other modes pad the last dimensions, by elements of the same row
            rest, kwargs = rest[:1], {**{k: v for k, v in kwargs.items() if k == "pad"}, "value": -1}
        if name in ("view", "view_as"):  # the numbers are not contiguous
            function = Tensor.reshape if name == "view" else Tensor.reshape_as
        with internals.unobserved(), torch.no_grad():
            numbers = example_numbers(shape, rows)
            result = function(numbers, *_on_the_cpu(rest), **_on_the_cpu(kwargs))
            results = result if isinstance(result, (tuple, list)) else [result]
            return [self._rows_from(each, first=rows.dim) for each in results]

    def _rows_from(self, numbers: Tensor, *, first: int) -> Rows | None:
        found = uniform_rows(numbers, first=first)
        if found is None:
            return None
        dim, examples = found
        return Rows(dim, None if examples == list(range(self.batch_size)) else tuple(examples))

    def _after_adding_at(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Given
    ) -> Provenance | None:
        """What is known of a target to which rows are added, or written, at an index."""
        target, setting = args[0], name == "__setitem__"
        known = next((r for t, r in given if t is target), None)
        if isinstance(known, Rows):
            return known
        index = args[1] if setting else args[2]
        source = args[2] if setting else _argument(args, kwargs, 3, "source")
        rows = next((r for t, r in given if t is source), None)
        if (known is not None and not isinstance(known, Filling)) or not isinstance(rows, Rows):
            return None
        dim = rows.dim if setting else args[1] % target.dim()
        with internals.unobserved(), torch.no_grad():
            numbers = torch.full(tuple(target.shape), -1, device="cpu")
            if isinstance(known, Filling):
                numbers.copy_(example_numbers(target.shape, known.rows))
            values = example_numbers(source.shape, rows)
            if setting:
                numbers[_on_the_cpu(index)] = values.long()
            else:
                numbers.index_copy_(dim, index.cpu(), values.long())
            complete = self._rows_from(numbers, first=dim)
            if complete is not None:
                return complete
            partial = numbers.movedim(dim, 0).reshape(target.shape[dim], -1).amax(1)
            return Filling(name, Rows(dim, tuple(partial.tolist())))


def example_numbers(shape: Sequence[int], rows: Rows) -> Tensor:
    """A tensor of this shape on the CPU that contains, in each element, the number of its example."""
    view = [1] * len(shape)
    view[rows.dim] = shape[rows.dim]
    numbers = (
        torch.arange(shape[rows.dim], device="cpu") if rows.examples is None else torch.as_tensor(rows.examples).cpu()
    )
    small = numbers.short() if numbers.numel() < 2**15 else numbers  # fewer bytes, where an operator copies them
    return small.view(view).expand(tuple(shape))


def _on_the_cpu(values: Any) -> Any:
    leaves, spec = internals.tree_flatten(values)
    return internals.tree_unflatten([each.cpu() if isinstance(each, Tensor) else each for each in leaves], spec)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, *names: str, default: Any = None) -> Any:
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _after_join(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Given) -> Rows | None:
    tensors = list(_argument(args, kwargs, 0, "tensors"))
    of = {id(t): r for t, r in given}
    found = [of.get(id(each)) for each in tensors]
    rows = next((each for each in found if isinstance(each, Rows)), None)
    if rows is None or any(isinstance(each, Lost) for each in found):
        return None
    dims = max(each.dim() for each in tensors) + (name == "stack")
    dim = _argument(args, kwargs, 1, "dim", "axis", default=0) % dims
    if name == "stack":
        return rows.moved_to(rows.dim + (dim <= rows.dim))
    if dim != rows.dim:
        return rows
    if not all(isinstance(each, Rows) and each.dim == dim for each in found):
        return None  # some of these rows belong to no example
    every: list[Any] = []
    for each, tensor in zip(found, tensors, strict=True):
        assert isinstance(each, Rows)
        every.append(range(tensor.shape[dim]) if each.examples is None else each.examples)
    if any(isinstance(each, Tensor) for each in every):
        device = next(each.device for each in every if isinstance(each, Tensor))
        return Rows(dim, torch.cat([torch.as_tensor(each, device=device) for each in every]))
    return Rows(dim, tuple(row for each in every for row in each))


def _after_reduction(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, rows: Rows) -> Rows | None:
    position = 2 if name in ("norm", "vector_norm") else 1
    dims = _argument(args, kwargs, position, "dim", "axis")
    if dims is None or isinstance(dims, bool):
        return None
    reduced = {each % x.dim() for each in ([dims] if isinstance(dims, int) else dims)}
    if rows.dim in reduced:
        return None
    keep = kwargs.get("keepdim", kwargs.get("keepdims", any(each is True for each in args[position:])))
    return rows if keep else rows.moved_to(rows.dim - sum(each < rows.dim for each in reduced))


def _after_gathering(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows, outputs: Sequence[Tensor]) -> Any:
    dim = next((each for each in args[1:] if isinstance(each, int)), kwargs.get("dim"))
    if dim is None or outputs[0].dim() <= rows.dim or dim % outputs[0].dim() == rows.dim:
        return None
    return rows


def without_ellipsis(equation: str, operands: Sequence[Tensor]) -> str:
    """The equation of an einsum with letters in place of `...`; only if these stand for equal dimensions."""
    terms, _, result = equation.replace(" ", "").partition("->")
    if "." not in equation or not result:
        return equation.replace(" ", "")
    free = [each for each in string.ascii_letters if each not in equation]
    pairs = zip(operands, terms.split(","), strict=True)
    counts = {x.dim() - len(term) + 3 for x, term in pairs if "..." in term}
    letters = "".join(free[: max(counts)])
    if len(counts) != 1:
        return equation.replace(" ", "")
    return f"{terms.replace('...', letters)}->{result.replace('...', letters)}"


def _after_einsum(args: tuple[Any, ...], given: Given) -> Rows | None:
    if not isinstance(args[0], str):
        return None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])
    terms, _, result = without_ellipsis(args[0], operands).partition("->")
    if not result:
        return None
    of = {id(t): r for t, r in given}
    for operand, letters in zip(operands, terms.split(","), strict=True):
        rows = of.get(id(operand))
        if isinstance(rows, Rows):
            place = result.find(letters[rows.dim])
            return None if place < 0 else rows.moved_to(place)
    return None


def _after_product(args: tuple[Any, ...], output: Tensor, given: Given) -> Rows | None:
    x, rows = next((t, r) for t, r in given if isinstance(r, Rows))
    first = args[0] is x
    contracted = x.dim() - (1 if first or x.dim() == 1 else 2)
    if rows.dim == contracted:
        return None
    other = args[1] if first else args[0]
    if x.dim() == 1 or other.dim() == 1:
        dim = rows.dim - (rows.dim > contracted)
    else:
        dim = rows.dim + output.dim() - x.dim()
    return rows.moved_to(dim) if 0 <= dim < output.dim() else None


def _after_packing(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, rows: Rows
) -> Rows | None:
    with internals.unobserved(), torch.no_grad():
        numbers = example_numbers(x.shape[:2], rows).unsqueeze(-1).double()
        packed, _ = function(numbers, *_on_the_cpu(args[1:]), **kwargs)
        return Rows(0, tuple(int(each) for each in packed.flatten().tolist()))


def _after_unpacking(function: Callable[..., Any], args: tuple[Any, ...], x: Tensor, rows: Rows) -> Rows | None:
    with internals.unobserved(), torch.no_grad():
        numbers = example_numbers(x.shape[:1], rows).unsqueeze(-1).double()
        batch_sizes, first, _, total = _on_the_cpu(args[1:])
        padded, _ = function(numbers, batch_sizes, first, -1.0, total)
        uniform = uniform_rows(padded.squeeze(-1).long(), first=0 if first else 1)
        return None if uniform is None else Rows(uniform[0], tuple(uniform[1]))


def _states_after(args: tuple[Any, ...], rows: Rows, count: int) -> list[Rows]:
    """The final states of a recurrent layer, (layers, B, ...); of a packed sequence, in its own order."""
    packed = isinstance(args[1], Tensor) and args[1].dim() == 1
    return [rows.at(list(range(int(args[1][0]))), dim=1) if packed else rows.moved_to(1)] * count


def _kept(output: Tensor, given: Given) -> Rows | None:
    """The Rows of an operator that moves no rows: of the same shape, or aligned at the last dimension."""
    for same_dim in (True, False):
        for x, rows in given:
            if not isinstance(rows, Rows):
                continue
            count = x.shape[rows.dim]
            aligned = output.dim() - x.dim() + rows.dim
            dim = rows.dim if same_dim and output.dim() == x.dim() else aligned
            if 0 <= dim < output.dim() and output.shape[dim] == count and (output.dim() == x.dim()) == same_dim:
                return rows.moved_to(dim)
    for x, rows in given:
        if isinstance(rows, Rows) and rows.dim == 0 and output.dim() and len(output) == len(x):
            return rows
    return None
