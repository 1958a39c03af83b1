"""One parameter's per-example gradients, held in the form that is cheapest to hold.

Where a weight W is used at T places of an example, its gradient is a sum of T outer products,

    dL_b/dW = sum_t u_bt (x) v_bt ,

with u the output's gradients and v the inputs of a linear layer (or one-hot rows of an embedding). Norms, inner
products and weighted sums follow from u and v without the gradients themselves:

    <g, g'>_b = sum_{t,s} <u_bt, u'_bs> <v_bt, v'_bs>        (ghost norm: Goodfellow 2015; Li et al. 2022, section 4)

`Outer` holds (u, v), `Dense` the gradients. All arithmetic is float32 or wider.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TRIANGLE = 128  # places of a tile of a Gram matrix that is symmetric
TILE = 2**24  # elements of the largest Gram tile: 64 MiB in float32
PIECE = 2**20  # elements multiplied and summed at a time: 4 MiB in float32, which stay in the cache
SMALL = 1.25  # time of a multiply-add in Gram matrices, over one in the large products of weight gradients
WRITE = 90  # multiply-adds in whose time one element of an instantiated gradient is written and read, on a CPU


class Rows(Protocol):
    """Rows u_bt, (B, T, p), that are not held but made again where they are needed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, p)."""

    @property
    def products(self) -> Tensor | None:
        """<u_bt, u_bs>, (B, T, T), where that is held."""

    def against(self, other: "Tensor | Rows") -> Tensor:
        """<u_bt, u'_bs>, (B, T, S), with rows (B, S, p)."""

    def columns(self, rows: Tensor) -> Tensor:
        """u_bt at the row numbers (B, S): (B, T, S), zero for a negative number."""

    def formed(self, right: Tensor) -> Tensor:
        """sum_t u_bt (x) v_bt, (B, p, d), for v (B, T, d)."""

    def pull(self, values: Tensor) -> Tensor:
        """u_bt' D_b, (B, T, d), for D (B, p, d)."""

    def add_sum(self, total: Tensor, right: Tensor) -> None:
        """Add sum_bt u_bt (x) v_bt to a total (p, d)."""

    def keep(self, kept: Tensor) -> "Rows":
        """With rows of zeros for the examples that `kept` (B,) does not name."""


@dataclass(frozen=True)
class Dense:
    """The gradients themselves, (B, *shape of the parameter)."""

    values: Tensor
    fresh: bool = False
    """Whether nothing else has the values, as a rule's may be another parameter's or those of an activation."""

    def weighted_sum(self, weights: Tensor, *, into: Tensor | None = None, spare: bool = False) -> Tensor:
        """sum_b weights[b] g_b, in the parameter's shape; added to `into` where that is given.

        `spare`: the gradients are not needed any more; the sum takes their place if it can.
        """
        values = wide(self.values)
        weights = weights.to(values.dtype)
        if len(values) == 1 and into is None and spare and self.fresh:
            return values[0].mul_(weights[0])
        if len(values) == 1 and into is not None:
            return into.addcmul_(values[0], weights[0])
        total = (values.reshape(len(values), -1).T @ weights).view(values.shape[1:])
        return total if into is None else into.add_(total)

    def keep(self, kept: Tensor) -> "Dense":
        """Without the examples that `kept` (B,) does not name: their rows are zero, even where they were NaN."""
        return Dense(_rows(self.values, kept))


