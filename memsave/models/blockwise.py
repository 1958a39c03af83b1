"""The steps of `chunks.py` that need no neighbouring voxels, computed in blocks of voxels.

    expand     s = SiLU(W x + c)                     project     p += V SiLU(scale d + shift)

A few blocks fit into the shared cache of a CPU, and what a step computes on its way is never a whole tensor: a, u and t
of `chunks.py` exist for one block at a time, also in the backward, which computes them again. On a GPU a block is
larger, but still a part of a whole volume.

Rows are voxels: tensors are (B, V, C). A few channels are fewer than the lanes of a CPU, so elementwise operators and
sums take a block as a matrix of 64 voxels times C channels per row. Tensors of bfloat16 are computed in float32 on the
CPU, except what `add_scaled` writes over them; sums over voxels are in float32 or wider within a block and in float64
over blocks.

Each function is an operator of PyTorch (`operators.py`). Its scratch are tensors of one block, which all blocks share.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from memsave.models.operators import LIBRARY, operator
from memsave.tf32 import allows_tf32, without_tf32

BLOCK = {"cpu": 2**20, "cuda": 2**25}
"""Elements of a block: 4 MiB in float32 on the CPU; smaller ones cost more time to start than they save."""
TILE = 64  # voxels
SUM_COLUMNS = 128  # on the CPU, sums over the rows of a matrix of so many columns are the fastest
PARTS = {"cpu": 16, "cuda": 256}
"""Parts of a block in a contraction over its voxels, which run at the same time."""


@operator(scratch=lambda one, _: (_space(one, dtype=accumulation_dtype(one.dtype)),))
def moments(one: Tensor, other: Tensor, scratch: Tensor) -> Tensor:
    """The sums over voxels of `one`, and of `one` times `other`, both (B, V, P): (2, B, P) in float64."""
    found = one.new_zeros(2, one.shape[0], one.shape[2], dtype=torch.float64)
    for sample, block in _blocks(one):
        rows = one[sample, block]
        found[0, sample] += _sum(rows)
        found[1, sample] += _sum_of_products(rows, other[sample, block], space=scratch[: len(rows)])
    return found


@operator()
def sums(x: Tensor) -> Tensor:
    """The sums over voxels of x (B, V, P): (B, P) in float64."""
    found = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float64)
    for sample, block in _blocks(x):
        found[sample] += _sum(x[sample, block])
    return found


@operator(scratch=lambda x, _: (_space(x, dtype=accumulation_dtype(x.dtype)),))
def covariance(x: Tensor, mean: Tensor, scratch: Tensor) -> Tensor:
    """The covariance (B, C, C) in float64 of x (B, V, C) with this mean (B, C)."""
    found = x.new_zeros(*mean.shape, x.shape[2], dtype=torch.float64)
    means = _tiled(mean, scratch)
    with without_tf32() if allows_tf32(x.device) else nullcontext():  # moments are not rounded
        for sample, block in _blocks(x):
            rows = x[sample, block]
            centred = scratch[: len(rows)]
            torch.sub(_wide(rows), means[sample, : _width(rows)], out=_wide(centred))
            found[sample] += _inner(centred, centred)
    return found / x.shape[1]


@operator(writes="out", scratch=lambda *arguments: (_space(arguments[-1]),))
def expand(x: Tensor, weight: Tensor, shift: Tensor, out: Tensor, scratch: Tensor) -> None:
    """out (B, V, E) = SiLU(x weight' + shift) for x (B, V, C), weight (B, E, C), shift (B, E)."""
    across, shifts = _across(weight, scratch), _tiled(shift, scratch)
    for sample, block in _blocks(out):
        expanded = _linear(x[sample, block], across[sample], shifts[sample], out=_over(out[sample, block], scratch))
        _keep(F.silu(expanded, inplace=True), out[sample, block])


@operator(writes="by_x", scratch=lambda grad, x, *_: (_space(grad), _space(grad, columns=x.shape[2])))
def expand_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    by_x: Tensor,
    adds: bool,
    scratch: Tensor,
    scratch_product: Tensor,
) -> Tensor:
    """From dL/ds (B, V, E): writes dL/dx to `by_x` (B, V, C), or adds it to that.

    Returns dL/dweight and dL/dshift, (B, E, C + 1) in float64.
    """
    found = grad.new_zeros(*weight.shape[:2], weight.shape[2] + 1, dtype=torch.float64)
    across, back, shifts = _across(weight, scratch), weight.to(scratch.dtype), _tiled(shift, scratch)
    for sample, block in _blocks(grad):
        rows = x[sample, block]
        expanded = _linear(rows, across[sample], shifts[sample], out=scratch[: len(rows)])
        by_expanded = _silu_backward(_computed(grad[sample, block]), expanded, over=expanded)
        found[sample, :, :-1] += _inner(by_expanded, _computed(rows))
        found[sample, :, -1] += _sum(by_expanded)
        _product_into(by_x[sample, block], by_expanded, back[sample], adds=adds, space=scratch_product)
    return found


