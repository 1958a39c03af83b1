"""The Rows after operators that do more than move elements: joins, reductions, look-ups, products, recurrent layers."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.gradients import has_values
from memsave.ghost.rows import Lost, Provenance, Rows, uniform_rows

Given = Sequence[tuple[Tensor, Provenance]]
"""The tensor arguments that depend on examples."""


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


BROADCASTING = names(
    """
    add radd iadd sub rsub isub subtract mul rmul imul multiply div rdiv itruediv truediv rtruediv divide pow rpow
    where maximum minimum lerp addcmul addcdiv masked_fill clamp copy eq ne gt ge lt le and or xor logical_and
    logical_or
    """
)
"""Operators that align the last dimensions of their arguments."""


def example_numbers(shape: Sequence[int], rows: Rows) -> Tensor:
    """A tensor of this shape on the CPU that contains, in each element, the number of its example."""
    view = [1] * len(shape)
    view[rows.dim] = shape[rows.dim]
    numbers = (
        torch.arange(shape[rows.dim], device="cpu") if rows.examples is None else torch.as_tensor(rows.examples).cpu()
    )
    small = numbers.short() if numbers.numel() < 2**15 else numbers  # fewer bytes, where an operator copies them
    return small.view(view).expand(tuple(shape))


def on_the_cpu(values: Any) -> Any:
    """The values with their tensors on the CPU."""
    leaves, spec = internals.tree_flatten(values)
    return internals.tree_unflatten([each.cpu() if isinstance(each, Tensor) else each for each in leaves], spec)


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, *names: str, default: Any = None) -> Any:
    """An argument by position or by one of its names."""
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def agreed(found: Sequence[Rows | None]) -> Rows | None:
    """The Rows in which all operands are joined; None if they differ, because the operator then mixes examples."""
    first = found[0] if found else None
    for each in found:
        if first is None or each is None or each.dim != first.dim:
            return None
        if not _same_examples(each.examples, first.examples):
            return None
    return first


def _same_examples(one: tuple[int, ...] | Tensor | None, other: tuple[int, ...] | Tensor | None) -> bool:
    """Whether the slices belong to the same examples. Examples without values (fake tensors) count as the same."""
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return one == other
    if one is other:
        return True
    with internals.unobserved(), torch.no_grad():
        count = next(len(each) for each in (one, other) if isinstance(each, Tensor))
        first, second = (torch.arange(count) if each is None else torch.as_tensor(each) for each in (one, other))
        if not has_values(first) or not has_values(second):
            return True
        return torch.equal(first.cpu(), second.cpu())


def after_join(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Given) -> Rows | None:
    """After `cat` and `stack`."""
    tensors = list(argument(args, kwargs, 0, "tensors"))
    of = {id(t): r for t, r in given}
    found = [of.get(id(each)) for each in tensors]
    rows = next((each for each in found if isinstance(each, Rows)), None)
    if rows is None or any(isinstance(each, Lost) for each in found):
        return None
    dims = max(each.dim() for each in tensors) + (name == "stack")
    dim = argument(args, kwargs, 1, "dim", "axis", default=0) % dims
    if name == "stack" or dim != rows.dim:
        common = agreed([each for each in found if isinstance(each, Rows)])
        return common if common is None or name != "stack" else common.moved_to(rows.dim + (dim <= rows.dim))
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


def after_reduction(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, rows: Rows, output: Tensor
) -> Rows | None:
    """After a reduction over dimensions without the examples."""
    position = 2 if name.endswith("norm") else 1
    dims = argument(args, kwargs, position, "dim", "axis")
    if dims is None or isinstance(dims, bool):
        return None
    reduced = {each % x.dim() for each in ([dims] if isinstance(dims, int) else dims)}
    if rows.dim in reduced or not reduced:
        return None
    keeps = output.dim() == x.dim()
    return rows if keeps else rows.moved_to(rows.dim - sum(each < rows.dim for each in reduced))


def after_gathering(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, rows: Rows, outputs: Sequence[Tensor]
) -> Rows | None:
    """After `gather` and `scatter` along another dimension than that of the examples."""
    dim = next((each for each in args[1:] if isinstance(each, int)), kwargs.get("dim"))
    if dim is None or outputs[0].dim() <= rows.dim or dim % outputs[0].dim() == rows.dim:
        return None
    return rows if outputs[0].shape[rows.dim] == x.shape[rows.dim] else None  # a smaller index takes the first rows


def after_reshaping_in_place(name: str, args: tuple[Any, ...], x: Tensor, rows: Rows) -> Rows | None:
    """After an operator that has changed the shape of x itself."""
    if name == "unsqueeze_":
        return rows.moved_to(rows.dim + (args[1] % x.dim() <= rows.dim))
    if name in ("t_", "transpose_", "swapaxes_", "swapdims_"):
        one, other = (0, x.dim() - 1) if name == "t_" else (each % x.dim() for each in args[1:3])
        return rows.moved_to({one: other, other: one}.get(rows.dim, rows.dim))
    return None


def after_look_up(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, given: Given
) -> Rows | None:
    """The Rows of a constant whose elements are moved by an index of the examples."""
    of = {id(t): r for t, r in given}
    if name in ("expand_as", "view_as", "reshape_as"):  # only the shape is of the examples
        return next((r for t, r in given if isinstance(r, Rows) and t.shape == output.shape), None)
    if name == "index_select":
        index, place = argument(args, kwargs, 2, "index"), argument(args, kwargs, 1, "dim")
        rows = of.get(id(index))
        return Rows(place % output.dim(), rows.examples) if isinstance(rows, Rows) else None
    if name != "__getitem__":
        return None
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    indices = [each for each in items if isinstance(each, Tensor)]
    if len(indices) != 1 or not all(isinstance(each, (slice, Tensor)) for each in items):
        return None
    (index,) = indices
    rows = of.get(id(index))
    if not isinstance(rows, Rows) or index.dtype in (torch.bool, torch.uint8):
        return None
    return rows.moved_to(rows.dim + next(at for at, each in enumerate(items) if each is index))


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


def after_einsum(args: tuple[Any, ...], given: Given) -> Rows | None:
    """The place of the letter of the examples in the result."""
    if not isinstance(args[0], str):
        return None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])
    terms, _, result = without_ellipsis(args[0], operands).partition("->")
    if not result or "." in terms:
        return None
    of = {id(t): r for t, r in given}
    places: list[Rows | None] = []
    for operand, letters in zip(operands, terms.split(","), strict=True):
        rows = of.get(id(operand))
        if isinstance(rows, Rows):
            place = result.find(letters[rows.dim])
            places.append(None if place < 0 else rows.moved_to(place))
    return agreed(places)


def after_product(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, given: Given
) -> Rows | None:
    """After a product of matrices, or of a matrix and a vector."""
    one, other = args[0], argument(args, kwargs, 1, "other", "mat2", "vec", "tensor")
    if name == "__rmatmul__":
        one, other = other, one
    of = {id(t): r for t, r in given}
    found = []
    for x, partner, first in ((one, other, True), (other, one, False)):
        rows = of.get(id(x))
        if isinstance(rows, Rows):
            found.append(_in_product(name, x, rows, partner, output, first=first))
    return agreed(found)


def _in_product(name: str, x: Tensor, rows: Rows, other: Tensor, output: Tensor, *, first: bool) -> Rows | None:
    contracted = x.dim() - (1 if first or x.dim() == 1 or name == "inner" else 2)
    if rows.dim == contracted:
        return None
    if name == "inner":
        return rows if first else rows.moved_to(rows.dim + other.dim() - 1)
    if x.dim() == 1 or other.dim() == 1:
        dim = rows.dim - (rows.dim > contracted)
    else:
        dim = rows.dim + output.dim() - x.dim()
    return rows.moved_to(dim) if 0 <= dim < output.dim() else None


def after_packing(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, rows: Rows
) -> Rows | None:
    """After `pack_padded_sequence`."""
    with internals.unobserved(), torch.no_grad():
        numbers = example_numbers(x.shape[:2], rows).unsqueeze(-1).double()
        packed, _ = function(numbers, *on_the_cpu(args[1:]), **kwargs)
        return Rows(0, tuple(int(each) for each in packed.flatten().tolist()))


def after_unpacking(function: Callable[..., Any], args: tuple[Any, ...], x: Tensor, rows: Rows) -> Rows | None:
    """After `pad_packed_sequence`."""
    with internals.unobserved(), torch.no_grad():
        numbers = example_numbers(x.shape[:1], rows).unsqueeze(-1).double()
        batch_sizes, first, _, total = on_the_cpu(args[1:])
        padded, _ = function(numbers, batch_sizes, first, -1.0, total)
        uniform = uniform_rows(padded.squeeze(-1).long(), first=0 if first else 1)
        return None if uniform is None else Rows(uniform[0], tuple(uniform[1]))


def after_recurrence(args: tuple[Any, ...], rows: Rows, count: int) -> list[Rows]:
    """The final states of a recurrent layer, (layers, B, ...); of a packed sequence, in its own order."""
    packed = isinstance(args[1], Tensor) and args[1].dim() == 1
    return [rows.at(list(range(int(args[1][0]))), dim=1) if packed else rows.moved_to(1)] * count


def after_any_other(name: str, output: Tensor, given: Given) -> Rows | None:
    """The Rows of an operator that moves no rows: of the same shape, or aligned at the first or the last dimension.

    An operand for which it could be either, because two dimensions have the same size, leaves that to the others.
    """
    found = []
    for x, rows in given:
        if not isinstance(rows, Rows):
            continue
        count, last = x.shape[rows.dim], output.dim() - x.dim() + rows.dim
        dims = range(min(rows.dim, last), max(rows.dim, last) + 1)  # dimensions were added or removed on either side
        if name.strip("_") in BROADCASTING:
            dims = range(last, last + 1)
        fitting = [dim for dim in dims if 0 <= dim < output.dim() and output.shape[dim] == count]
        reduced = output.dim() < x.dim() and rows.dim > 0
        if len(fitting) > 1 or (reduced and list(x.shape).count(count) > 1):
            continue
        found += [rows.moved_to(dim) for dim in fitting]
    return agreed(found)