@dataclass(frozen=True)
class Outer:
    """Sums of outer products: left (B, T, p), or row numbers (B, T) of one-hot rows, and right (B, T, d).

    The gradient is (p, d), or (d, p) when `transposed`, as in a layer that stores its weight that way. A left that is
    no tensor makes its rows again where they are needed.
    """

    left: Tensor | Rows
    right: Tensor
    rows: int
    """p, the number of rows."""
    transposed: bool = False

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds row numbers; a negative number is a row of zeros."""
        return isinstance(self.left, Tensor) and not self.left.is_floating_point()

    def dense(self) -> Dense:
        """Form the gradients."""
        right = wide(self.right)
        if not isinstance(self.left, Tensor):
            return Dense(self.left.formed(right), fresh=True)
        if self.one_hot:
            values = right.new_zeros(len(right), self.rows, right.shape[-1])
            index = self.left.clamp(min=0).unsqueeze(-1).expand_as(right)
            values.scatter_add_(1, index, _rows(right, self.left >= 0))
            return Dense(values.transpose(1, 2) if self.transposed else values, fresh=True)
        left = wide(self.left)
        return Dense(right.transpose(1, 2) @ left if self.transposed else left.transpose(1, 2) @ right, fresh=True)

    def weighted_sum(self, weights: Tensor, *, into: Tensor | None = None, spare: bool = False) -> Tensor:
        """sum_b weights[b] g_b, without the g_b; added to `into` where that is given."""
        right = wide(self.right)
        weights = weights.to(right.dtype)[:, None, None]
        if not isinstance(self.left, Tensor):
            total = right.new_zeros(self.rows, right.shape[-1]) if into is None else into
            self.left.add_sum(total, right * weights)
            return total
        left = wide(self.left)
        if self.one_hot or right.shape[-1] <= left.shape[-1]:  # the smaller one: it is copied for that
            right = right * weights
        else:
            left = left * weights
        if self.one_hot:
            total = right.new_zeros(self.rows, right.shape[-1]) if into is None else into.T if self.transposed else into
            total.index_add_(0, left.clamp(min=0).flatten(), _rows(right, left >= 0).flatten(0, 1))
            return total.T if self.transposed else total
        first, second = (right, left) if self.transposed else (left, right)
        first, second = first.flatten(0, 1).T, second.flatten(0, 1)
        return first @ second if into is None else into.addmm_(first, second)

    def keep(self, kept: Tensor) -> "Outer":
        """Without the examples that `kept` (B,) does not name: their rows are zero, even where they were NaN."""
        if isinstance(self.left, Tensor):
            left: Tensor | Rows = self.left if self.one_hot else _rows(self.left, kept)
        else:
            left = self.left.keep(kept)
        return Outer(left, _rows(self.right, kept), rows=self.rows, transposed=self.transposed)


Gradient = Dense | Outer


class InputTiles:
    """v v' of the last v that was seen: layers with the same input, as q, k and v of attention, form it once.

    Tiles on and below the diagonal; held only where they take less than v itself.
    """

    def __init__(self) -> None:
        self._of: Tensor | None = None  # held, or its memory might be another's
        self._version = 0
        self._tiles: list[Tensor] = []

    def of(self, right: Tensor) -> Iterable[Tensor]:
        """(B, t, S) for each tile, in their order."""
        if right.shape[1] > right.shape[2]:
            return _tiles(right)
        if self._of is None or self._version != right._version or _place(self._of) != _place(right):
            self._of, self._version, self._tiles = right, right._version, list(_tiles(right))
        return self._tiles


def _tiles(right: Tensor) -> Iterator[Tensor]:
    for first in range(0, right.shape[1], TRIANGLE):
        last = first + TRIANGLE
        yield wide(right[:, first:last]) @ wide(right[:, :last]).transpose(1, 2)


def _place(values: Tensor) -> tuple[Any, ...]:
    """Where it lies in memory, and how."""
    return values.untyped_storage()._cdata, values.storage_offset(), values.shape, values.stride(), values.dtype


def inner(one: Gradient, other: Gradient, *, tiles: InputTiles | None = None) -> Tensor:
    """<g_b, g'_b> for each example: (B,). `tiles`: of products that are to be shared between layers."""
    if isinstance(one, Outer) and isinstance(other, Outer):
        if one is other and isinstance(one.left, Tensor) and not one.one_hot:
            return _own_gram(one.left, one.right, tiles or InputTiles())
        return _gram(one, other) if one.transposed == other.transposed else _against(one.dense(), other)
    if isinstance(other, Outer):
        one, other = other, one
    assert isinstance(other, Dense)
    if isinstance(one, Outer):
        return _against(other, one)
    return _dot(one.values, other.values)


def magnitude(gradient: Gradient) -> Tensor:
    """What the norm would be if nothing in the sum cancelled, (B,): sum_t |u_bt| |v_bt|, or the norm itself."""
    if isinstance(gradient, Dense):
        return inner(gradient, gradient).sqrt()
    sizes = torch.linalg.vector_norm(wide(gradient.right), dim=-1)  # (B, T)
    left = gradient.left
    if not isinstance(left, Tensor):
        squares = (left.against(left) if left.products is None else left.products).diagonal(dim1=1, dim2=2)
        return (sizes * squares.clamp(min=0).sqrt()).sum(1)
    if gradient.one_hot:
        return (sizes * (left >= 0)).sum(1)
    return (sizes * torch.linalg.vector_norm(wide(left), dim=-1)).sum(1)


def cheapest(gradient: Gradient, *, summed: bool, room: int = 0) -> Gradient:
    """The form in which an example's norm takes the least time, of those that take at most `room` bytes over (u, v).

    The Gram form takes T^2 (p + d) multiply-adds, or half of that for its tiles on and below the diagonal; the gradient
    T p d and its writing. `summed`: the clipped sum will be formed from what is returned; the gradient then replaces
    that product, T p d more, and one of the B that are held is the sum's own.
    """
    if isinstance(gradient, Dense):
        return gradient
    if not isinstance(gradient.left, Tensor):
        return gradient.dense() if gradient.left.products is None else gradient
    batch, places, d = gradient.right.shape
    p = gradient.rows
    gram, formed = SMALL * places * (places + min(places, TRIANGLE)) / 2 * (p + d), (places + WRITE) * p * d
    if gradient.one_hot:  # the rows are compared, and added to where they are equal
        gram, formed = SMALL * places * places * d, places * d + WRITE * p * d
    elif summed:
        gram += places * p * d
    whole = (batch - summed) * p * d * wide(gradient.right[:0]).element_size()
    return gradient.dense() if whole <= held_bytes(gradient) + room and formed < gram else gradient


