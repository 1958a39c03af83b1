"""Norms and inner products of per-example gradients, from the forms that hold them (see `gradients.py`)."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memsave.ghost import _torch_internals as internals
from memsave.ghost.gradients import FactoredGrad, Gradient, LazyOutputGrads, PerSampleGrad, ViewGrad, upcast

TRIANGLE = 128  # positions of a tile of a symmetric Gram matrix
TILE = 2**24  # elements of the largest Gram tile: 64 MiB in float32
PIECE = 2**20  # elements multiplied and summed at a time: 4 MiB in float32, which stay in the cache
SMALL = 1.25  # time of a multiply-add in Gram matrices, relative to one in the large products of weight gradients
WRITE = 90  # multiply-adds that take as long as writing and reading one element of a formed gradient, on a CPU


class ActivationGramCache:
    """The Gram matrix a a' of the last activations: layers with the same input (q, k, v of attention) form it once.

    It consists of the tiles on and below the diagonal, and is stored only if it takes less memory than a itself.
    """

    def __init__(self) -> None:
        self._activations: Tensor | None = None  # kept alive, because freed memory may be reused by another tensor
        self._version = 0
        self._tiles: list[Tensor] = []

    def tiles(self, activations: Tensor) -> Iterable[Tensor]:
        """The tiles, (B, t, S) each, in their order."""
        if activations.shape[1] > activations.shape[2]:
            return _gram_tiles(activations)
        version = internals.version(activations)
        same = self._activations is not None and _memory_layout(self._activations) == _memory_layout(activations)
        if not same or self._version != version:
            self._activations, self._version, self._tiles = activations, version, list(_gram_tiles(activations))
        return self._tiles


def _gram_tiles(activations: Tensor) -> Iterator[Tensor]:
    if 0 < activations.shape[1] <= TRIANGLE:
        activations = upcast(activations)
        yield activations @ activations.transpose(1, 2)
        return
    for first in range(0, activations.shape[1], TRIANGLE):
        last = first + TRIANGLE
        yield upcast(activations[:, first:last]) @ upcast(activations[:, :last]).transpose(1, 2)


def _memory_layout(values: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that view the same memory in the same way."""
    return internals.storage_id(values), values.storage_offset(), values.shape, values.stride(), values.dtype


def inner_products(one: Gradient, other: Gradient, *, gram_cache: ActivationGramCache | None = None) -> Tensor:
    """<g_b, g'_b> for each example: (B,). `gram_cache` is shared between layers."""
    if isinstance(one, ViewGrad) or isinstance(other, ViewGrad):
        return _products_of_views(one, other, gram_cache)
    if isinstance(one, FactoredGrad) and isinstance(other, FactoredGrad):
        if one is other and isinstance(one.output_grads, Tensor) and not one.one_hot:
            return _squared_norms(one.output_grads, one.activations, gram_cache or ActivationGramCache())
        return _factored_products(one, other)
    if isinstance(other, FactoredGrad):
        one, other = other, one
    assert isinstance(other, PerSampleGrad)
    if isinstance(one, FactoredGrad):
        return _mixed_products(other, one)
    return _elementwise_products(one.values, other.values)


def _products_of_views(one: Gradient, other: Gradient, gram_cache: ActivationGramCache | None) -> Tensor:
    if isinstance(one, ViewGrad) and isinstance(other, ViewGrad):
        if one.geometry == other.geometry:
            return inner_products(one.gradient, other.gradient, gram_cache=gram_cache)
        if not one.overlaps(other):
            held = one.gradient.values if isinstance(one.gradient, PerSampleGrad) else one.gradient.output_grads
            assert isinstance(held, Tensor)
            return upcast(held).new_zeros(len(held))
    one = one.per_sample() if isinstance(one, ViewGrad) else one
    other = other.per_sample() if isinstance(other, ViewGrad) else other
    return inner_products(one, other, gram_cache=gram_cache)