@operator(
    writes="total", scratch=lambda filtered, *others: (_space(filtered), _space(filtered, columns=others[3].shape[2]))
)
def project(
    filtered: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    total: Tensor,
    adds: bool,
    scratch: Tensor,
    scratch_product: Tensor,
) -> None:
    """total (B, V, C) = or += SiLU(scale filtered + shift) weight' for filtered (B, V, E), scale and shift (B, E)."""
    across, scales, shifts = _across(weight, scratch), _tiled(scale, scratch), _tiled(shift, scratch)
    for sample, block in _blocks(filtered):
        normed = _affine(filtered[sample, block], scales[sample], shifts[sample], out=scratch)
        _product_into(total[sample, block], F.silu(normed, inplace=True), across, adds=adds, space=scratch_product)


@operator(writes="out", scratch=lambda _, filtered, *others: (_space(filtered), _space(filtered), _sum_space(filtered)))
def project_backward(
    grad: Tensor,
    filtered: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    out: Tensor,
    scratch: Tensor,
    scratch_activated: Tensor,
    scratch_products: Tensor,
) -> tuple[Tensor, Tensor]:
    """From dL/dp (B, V, C): out (B, V, E) = dL/du of u = scale filtered + shift.

    Returns dL/dweight and the moments of dL/du, before it is rounded to the dtype of `out`, and d, both in float64.
    """
    found = torch.zeros_like(weight, dtype=torch.float64)
    totals = scale.new_zeros(2, *scale.shape, dtype=torch.float64)
    back, scales, shifts = weight.to(scratch.dtype), _tiled(scale, scratch), _tiled(shift, scratch)
    for sample, block in _blocks(filtered):
        normed = _affine(filtered[sample, block], scales[sample], shifts[sample], out=scratch)
        upstream = _computed(grad[sample, block])
        found += _inner(upstream, torch.ops.aten.silu.out(normed, out=scratch_activated[: len(normed)]))
        by_activated = _over(out[sample, block], scratch_activated)
        torch.mm(upstream, back, out=by_activated)
        by_normed = _silu_backward(by_activated, normed, over=by_activated)
        _keep(by_normed, out[sample, block])
        totals[0, sample] += _sum(by_normed)
        space = scratch_products[: len(normed)] if len(scratch_products) else normed
        totals[1, sample] += _sum_of_products(by_normed, filtered[sample, block], space=space)
    return found, totals


@operator(writes="out")
def add_scaled(out: Tensor, factor: Tensor, other: Tensor, by: Tensor, shift: Tensor) -> None:
    """out = factor out + by other + shift; tensors (B, V, P) and vectors (B, P)."""
    tiled = [_tiled(each, out) for each in (factor, by, shift)]
    for sample, block in _blocks(out):
        rows = out[sample, block]
        a, b, c = (each[sample, : _width(rows)] for each in tiled)
        wide = torch.addcmul(c, _wide(rows), a, out=_wide(rows))
        wide.addcmul_(_wide(other[sample, block]).to(wide.dtype), b)


