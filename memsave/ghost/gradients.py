"""One parameter's per-example gradients, held in the form that is cheapest to hold.

Where a weight W is used at T places of an example, its gradient is a sum of T outer products,

    dL_b/dW = sum_t u_bt (x) v_bt ,

with u the output's gradients and v the inputs of a linear layer (or one-hot rows of an embedding). Norms, inner
products and weighted sums follow from u and v without the gradients themselves:

    <g, g'>_b = sum_{t,s} <u_bt, u'_bs> <v_bt, v'_bs>        (ghost norm: Goodfellow 2015; Li et al. 2022, section 4)

`Outer` holds (u, v), `Dense` the gradients. All arithmetic is float32 or wider.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 2**24  # elements of the largest Gram tile: 64 MiB in float32


@dataclass(frozen=True)
class Dense:
    """The gradients themselves, (B, *shape of the parameter)."""

    values: Tensor

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_b weights[b] g_b, in the parameter's shape; examples of weight zero contribute nothing, even NaN."""
        values = wide(self.values)
        return torch.einsum("b,b...->...", weights.to(values.dtype), keep_rows(values, weights))


@dataclass(frozen=True)
class Outer:
    """Sums of outer products: left (B, T, p), or row numbers (B, T) of one-hot rows, and right (B, T, d).

    The gradient is (p, d), or (d, p) when `transposed`, as in a layer that stores its weight that way.
    """

    left: Tensor
    right: Tensor
    rows: int
    """p, the number of rows."""
    transposed: bool = False

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds row numbers; a negative number is a row of zeros."""
        return not self.left.is_floating_point()

    def dense(self) -> Dense:
        """Form the gradients."""
        right = wide(self.right)
        if self.one_hot:
            values = right.new_zeros(len(right), self.rows + 1, right.shape[-1])
            index = self.left.remainder(self.rows + 1)  # -1 is the row past the last, which is dropped
            values.scatter_add_(1, index.unsqueeze(-1).expand_as(right), right)
            values = values[:, :-1]
        else:
            values = torch.einsum("btp,btd->bpd", wide(self.left), right)
        return Dense(values.transpose(1, 2) if self.transposed else values)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_b weights[b] g_b, without the g_b."""
        right = wide(self.right)
        right = keep_rows(right, weights) * weights.to(right.dtype)[:, None, None]
        if self.one_hot:
            total = right.new_zeros(self.rows + 1, right.shape[-1])
            total = total.index_add(0, self.left.remainder(self.rows + 1).flatten(), right.flatten(0, 1))[:-1]
        else:
            left = keep_rows(wide(self.left), weights)
            total = left.flatten(0, 1).T @ right.flatten(0, 1)
        return total.T if self.transposed else total


Gradient = Dense | Outer


def inner(one: Gradient, other: Gradient) -> Tensor:
    """<g_b, g'_b> for each example: (B,)."""
    if isinstance(one, Outer) and isinstance(other, Outer) and one.transposed == other.transposed:
        if one is other and not one.one_hot and _dense_is_cheaper(one):
            return _dot(one.dense().values, one.dense().values)
        return _gram(one, other)
    values = [each.dense().values if isinstance(each, Outer) else wide(each.values) for each in (one, other)]
    return _dot(*values)


def squared_norm(gradient: Gradient) -> Tensor:
    """|g_b|^2 for each example: (B,)."""
    if isinstance(gradient, Outer) and not gradient.one_hot and _dense_is_cheaper(gradient):
        gradient = gradient.dense()
    return inner(gradient, gradient)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def keep_rows(values: Tensor, weights: Tensor) -> Tensor:
    """Zero the rows of weight zero before anything is multiplied: 0 x NaN is NaN."""
    kept = (weights != 0).view(-1, *[1] * (values.dim() - 1))
    return torch.where(kept, values, values.new_zeros(()))


def _dense_is_cheaper(outer: Outer) -> bool:
    """Gram costs T^2 (p + d) for each example, the gradient T p d."""
    places, d = outer.right.shape[1:]
    return places * (outer.rows + d) > outer.rows * d


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).flatten(1).sum(1) if one.dim() > 1 else one * other


def _gram(one: Outer, other: Outer) -> Tensor:
    """Rows of the two Gram matrices, tile by tile: sum_t sum_s (u_t . u'_s) (v_t . v'_s)."""
    batch, places = one.right.shape[:2]
    step = max(1, TILE // max(1, batch * other.right.shape[1]))
    total = one.right.new_zeros(batch, dtype=wide(one.right).dtype)
    for first in range(0, places, step):
        part = slice(first, first + step)
        rights = wide(one.right[:, part]) @ wide(other.right).transpose(1, 2)  # (B, t, S)
        total = total + (_lefts(one.left[:, part], other.left) * rights).sum((1, 2))
    return total


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