def magnitude(gradient: Gradient) -> Tensor:
    """The norm without any cancellation in the sum, (B,): sum_t |g_bt| |a_bt|, or the norm itself."""
    if isinstance(gradient, ViewGrad):
        return magnitude(gradient.gradient)
    if isinstance(gradient, PerSampleGrad):
        return inner_products(gradient, gradient).sqrt()
    grads, inputs = gradient.output_grads, gradient.activations
    if not isinstance(grads, Tensor):
        gram = grads.pairwise_products(grads) if grads.gram is None else grads.gram
        norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    else:
        norms = torch.linalg.vector_norm(upcast(grads), dim=-1)  # (B, T)
    if gradient.one_hot:
        return (norms * (inputs >= 0)).sum(1)
    return (torch.linalg.vector_norm(upcast(inputs), dim=-1) * norms).sum(1)


def cheapest_form(gradient: Gradient, *, summed: bool, bytes_left: int = 0) -> Gradient:
    """The form that gives the norm in the least time, among those that take at most `bytes_left` more than (g, a).

    Gram matrices take T^2 (p + d) multiply-adds, or half of that with tiles on and below the diagonal. The gradient
    takes T p d multiply-adds and must be written. `summed`: the clipped sum is formed from the returned form; a formed
    gradient then replaces the product T p d of that sum, and one of the B stored gradients becomes the sum.
    """
    if isinstance(gradient, PerSampleGrad):
        return gradient
    if isinstance(gradient, ViewGrad):
        part = cheapest_form(gradient.gradient, summed=summed, bytes_left=bytes_left)
        assert not isinstance(part, ViewGrad)
        return replace(gradient, gradient=part)
    if not isinstance(gradient.output_grads, Tensor):
        return gradient.per_sample() if gradient.output_grads.gram is None else gradient
    batch, length, p, d = gradient.sizes()
    gram_time = SMALL * length * (length + min(length, TRIANGLE)) / 2 * (p + d)
    forming_time = (length + WRITE) * p * d
    if gradient.one_hot:  # indices are compared, and gradients are added where indices are equal
        gram_time, forming_time = SMALL * length * length * p, length * p + WRITE * p * d
    elif summed:
        gram_time += length * p * d
    formed_bytes = (batch - summed) * p * d * upcast(gradient.output_grads[:0]).element_size()
    fits = formed_bytes <= held_bytes(gradient) + bytes_left
    return gradient.per_sample() if fits and forming_time < gram_time else gradient


def held_bytes(gradient: Gradient) -> int:
    """The bytes of the form's tensors."""
    gradient = gradient.gradient if isinstance(gradient, ViewGrad) else gradient
    held = (gradient.values,) if isinstance(gradient, PerSampleGrad) else (gradient.output_grads, gradient.activations)
    return sum(each.numel() * each.element_size() for each in held if isinstance(each, Tensor))


def _elementwise_products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products over all but the batch, (B,), piece by piece: one product (einsum, bmm) is inexact in float32.

    `experiments/float32_norms` measures by how much.
    """
    one, other = one.reshape(one.shape[0], -1), other.reshape(other.shape[0], -1)
    step = max(1, PIECE // max(1, one.shape[0]))
    if one.shape[1] <= step:
        return (upcast(one) * upcast(other)).sum(1)
    pieces = [(upcast(a) * upcast(b)).sum(1) for a, b in zip(one.split(step, 1), other.split(step, 1), strict=True)]
    return torch.stack(pieces).sum(0)


def _mixed_products(formed: PerSampleGrad, factored: FactoredGrad) -> Tensor:
    """sum_t g_t' D a_t, (B,), for formed gradients D; the factored gradients are not formed."""
    values, grads, inputs = upcast(formed.values), factored.output_grads, factored.activations
    if factored.one_hot:
        assert isinstance(grads, Tensor)
        values = values if factored.transposed else values.transpose(1, 2)  # (B, d, p)
        picked = values.gather(1, inputs.clamp(min=0).unsqueeze(-1).expand_as(grads)) * (inputs >= 0).unsqueeze(-1)
        return (picked * upcast(grads)).sum((1, 2))
    values = values.transpose(1, 2) if factored.transposed else values  # (B, p, d)
    products = upcast(grads) @ values if isinstance(grads, Tensor) else grads.matmul(values)  # (B, T, d)
    return (products * upcast(inputs)).sum((1, 2))


