"""The gradients of token losses with respect to their logits, one block of the vocabulary at a time.

    l_t = W h_t + b        loss_t = log sum_j exp(l_tj) - l_ty, y the target of t        q_t = softmax(l_t) - onehot(y)

With a soft cap c, the loss is that of l'_t = c tanh(l_t / c), and each entry of q_t has the slope of its own logit:

    q_t = (softmax(l'_t) - onehot(y)) sech^2(l_t / c)

`scan` goes over the vocabulary once with a running normaliser (Milakov and Gimelshein 2018): the accumulated sums are
rescaled whenever the largest logit changes. The target is left out of all sums and is added at the end, as
q_ty = -sum_{j != y} softmax(l_t)_j, because 1 - softmax(l_t)_y suffers catastrophic cancellation for a confident model.

What `scan` has exponentiated may be stored block by block, with the largest logit so far as its unit. The gradients of
such a block are these exponentials times one number per token, so that neither the product with W nor exp is repeated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memsave.ghost.gradient_products import TRIANGLE
from memsave.ghost.gradients import LazyOutputGrads, upcast

BLOCK = {"cpu": 2**22, "cuda": 2**25}  # logits at a time: 16 MiB in float32, or 128 MiB, for few starts of kernels
KEPT = 2**23  # logits that are stored without a memory budget, all or none: at most 32 MiB in float32
MIN_COLUMNS = 512  # of a block, which exceeds BLOCK for very many tokens, but is smaller than their hidden states


@dataclass(frozen=True)
class TargetPositions:
    """Which N of the (R, T) positions have a target, and their slots in (B, width) after the others are dropped."""

    rows: int
    """R; B unless an example has several rows."""
    length: int
    """T."""
    batch: int
    """B."""
    width: int
    """The largest number of targets of an example."""
    index: Tensor | None
    """(N,) of R T; None if all positions have a target."""
    slots: Tensor | None
    """(N,) of B width; None if N = B width, in this order."""

    @property
    def count(self) -> int:
        """N."""
        return self.rows * self.length if self.index is None else len(self.index)

    def select(self, values: Tensor) -> Tensor:
        """(R, T, ...) to (N, ...)."""
        flat = values.reshape(self.rows * self.length, *values.shape[2:])
        return flat if self.index is None else flat.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """(N,) to (R, T), zero elsewhere."""
        if self.index is not None:
            values = values.new_zeros(self.rows * self.length).index_copy(0, self.index, values)
        return values.view(self.rows, self.length)

    def pad(self, values: Tensor) -> Tensor:
        """(N, ...) to (B, width, ...), padded with zeros for examples with fewer targets."""
        if self.slots is not None:
            padded = values.new_zeros(self.batch * self.width, *values.shape[1:])
            values = padded.index_copy_(0, self.slots, values)
        return values.view(self.batch, self.width, *values.shape[1:])

    def unpad(self, values: Tensor) -> Tensor:
        """(B, width, ...) to (N, ...)."""
        values = values.flatten(0, 1)
        return values if self.slots is None else values[self.slots]


@dataclass(frozen=True)
class LogitGradients:
    """The gradients q_t, (B, width, V), as the lazy output gradients of a `FactoredGrad`; see `LazyOutputGrads`."""

    hidden: Tensor
    """(N, d), in the dtype of the matrix products."""
    weight: Tensor
    """(V, d)."""
    bias: Tensor | None
    labels: Tensor
    """(N,); negative for no target, whose q_t is zero."""
    max_logits: Tensor
    """(N,): the largest logit, after the soft cap."""
    inverse_sums: Tensor
    """(N,): 1 / sum_j exp(l_tj - max_logit_t)."""
    minus_target_grads: Tensor
    """(N,): -q_ty, which is 1 - softmax(l_t)_y without a soft cap."""
    positions: TargetPositions
    gram: Tensor | None = None
    """(B, width, width): <q_t, q_s>."""
    stored: Tensor | None = None
    """(N K,): exp(l_tj - m_t) times the slope of l_tj, zero for targets, of the first K columns; (N, columns) for each
    block in its turn. m_t is the largest logit up to this block."""
    stored_max: Tensor | None = None
    """(blocks, N): m_t of each stored block."""
    soft_cap: float | None = None
    """c."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, width, V)."""
        return self.positions.batch, self.positions.width, len(self.weight)

    def blocks(self, *, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(columns, q (N, columns)) over the vocabulary; `rows`: the number of tokens that sets the size of a block."""
        for columns, exponentials, factor, fresh in self._exponentials(len(self.labels) if rows is None else rows):
            q = exponentials.mul_(factor[:, None]) if fresh else exponentials * factor[:, None]
            _replace_at_labels(q, self.labels, columns, -self.minus_target_grads)
            yield columns, q

    def _exponentials(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
        """(columns, e (N, columns), f (N,), whether e may be overwritten), with q_tj = f_t e_tj except at targets.

        Where e is stored, it is zero at targets.
        """
        known = {} if rows != len(self.labels) else self._stored_blocks()
        for columns in vocabulary_blocks(rows, self.weight):
            if columns.start in known:
                exponentials, unit = known[columns.start]
                yield columns, exponentials, (unit - self.max_logits).exp_().mul_(self.inverse_sums), False
                continue
            logits = logits_of(self.hidden, self.weight, self.bias, columns)
            slopes = None if self.soft_cap is None else cap_(logits, self.soft_cap)
            exponentials = logits.sub_(self.max_logits[:, None]).exp_()
            yield columns, exponentials if slopes is None else exponentials.mul_(slopes), self.inverse_sums, True

    def _stored_blocks(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(exponentials (N, columns), m (N,)) by the first column of the stored blocks."""
        if self.stored is None or self.stored_max is None:
            return {}
        blocks = zip(vocabulary_blocks(len(self.labels), self.weight), self.stored_max)
        return {columns.start: (block_of(self.stored, columns, len(self.labels)), unit) for columns, unit in blocks}

    def gather(self, index: Tensor) -> Tensor:
        """The entries of q_bt at index (B, S): (B, width, S), zero for a negative index."""
        rows = index.clamp(min=0)
        weight = self.weight[rows].to(self.hidden.dtype)  # (B, S, d)
        logits = upcast(self.positions.pad(self.hidden) @ weight.transpose(1, 2))
        if self.bias is not None:
            logits = logits + upcast(self.bias)[rows][:, None]
        numbers = (self.max_logits, self.inverse_sums, self.minus_target_grads)
        max_logits, inverse_sums, minus_target_grads = (self.positions.pad(each)[..., None] for each in numbers)
        labels = self.positions.pad(self.labels + 1)[..., None] - 1  # -1 for padding
        slopes = None if self.soft_cap is None else cap_(logits, self.soft_cap)
        softmax = (logits - max_logits).exp() * inverse_sums
        q = softmax if slopes is None else softmax * slopes
        q = torch.where(labels == index[:, None], -minus_target_grads, q)
        return torch.where((index >= 0)[:, None] & (labels >= 0), q, 0)

    def pairwise_products(self, other: Tensor | LazyOutputGrads) -> Tensor:
        """<q_bt, u_bs>, (B, width, S), with vectors (B, S, V) or the gradients of another head."""
        if isinstance(other, Tensor):
            pairs = ((q, other[..., columns]) for columns, q in self.blocks())
        else:
            assert isinstance(other, LogitGradients)
            rows = max(len(self.labels), len(other.labels))
            both = zip(self.blocks(rows=rows), other.blocks(rows=rows), strict=True)
            pairs = ((q, other.positions.pad(u)) for (_, q), (_, u) in both)
        total: Tensor | None = None
        for q, u in pairs:
            product = self.positions.pad(q) @ upcast(u).transpose(1, 2)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def per_sample(self, activations: Tensor) -> Tensor:
        """sum_t q_bt (x) a_bt, (B, V, d), for activations (B, width, d)."""
        total = activations.new_empty(len(activations), len(self.weight), activations.shape[-1])
        for columns, q in self.blocks():
            torch.bmm(self.positions.pad(q).transpose(1, 2), activations, out=total[:, columns])
        return total

    def matmul(self, values: Tensor) -> Tensor:
        """q_b @ values, (B, width, d), for values (B, V, d)."""
        total = values.new_zeros(*self.shape[:2], values.shape[-1])
        for columns, q in self.blocks():
            total.baddbmm_(self.positions.pad(q), values[:, columns])
        return total

    def add_sum(self, total: Tensor, activations: Tensor) -> None:
        """Add sum_bt q_bt (x) a_bt to `total` (V, d), for activations (B, width, d)."""
        self.add_token_sum(total, self.positions.unpad(activations))

    def add_token_sum(self, total: Tensor, values: Tensor) -> None:
        """Add sum_t q_t (x) v_t to `total` (V, d), for values (N, d): these are scaled, because q is larger."""
        of_targets = values * -self.minus_target_grads[:, None]
        for columns, exponentials, factor, fresh in self._exponentials(len(self.labels)):
            if fresh:
                _replace_at_labels(exponentials, self.labels, columns, torch.zeros_like(factor))
            total[columns].addmm_(exponentials.T, values * factor[:, None])
        total.index_add_(0, self.labels.clamp(min=0), of_targets)  # without a target, minus_target_grads is zero

    def masked(self, mask: Tensor) -> "LogitGradients":
        """A copy that is zero for the examples where `mask` (B,) is False."""
        tokens = self.positions.unpad(mask[:, None].expand(-1, self.positions.width))
        return replace(
            self,
            hidden=torch.where(tokens[:, None], self.hidden, 0),
            max_logits=torch.where(tokens, self.max_logits, 0),
            inverse_sums=torch.where(tokens, self.inverse_sums, 0),
            minus_target_grads=torch.where(tokens, self.minus_target_grads, 0),
            gram=None,
            stored=None,
            stored_max=None,
        )


@dataclass
class ScanResult:
    """The results of one pass over the vocabulary."""

    losses: Tensor
    """(N,); zero for no target."""
    logit_grads: LogitGradients
    hidden_grads: Tensor | None
    """(N, d): W' q_t."""


def scan(logit_grads: LogitGradients, *, with_hidden_grads: bool, with_gram: bool, store: int) -> ScanResult:
    """Go over the vocabulary once; returns `logit_grads` with the fields that it does not have yet.

    `store`: at most how many of the first logits of each token are stored.
    """
    hidden, weight, labels = logit_grads.hidden, logit_grads.weight, logit_grads.labels
    positions, soft_cap = logit_grads.positions, logit_grads.soft_cap
    count, options = len(labels), dict[str, Any](dtype=logit_grads.max_logits.dtype, device=hidden.device)
    max_logits = torch.full((count,), torch.finfo(options["dtype"]).min, **options)  # of all but the target
    total, target = torch.zeros(count, **options), torch.zeros(count, **options)
    target_slope = None if soft_cap is None else torch.zeros(count, **options)
    hidden_grads = torch.zeros(hidden.shape, **options) if with_hidden_grads else None
    gram = torch.zeros(positions.batch, positions.width, positions.width, **options) if with_gram else None
    stored_blocks = [each for each in vocabulary_blocks(count, weight) if each.stop <= store]
    stored, units = None, []
    if stored_blocks:
        stored = torch.empty(count * stored_blocks[-1].stop, **options)
    for columns in vocabulary_blocks(count, weight):
        out = None if stored is None or columns.stop > store else block_of(stored, columns, count)
        logits = logits_of(hidden, weight, logit_grads.bias, columns, out=out)
        slopes = None if soft_cap is None else cap_(logits, soft_cap)
        if target_slope is not None and slopes is not None:
            target_slope = _replace_at_labels(slopes, labels, columns, target_slope, otherwise=target_slope)
        target = _replace_at_labels(logits, labels, columns, torch.full_like(target, -torch.inf), otherwise=target)
        before, max_logits = max_logits, torch.maximum(max_logits, logits.amax(1))
        decay = (before - max_logits).exp_()
        exponentials = logits.sub_(max_logits[:, None]).exp_()
        total = total.mul_(decay).add_(exponentials.sum(1))
        if slopes is not None:
            exponentials.mul_(slopes)
        if out is not None:
            units.append(max_logits)
        if hidden_grads is not None:
            hidden_grads.mul_(decay[:, None])
            _add_product(hidden_grads, exponentials.to(hidden.dtype), weight[columns].to(hidden.dtype))
        if gram is not None:
            padded = positions.pad(decay)
            gram.mul_(padded[:, :, None]).mul_(padded[:, None])
            _add_gram(gram, positions.pad(exponentials))
    logit_grads = replace(logit_grads, stored=stored, stored_max=torch.stack(units) if units else None)
    return _with_targets(logit_grads, (max_logits, total, target, target_slope), hidden_grads, gram)


def _with_targets(
    logit_grads: LogitGradients,
    sums: tuple[Tensor, Tensor, Tensor, Tensor | None],
    hidden_grads: Tensor | None,
    gram: Tensor | None,
) -> ScanResult:
    """Add the target's logit, and turn sums over the others, in units of exp(max_logit), into those of q.

    `sums`: the others' largest logit and sum; the target's logit and, under a soft cap, its slope.
    """
    max_of_others, total, target, target_slope = sums
    has_target = logit_grads.labels >= 0
    max_logits = torch.maximum(max_of_others, target)
    shrink = (max_of_others - max_logits).exp()
    rest = total * shrink
    whole = rest + (target - max_logits).exp()
    losses = torch.where(target >= max_of_others, rest.log1p(), (max_logits - target) + whole.log())
    losses, inverse_sums, others = (torch.where(has_target, each, 0) for each in (losses, 1 / whole, rest / whole))
    if target_slope is not None:
        others = others * target_slope
    logit_grads = replace(logit_grads, max_logits=max_logits, inverse_sums=inverse_sums, minus_target_grads=others)
    if hidden_grads is not None:
        hidden_grads.mul_((shrink * inverse_sums)[:, None])
        hidden_grads.sub_(upcast(logit_grads.weight[logit_grads.labels.clamp(min=0)]).mul_(others[:, None]))
    if gram is not None:
        logit_grads = replace(logit_grads, gram=_gram_with_targets(logit_grads, gram, shrink * inverse_sums))
    return ScanResult(losses, logit_grads, hidden_grads)


def _gram_with_targets(logit_grads: LogitGradients, gram: Tensor, factor: Tensor) -> Tensor:
    """<q_t, q_s> from the products of all entries but the targets:

    <q_t, q_s> = <q'_t, q'_s> - o_s q'_t[y_s] - o_t q'_s[y_t] + o_t o_s [y_t = y_s],  with o_t = -q_ty.
    """
    positions = logit_grads.positions
    if positions.width > TRIANGLE:
        lower = gram.tril_()
        gram = lower + lower.tril(-1).transpose(1, 2)
    factor, others = positions.pad(factor), positions.pad(logit_grads.minus_target_grads)
    gram.mul_(factor[:, :, None]).mul_(factor[:, None])
    labels = positions.pad(logit_grads.labels + 1) - 1
    at_targets = logit_grads.gather(labels)  # -o_t where y_t = y_s
    crossed = at_targets * others[:, None]
    same = (labels[:, :, None] == labels[:, None]) & (labels >= 0)[:, None]
    gram.sub_(crossed).sub_(crossed.transpose(1, 2))
    return gram.sub_(same * others[:, :, None] * others[:, None])


def vocabulary_blocks(rows: int, weight: Tensor) -> Iterator[slice]:
    """Blocks of the vocabulary of weight (V, d): at most BLOCK logits of this many tokens, but MIN_COLUMNS columns."""
    vocabulary, most = weight.shape[0], BLOCK.get(weight.device.type, BLOCK["cpu"])
    size = max(MIN_COLUMNS, most // max(1, rows))
    return (slice(first, min(first + size, vocabulary)) for first in range(0, vocabulary, size))


def block_of(stored: Tensor, columns: slice, rows: int) -> Tensor:
    """The block (rows, columns) of what is stored block by block."""
    return stored[rows * columns.start : rows * columns.stop].view(rows, columns.stop - columns.start)


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, *, out: Tensor | None = None
) -> Tensor:
    """(N, columns), float32 or wider, in `out` if given; the matrix product is in the dtype of `hidden`."""
    weight = weight[columns].to(hidden.dtype)
    if out is None:
        logits = upcast(hidden @ weight.T)
    else:
        logits = torch.mm(hidden, weight.T, out=out) if out.dtype == hidden.dtype else out.copy_(hidden @ weight.T)
    return logits if bias is None else logits.add_(upcast(bias[columns]))


def cap_(logits: Tensor, cap: float) -> Tensor:
    """Overwrite l with cap tanh(l / cap); returns its slope sech^2(l / cap).

    1 - tanh^2 would suffer catastrophic cancellation.
    """
    slopes = logits.div_(cap).cosh().reciprocal_().square_()
    logits.tanh_().mul_(cap)
    return slopes


def _replace_at_labels(
    values: Tensor, labels: Tensor, columns: slice, at_labels: Tensor, *, otherwise: Tensor | None = None
) -> Tensor:
    """Overwrite values (N, columns) at the labels in these columns; returns the old values there, else `otherwise`."""
    inside = (labels >= columns.start) & (labels < columns.stop)
    local = (labels - columns.start).clamp(0, values.shape[1] - 1)[:, None]
    found = values.gather(1, local)[:, 0]
    values.scatter_(1, local, torch.where(inside, at_labels, found)[:, None])
    return found if otherwise is None else torch.where(inside, found, otherwise)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    if one.dtype == total.dtype:
        total.addmm_(one, other)
    else:
        total.add_(one @ other)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add <u_t, u_s>, (B, T, T), in tiles on and below the diagonal."""
    for first in range(0, rows.shape[1], TRIANGLE):
        last = first + TRIANGLE
        total[:, first:last, :last].baddbmm_(rows[:, first:last], rows[:, :last].transpose(1, 2))