def held_bytes(gradient: Gradient) -> int:
    """What its own tensors take."""
    tensors = (gradient.values,) if isinstance(gradient, Dense) else (gradient.left, gradient.right)
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def has_values(tensor: Tensor) -> bool:
    """Whether its values may be asked for; a fake tensor or one on `meta` has none."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def _rows(values: Tensor, kept: Tensor) -> Tensor:
    """Zero what is not kept, by the leading dimensions, before anything is multiplied: 0 x NaN is NaN."""
    kept = kept.view(*kept.shape, *[1] * (values.dim() - kept.dim()))
    return torch.where(kept, values, values.new_zeros(()))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """sum over all but the examples, (B,), piece by piece: a product in one (einsum, bmm) loses digits in float32.

    `experiments/float32_norms` shows how many.
    """
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    step = max(1, PIECE // max(1, len(one)))
    pieces = [(wide(a) * wide(b)).sum(1) for a, b in zip(one.split(step, 1), other.split(step, 1), strict=True)]
    return torch.stack(pieces).sum(0)


def _against(dense: Dense, outer: Outer) -> Tensor:
    """sum_t u_t' D v_t, (B,), without the other gradient."""
    values = wide(dense.values).transpose(1, 2) if outer.transposed else wide(dense.values)  # (B, p, d)
    left, right = outer.left, wide(outer.right)
    if not isinstance(left, Tensor):
        rows = left.pull(values)  # (B, T, d)
    elif outer.one_hot:
        rows = values.gather(1, left.clamp(min=0).unsqueeze(-1).expand_as(right)) * (left >= 0).unsqueeze(-1)
    else:
        rows = wide(left) @ values
    return (rows * right).sum((1, 2))


def _own_gram(left: Tensor, right: Tensor, tiles: InputTiles) -> Tensor:
    """sum_ts <u_t, u_s> <v_t, v_s>: what is above the diagonal is what is below it."""
    total = right.new_zeros(len(right), dtype=wide(right).dtype)
    for number, rights in enumerate(tiles.of(right)):
        first, last = number * TRIANGLE, (number + 1) * TRIANGLE
        entries = _lefts(left[:, first:last], left[:, :last]).mul_(rights)  # (B, t, S)
        entries[:, :, :first] *= 2
        total = total + entries.sum((1, 2))
    return total


def _gram(one: Outer, other: Outer) -> Tensor:
    """Rows of the two Gram matrices, tile by tile: sum_t sum_s (u_t . u'_s) (v_t . v'_s)."""
    if not isinstance(one.left, Tensor):
        return _gram_of_rows(one.left, one.right, other)
    if not isinstance(other.left, Tensor):
        return _gram_of_rows(other.left, other.right, one)
    batch, places = one.right.shape[:2]
    step = max(1, TILE // max(1, batch * other.right.shape[1]))
    total = one.right.new_zeros(batch, dtype=wide(one.right).dtype)
    for first in range(0, places, step):
        part = slice(first, first + step)
        rights = wide(one.right[:, part]) @ wide(other.right).transpose(1, 2)  # (B, t, S)
        total = total + (_lefts(one.left[:, part], other.left) * rights).sum((1, 2))
    return total


def _gram_of_rows(left: Rows, right: Tensor, other: Outer) -> Tensor:
    if left is other.left and left.products is not None:
        lefts = left.products
    elif other.one_hot:
        assert isinstance(other.left, Tensor)
        lefts = left.columns(other.left)
    else:
        lefts = left.against(other.left)
    return (wide(right) @ wide(other.right).transpose(1, 2)).mul_(lefts).sum((1, 2))


def _lefts(one: Tensor, other: Tensor) -> Tensor:
    """<u_bt, u'_bs>, (B, T, S), where either side may be row numbers of one-hot rows."""
    if one.is_floating_point() and other.is_floating_point():
        return wide(one) @ wide(other).transpose(1, 2)
    if not one.is_floating_point() and not other.is_floating_point():
        return (one[:, :, None] == other[:, None, :]) & (one >= 0)[:, :, None]
    if one.is_floating_point():
        return _columns(one, other)  # u_t at row x_s
    return _columns(other, one).transpose(1, 2)


def _columns(dense: Tensor, rows: Tensor) -> Tensor:
    """dense (B, T, p) at the row numbers (B, S): (B, T, S), zero for a negative number."""
    index = rows.clamp(min=0)[:, None, :].expand(-1, dense.shape[1], -1)
    return wide(dense.gather(2, index)) * (rows >= 0)[:, None, :]