def _squared_norms(grads: Tensor, activations: Tensor, gram_cache: ActivationGramCache) -> Tensor:
    """sum_ts <g_t, g_s> <a_t, a_s>: entries above the diagonal equal those below it."""
    if 0 < grads.shape[1] <= TRIANGLE:  # one tile, without slices: small layers take as long as their operators start
        (tile,) = gram_cache.tiles(activations)
        return _pairwise_products(grads, grads).mul_(tile).sum((1, 2))
    total = activations.new_zeros(len(activations), dtype=upcast(activations).dtype)
    for number, tile in enumerate(gram_cache.tiles(activations)):
        first, last = number * TRIANGLE, (number + 1) * TRIANGLE
        entries = _pairwise_products(grads[:, first:last], grads[:, :last]).mul_(tile)  # (B, t, S)
        entries[:, :, :first] *= 2
        total = total + entries.sum((1, 2))
    return total


def _factored_products(one: FactoredGrad, other: FactoredGrad) -> Tensor:
    """Products of two Gram matrices, tile by tile: sum_ts <row_t, row'_s> <column_t, column'_s>."""
    rows, other_rows, columns, other_columns = one.rows, other.rows, one.columns, other.columns
    if not (isinstance(columns, Tensor) and isinstance(other_columns, Tensor)):
        return (_pairwise_products(columns, other_columns) * _pairwise_products(rows, other_rows)).sum((1, 2))
    if not (isinstance(rows, Tensor) and isinstance(other_rows, Tensor)):
        row_products = _pairwise_products(rows, other_rows)  # first, because lazy gradients need temporary memory
        return _pairwise_products(columns, other_columns).mul_(row_products).sum((1, 2))
    (batch, length), grads = rows.shape[:2], columns if rows.dim() == 2 else rows
    step = max(1, TILE // max(1, batch * other_rows.shape[1]))
    total = grads.new_zeros(batch, dtype=upcast(grads).dtype)
    for first in range(0, length, step):
        part = slice(first, first + step)
        products = _pairwise_products(columns[:, part], other_columns)  # (B, t, S)
        total = total + (_pairwise_products(rows[:, part], other_rows) * products).sum((1, 2))
    return total


def _pairwise_products(one: Tensor | LazyOutputGrads, other: Tensor | LazyOutputGrads) -> Tensor:
    """<u_bt, u'_bs>, (B, T, S), of any two factors; integers are the indices of one-hot vectors."""
    if not isinstance(one, Tensor):
        if one is other and one.gram is not None:
            return one.gram
        if isinstance(other, Tensor) and not other.is_floating_point():
            return one.gather(other)
        return one.pairwise_products(other)
    if not isinstance(other, Tensor):
        return _pairwise_products(other, one).transpose(1, 2)
    if one.is_floating_point() and other.is_floating_point():
        return upcast(one) @ upcast(other).transpose(1, 2)
    if not one.is_floating_point() and not other.is_floating_point():
        return (one[:, :, None] == other[:, None, :]) & (one >= 0)[:, :, None]
    if one.is_floating_point():
        return _gather(one, other)
    return _gather(other, one).transpose(1, 2)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """The entries of values (B, T, p) at index (B, S): (B, T, S), zero for a negative index."""
    columns = index.clamp(min=0)[:, None, :].expand(-1, values.shape[1], -1)
    return upcast(values.gather(2, columns)) * (index >= 0)[:, None, :]