@operator(writes="total", scratch=lambda total, x, *_: (_space(total, dtype=_computed_dtype(x)),))
def add_linear(total: Tensor, x: Tensor, weight: Tensor, shift: Tensor, scratch: Tensor) -> None:
    """total (B, V, P) += x weight' + shift for x (B, V, C), weight (B, P, C), shift (B, P)."""
    across, shifts = _across(weight, scratch), _tiled(shift, scratch)
    for sample, block in _blocks(total):
        rows = _linear(x[sample, block], across[sample], shifts[sample], out=scratch)
        _wide(total[sample, block]).add_(_wide(rows))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 for narrower ones."""
    return dtype if dtype == torch.float64 else torch.float32


def _blocks(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """(sample, slice of its voxels) of each block of (B, V, P)."""
    batch, voxels, _ = rows.shape
    size = _block_size(rows)
    for sample in range(batch):
        for start in range(0, voxels, size):
            yield sample, slice(start, min(start + size, voxels))


def _block_size(rows: Tensor) -> int:
    """The most voxels of a block of (B, V, P)."""
    size = max(1, BLOCK.get(rows.device.type, BLOCK["cpu"]) // (rows.shape[2] * TILE)) * TILE
    return min(size, rows.shape[1])


def _space(rows: Tensor, *, columns: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized rows of a block of (B, V, P), which all blocks share; `columns`: another number than P."""
    return rows.new_empty(_block_size(rows), columns or rows.shape[2], dtype=dtype or _computed_dtype(rows))


def _sum_space(rows: Tensor) -> Tensor:
    """Rows of a block in the dtype of sums; none where `_space` has that dtype."""
    dtype = accumulation_dtype(rows.dtype)
    return rows.new_empty(0) if _computed_dtype(rows) == dtype else _space(rows, dtype=dtype)


def _over(rows: Tensor, space: Tensor) -> Tensor:
    """Where to compute what `_keep` writes to the rows: the rows themselves, or `space` in another dtype."""
    return rows if rows.dtype == space.dtype else space[: len(rows)]


def _keep(found: Tensor, rows: Tensor) -> None:
    if found.dtype != rows.dtype:
        rows.copy_(found)


def _computed_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of the computation: on the CPU at least float32."""
    return accumulation_dtype(rows.dtype) if rows.device.type == "cpu" else rows.dtype


def _computed(rows: Tensor) -> Tensor:
    return rows.to(_computed_dtype(rows))


def _width(rows: Tensor) -> int:
    """The columns of `_wide(rows)`."""
    return gcd(len(rows), TILE) * rows.shape[1]


def _wide(rows: Tensor) -> Tensor:
    """(V, P) as (V / k, k P), a view, where k is 64 or, at the end of a volume, a divisor of it."""
    return rows.view(-1, _width(rows))


def _tiled(vectors: Tensor, like: Tensor) -> Tensor:
    """Vectors (B, P) as (B, 64 P), whose first elements are a row of `_wide`."""
    return vectors.to(like.dtype)[:, None].expand(-1, TILE, -1).flatten(1)


def _across(weight: Tensor, like: Tensor) -> Tensor:
    """Weights (..., P, Q) as (..., Q, P)."""
    return weight.to(like.dtype).transpose(-1, -2).contiguous()


def _linear(rows: Tensor, across: Tensor, shifts: Tensor, *, out: Tensor) -> Tensor:
    """rows across + shift: (V, C) to (V, P), the first rows of `out`."""
    out = torch.mm(_computed(rows), across, out=out[: len(rows)])
    _wide(out).add_(shifts[: _width(out)])
    return out


def _affine(rows: Tensor, scales: Tensor, shifts: Tensor, *, out: Tensor) -> Tensor:
    """scale rows + shift, per channel, the first rows of `out`."""
    width, out = _width(rows), out[: len(rows)]
    torch.addcmul(shifts[:width], _wide(_computed(rows)), scales[:width], out=_wide(out))
    return out


def _product_into(total: Tensor, rows: Tensor, weight: Tensor, *, adds: bool, space: Tensor) -> None:
    """total (V, C) = or += rows (V, K) weight (K, C); MKL is slow where a product of few columns adds to its result."""
    product = torch.mm(rows, weight, out=space[: len(rows)] if adds else _over(total, space))
    if adds:
        _wide(total).add_(_wide(product))
    else:
        _keep(product, total)


def _silu_backward(grad: Tensor, x: Tensor, *, over: Tensor) -> Tensor:
    """The gradient of SiLU at x, written to `over` (`grad` or x)."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=over)


