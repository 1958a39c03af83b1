"""The Rows of an operator's outputs, from those of its inputs.

An operator that only moves elements (a view, a permutation, an index) is applied to the numbers of the rows themselves:
a dimension of the result whose slices contain one number each is the dimension of the examples. Any other operator
keeps the dimension. Where neither is known, the result is `Lost`, and the use of a parameter with it is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.row_changes import (
    Given,
    after_any_other,
    after_einsum,
    after_gathering,
    after_join,
    after_look_up,
    after_packing,
    after_product,
    after_recurrence,
    after_reduction,
    after_reshaping_in_place,
    after_unpacking,
    argument,
    example_numbers,
    names,
    on_the_cpu,
)
from memsave.ghost.rows import Lost, Provenance, Rows, uniform_rows

MOVING = names(
    """
    view reshape flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T mT
    squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to repeat tile atleast_1d atleast_2d atleast_3d
    repeat_interleave roll flip flipud fliplr rot90 narrow select chunk split split_with_sizes tensor_split
    hsplit vsplit dsplit unbind unfold __getitem__ index_select take masked_select pad diagonal H mH adjoint
    pixel_shuffle pixel_unshuffle channel_shuffle
    """
)
"""Operators whose outputs consist of elements of their first argument."""
RESHAPING_IN_PLACE = names("squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_ as_strided_ resize_ set_")
"""After these the tensor does not have the shape any more that its Rows were for."""
LIKE_OTHERS = {"view_as": "view", "reshape_as": "reshape", "expand_as": "expand"}
UNCLEAR = names("as_strided as_strided_copy view_copy permute_copy transpose_copy t_copy")
"""Operators that move elements in a way that the numbers of the examples cannot show."""
JOINING = names("cat concat concatenate stack")
REDUCING = names(
    """
    sum mean amax amin max min prod std var norm vector_norm logsumexp any all argmax argmin median
    nanmean nansum count_nonzero linalg_norm linalg_vector_norm
    """
)
ALONG = names("softmax log_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort topk renorm softmin glu")
"""Operators along one dimension."""
PRODUCTS = names("matmul mm bmm __matmul__ __rmatmul__ mv dot inner")
GATHERING = names("gather take_along_dim scatter scatter_ scatter_add scatter_add_ scatter_reduce")
ADDING_AT = names("index_add index_add_ index_copy index_copy_")

PLAIN = (int, float, str, slice, type(None), type(Ellipsis), torch.dtype, torch.device)
"""Arguments whose `repr` says what they are."""


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
        name = name.partition(".")[0]  # an operator of torch.ops.aten has its overload in its name
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        if self.batch_size == 1:
            return [_of_one_example(each) if each.dim() else Lost(name) for each in outputs]
        found = self._after(name, function, args, kwargs, outputs, given)
        return [each if self._fits(each, output) else Lost(name) for each, output in zip(found, outputs, strict=True)]

    def _after(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Sequence[Tensor],
        given: Given,
    ) -> Sequence[Provenance]:
        if name in ADDING_AT or name == "__setitem__":
            return [self._after_adding_at(name, args, kwargs, given) or Lost(name)]
        found = next(((t, r) for t, r in given if isinstance(r, Rows)), None)
        if found is None:
            return [Lost(given[0][1].operator if isinstance(given[0][1], Lost) else name)] * len(outputs)
        x, rows = found
        takes_patches = name == "unfold" and getattr(function, "__module__", "") == "torch.nn.functional"
        one: Rows | None = None
        if name in RESHAPING_IN_PLACE or name in UNCLEAR:
            one = after_reshaping_in_place(name, args, x, rows)
        elif name in MOVING and not takes_patches:
            if args[0] is x:
                return [each or Lost(name) for each in self._moved(name, function, args, kwargs, x, rows, len(outputs))]
            one = after_look_up(name, args, kwargs, outputs[0], given)
        elif name in JOINING:
            one = after_join(name, args, kwargs, given)
        elif name in REDUCING and not (len(args) > 1 and isinstance(args[1], Tensor)):
            one = after_reduction(name, args, kwargs, x, rows, outputs[0])
        elif name in GATHERING:
            one = after_gathering(args, kwargs, x, rows, outputs)
        elif name in ("embedding", "one_hot", "view_as_real", "diag_embed"):
            one = rows
        elif name == "einsum":
            one = after_einsum(args, given)
        elif name in ALONG:
            dim = argument(args, kwargs, 2 if name in ("topk", "renorm") else 1, "dim", default=-1)
            one = None if dim % x.dim() == rows.dim else rows
        elif name in PRODUCTS:
            one = after_product(name, args, kwargs, outputs[0], given)
        elif name == "_pack_padded_sequence":
            one = after_packing(function, args, kwargs, x, rows)
        elif name == "_pad_packed_sequence":
            one = after_unpacking(function, args, x, rows)
        elif name == "multi_head_attention_forward":  # (T, B, d), and weights (B, T, S)
            return [rows, *[rows.moved_to(0)] * (len(outputs) - 1)]
        elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return [rows, *after_recurrence(args, rows, len(outputs) - 1)]
        else:
            return [after_any_other(name, each, given) or Lost(name) for each in outputs]
        return [one or Lost(name)] * len(outputs)

    def _fits(self, found: Provenance, output: Tensor) -> bool:
        """Whether there is one example for each slice of the output."""
        if not isinstance(found, Rows):
            return True
        count = self.batch_size if found.examples is None else len(found.examples)
        return 0 <= found.dim < output.dim() and count == output.shape[found.dim]

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
        if name in LIKE_OTHERS:  # of the other tensor only the shape counts
            name = LIKE_OTHERS[name]
            function, args = getattr(Tensor, name), (x, tuple(args[1].shape))
        if name == "__getitem__" and rows.dim == 0 and isinstance(args[1], Tensor) and args[1].dim():
            index = args[1]
            if index.dtype in (torch.bool, torch.uint8):
                return [rows.at(index.nonzero()[:, 0], dim=0)]
            if index.dim() == 1:
                return [rows.at(torch.where(index < 0, index + len(x), index), dim=0)]
        if name == "index_select" and len(args) == 3 and args[1] % x.dim() == rows.dim:
            return [rows.at(args[2], dim=rows.dim)]
        others = [each for each in internals.tree_flatten((args[1:], kwargs))[0] if isinstance(each, Tensor)]
        if any(internals.is_fake(each) for each in others):
            return [None] * count
        plain = all(isinstance(each, PLAIN) for each in internals.tree_flatten((args[1:], kwargs))[0])
        if others or isinstance(rows.examples, Tensor) or not plain:
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
            amounts = argument(args, kwargs, 1, "pad")
            if (kwargs.get("mode") or (rest[1] if len(rest) > 1 else "constant")) != "constant":
                # other modes pad the last dimensions, by elements of the same row
                return [rows if rows.dim < len(shape) - len(amounts) // 2 else None]
            rest, kwargs = rest[:1], {**{k: v for k, v in kwargs.items() if k == "pad"}, "value": -1}
        if name == "view":  # the numbers are not contiguous
            function = Tensor.reshape
        with internals.unobserved(), torch.no_grad():
            numbers = example_numbers(shape, rows)
            result = function(numbers, *on_the_cpu(rest), **on_the_cpu(kwargs))
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
        source = args[2] if setting else argument(args, kwargs, 3, "source")
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
                numbers[on_the_cpu(index)] = values.long()
            else:
                index, values = index.cpu(), values.long()
                numbers.index_copy_(dim, index, values)
                if not numbers.index_select(dim, index).equal(values):  # rows of two examples at one place
                    return None
            slices = numbers.movedim(dim, 0).reshape(target.shape[dim], -1)
            partial = slices.amax(1)
            uniform = bool(((slices == partial[:, None]) | (slices < 0)).all())
            if uniform and bool((partial < 0).any()):
                return Filling(name, Rows(dim, tuple(partial.tolist())))
            return self._rows_from(numbers, first=dim)


def _of_one_example(output: Tensor) -> Rows:
    """The Rows of a tensor of a batch of one example."""
    return Rows(0, None if len(output) == 1 else (0,) * len(output))