def _sum(rows: Tensor) -> Tensor:
    """(V, P) summed over voxels: (P,) in float64."""
    columns, dtype = rows.shape[1], accumulation_dtype(rows.dtype)
    width = gcd(len(rows), max(1, SUM_COLUMNS // columns)) * columns if rows.device.type == "cpu" else _width(rows)
    return rows.view(-1, width).sum(0, dtype=dtype).double().view(-1, columns).sum(0)


def _sum_of_products(one: Tensor, other: Tensor, *, space: Tensor) -> Tensor:
    """one times other, both (V, P), summed over voxels: (P,) in float64; products have the dtype of the space."""
    if one.dtype != space.dtype:
        one = space.copy_(one)
    return _sum(torch.mul(one, other, out=space))


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """The contraction of (V, P) and (V, Q) over voxels: (P, Q) in float64."""
    count = gcd(len(one), PARTS.get(one.device.type, PARTS["cpu"]))
    a, b = (each.unflatten(0, (count, -1)) for each in (one, other))
    exact: dict[str, Any] = {}
    if accumulation_dtype(one.dtype) != one.dtype:  # sums are not rounded
        exact["out_dtype"] = torch.float32
    return torch.bmm(a.transpose(1, 2), b, **exact).double().sum(0)


for _name in ("expand", "project", "add_scaled", "add_linear"):  # these return nothing
    torch.library.register_fake(f"memsave::{_name}", lambda *arguments: None, lib=LIBRARY)


@torch.library.register_fake("memsave::moments", lib=LIBRARY)
def _(one: Tensor, other: Tensor, *scratch: Tensor) -> Tensor:
    return one.new_empty(2, one.shape[0], one.shape[2], dtype=torch.float64)


@torch.library.register_fake("memsave::sums", lib=LIBRARY)
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float64)


@torch.library.register_fake("memsave::covariance", lib=LIBRARY)
def _(x: Tensor, mean: Tensor, *scratch: Tensor) -> Tensor:
    return x.new_empty(*mean.shape, x.shape[2], dtype=torch.float64)


@torch.library.register_fake("memsave::expand_backward", lib=LIBRARY)
def _(grad: Tensor, x: Tensor, weight: Tensor, *others: Tensor | bool) -> Tensor:
    return grad.new_empty(*weight.shape[:2], weight.shape[2] + 1, dtype=torch.float64)


@torch.library.register_fake("memsave::project_backward", lib=LIBRARY)
def _(
    grad: Tensor, filtered: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, *scratch: Tensor
) -> tuple[Tensor, Tensor]:
    found = torch.empty_like(weight, dtype=torch.float64)
    return found, scale.new_empty(2, *scale.shape, dtype=torch.float64)


def _product(places: Any, columns: int, *, times: int = 1) -> int:
    """FLOPs of `times` products at each of the elements of a shape (B, V, P) with as many columns."""
    return 2 * times * places[0] * places[1] * places[2] * columns


@register_flop_formula(torch.ops.memsave.covariance)
def _(x: Any, mean: Any, *args: Any, **kwargs: Any) -> int:
    return _product(x, x[2])


@register_flop_formula(torch.ops.memsave.expand)
def _(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _product(x, weight[1])


@register_flop_formula(torch.ops.memsave.expand_backward)
def _(grad: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return _product(grad, x[2], times=3)


@register_flop_formula(torch.ops.memsave.project)
def _(filtered: Any, scale: Any, shift: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return _product(filtered, weight[0])


@register_flop_formula(torch.ops.memsave.project_backward)
def _(grad: Any, filtered: Any, *args: Any, **kwargs: Any) -> int:
    return _product(filtered, grad[2], times=2)


@register_flop_formula(torch.ops.memsave.add_linear)
def _(total: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return _product(total, x[2])
