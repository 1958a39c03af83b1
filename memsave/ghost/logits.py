"""The gradients of token losses in their logits, a block of the vocabulary at a time.

    l_t = W h_t + b        loss_t = log sum_j exp(l_tj) - l_ty, y the target of t        q_t = softmax(l_t) - onehot(y)

With a soft cap c, the loss is that of l'_t = c tanh(l_t / c), and each entry of q_t has the slope of its own logit:

    q_t = (softmax(l'_t) - onehot(y)) sech^2(l_t / c)

`scan` goes over the vocabulary once, with the normaliser of what it has seen so far (Milakov and Gimelshein 2018): what
was accumulated is rescaled whenever the largest logit changes. The target is left out of all of its sums and comes in
at their end, as q_ty = -sum_{j != y} softmax(l_t)_j: where the model is sure, 1 - softmax(l_t)_y would have no digits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memsave.ghost.gradients import TRIANGLE, Rows, wide

BLOCK = 2**22  # logits at a time: 16 MiB in float32
LEAST = 512  # columns of a block: of very many rows it is larger than BLOCK, and still smaller than their hidden states


@dataclass(frozen=True)
class Places:
    """Which N of (B, T) places have a target, and where each stands when those of an example are moved together."""

    batch: int
    length: int
    """T."""
    width: int
    """The largest number of targets of an example."""
    index: Tensor | None
    """(N,) of B T; None where all places are taken."""
    spots: Tensor | None
    """(N,) of B width; None where N = B width."""

    @property
    def count(self) -> int:
        """N."""
        return self.batch * self.length if self.index is None else len(self.index)

    def select(self, values: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...)."""
        flat = values.reshape(self.batch * self.length, *values.shape[2:])
        return flat if self.index is None else flat.index_select(0, self.index)

    def spread(self, values: Tensor) -> Tensor:
        """(N,) to (B, T), zero elsewhere."""
        if self.index is not None:
            values = values.new_zeros(self.batch * self.length).index_copy(0, self.index, values)
        return values.view(self.batch, self.length)

    def together(self, values: Tensor) -> Tensor:
        """(N, ...) to (B, width, ...), zero where an example has fewer targets."""
        if self.spots is not None:
            padded = values.new_zeros(self.batch * self.width, *values.shape[1:])
            values = padded.index_copy_(0, self.spots, values)
        return values.view(self.batch, self.width, *values.shape[1:])

    def apart(self, values: Tensor) -> Tensor:
        """(B, width, ...) to (N, ...)."""
        values = values.flatten(0, 1)
        return values if self.spots is None else values[self.spots]


@dataclass(frozen=True)
class LogitGradients:
    """The q_t of an example's targets: rows u_bt of an `Outer`, (B, width, V), made again where they are asked for."""

    hidden: Tensor
    """(N, d), in the dtype of the products."""
    weight: Tensor
    """(V, d)."""
    bias: Tensor | None
    labels: Tensor
    """(N,); negative for no target, whose row is zero."""
    top: Tensor
    """(N,): the largest logit, after the soft cap."""
    scale: Tensor
    """(N,): 1 / sum_j exp(l_tj - top_t)."""
    others: Tensor
    """(N,): -q_ty, which is 1 - softmax(l_t)_y without a soft cap."""
    places: Places
    products: Tensor | None = None
    """(B, width, width): <q_t, q_s>."""
    kept: Tensor | None = None
    """(N, K): the first K logits of each before the soft cap, where there is room for them."""
    soft_cap: float | None = None
    """c."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, width, V)."""
        return self.places.batch, self.places.width, len(self.weight)

    def blocks(self, *, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(columns, q in them (N, columns)) over the vocabulary, in blocks as of so many rows."""
        for columns in parts(len(self.labels) if rows is None else rows, len(self.weight)):
            logits, slopes = self._below_top(columns)
            q = logits.exp_().mul_(self.scale[:, None])
            if slopes is not None:
                q.mul_(slopes)
            _put(q, self.labels, columns, -self.others)
            yield columns, q

    def _below_top(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(logits less the largest, their slopes under a soft cap), (N, columns) each, to be overwritten."""
        held = self.kept[:, columns] if self.kept is not None and columns.stop <= self.kept.shape[1] else None
        if self.soft_cap is None and held is not None:
            return held - self.top[:, None], None
        logits = logits_of(self.hidden, self.weight, self.bias, columns) if held is None else held.clone()
        slopes = None if self.soft_cap is None else cap_(logits, self.soft_cap)
        return logits.sub_(self.top[:, None]), slopes

    def columns(self, rows: Tensor) -> Tensor:
        """q_bt at the row numbers (B, S): (B, width, S), zero for a negative number."""
        index = rows.clamp(min=0)
        weight = self.weight[index].to(self.hidden.dtype)  # (B, S, d)
        logits = wide(self.places.together(self.hidden) @ weight.transpose(1, 2))
        if self.bias is not None:
            logits = logits + wide(self.bias)[index][:, None]
        top, scale, others = (self.places.together(each)[..., None] for each in (self.top, self.scale, self.others))
        labels = self.places.together(self.labels + 1)[..., None] - 1  # -1 where there is none
        slopes = None if self.soft_cap is None else cap_(logits, self.soft_cap)
        shares = (logits - top).exp() * scale
        q = torch.where(labels == rows[:, None], -others, shares if slopes is None else shares * slopes)
        return torch.where((rows >= 0)[:, None] & (labels >= 0), q, 0)

    def against(self, other: Tensor | Rows) -> Tensor:
        """<q_bt, u_bs>, (B, width, S), with rows (B, S, V) or those of another head."""
        if isinstance(other, Tensor):
            pairs = ((q, other[..., columns]) for columns, q in self.blocks())
        else:
            assert isinstance(other, LogitGradients)
            rows = max(len(self.labels), len(other.labels))
            both = zip(self.blocks(rows=rows), other.blocks(rows=rows), strict=True)
            pairs = ((q, other.places.together(u)) for (_, q), (_, u) in both)
        total: Tensor | None = None
        for q, u in pairs:
            product = self.places.together(q) @ wide(u).transpose(1, 2)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def formed(self, right: Tensor) -> Tensor:
        """sum_t q_bt (x) v_bt, (B, V, d), for v (B, width, d)."""
        total = right.new_empty(len(right), len(self.weight), right.shape[-1])
        for columns, q in self.blocks():
            torch.bmm(self.places.together(q).transpose(1, 2), right, out=total[:, columns])
        return total

    def pull(self, values: Tensor) -> Tensor:
        """q_bt' D_b, (B, width, d), for D (B, V, d)."""
        total = values.new_zeros(*self.shape[:2], values.shape[-1])
        for columns, q in self.blocks():
            total.baddbmm_(self.places.together(q), values[:, columns])
        return total

    def add_sum(self, total: Tensor, right: Tensor) -> None:
        """Add sum_bt q_bt (x) v_bt to a total (V, d), for v (B, width, d)."""
        right = self.places.apart(right)
        for columns, q in self.blocks():
            total[columns].addmm_(q.T, right)

    def keep(self, kept: Tensor) -> "LogitGradients":
        """With rows of zeros for the examples that `kept` (B,) does not name."""
        rows = self.places.apart(kept[:, None].expand(-1, self.places.width))
        top, scale, others = (torch.where(rows, each, 0) for each in (self.top, self.scale, self.others))
        hidden = torch.where(rows[:, None], self.hidden, 0)
        return replace(self, hidden=hidden, top=top, scale=scale, others=others, products=None, kept=None)


@dataclass
class Scan:
    """What one pass over the vocabulary gives."""

    losses: Tensor
    """(N,); zero where there is no target."""
    left: LogitGradients
    pulled: Tensor | None
    """(N, d): W' q_t."""


def scan(left: LogitGradients, *, pull: bool, products: bool, keep: int) -> Scan:
    """Fill in what `left` does not have yet: top, scale, others, and what is wanted: products, the first logits."""
    hidden, weight, labels, places = left.hidden, left.weight, left.labels, left.places
    count, numbers = len(labels), dict[str, Any](dtype=left.top.dtype, device=hidden.device)
    most = torch.full((count,), torch.finfo(left.top.dtype).min, **numbers)  # but for the target
    total, target = torch.zeros(count, **numbers), torch.zeros(count, **numbers)
    slope = None if left.soft_cap is None else torch.zeros(count, **numbers)  # of the target
    pulled = torch.zeros(hidden.shape, **numbers) if pull else None
    gram = torch.zeros(places.batch, places.width, places.width, **numbers) if products else None
    keep = max((each.stop for each in parts(count, len(weight)) if each.stop <= keep), default=0)
    kept = torch.empty(count, keep, **numbers) if keep else None
    for columns in parts(count, len(weight)):
        logits = logits_of(hidden, weight, left.bias, columns)
        if kept is not None and columns.stop <= keep:
            kept[:, columns] = logits
        slopes = None if left.soft_cap is None else cap_(logits, left.soft_cap)
        if slope is not None and slopes is not None:
            slope = _put(slopes, labels, columns, slope, otherwise=slope)
        target = _put(logits, labels, columns, torch.full_like(target, -torch.inf), otherwise=target)
        before, most = most, torch.maximum(most, logits.amax(1))
        decay = (before - most).exp_()
        shares = logits.sub_(most[:, None]).exp_()
        total = total.mul_(decay).add_(shares.sum(1))
        if slopes is not None:
            shares.mul_(slopes)
        if pulled is not None:
            pulled.mul_(decay[:, None])
            _add_product(pulled, shares.to(hidden.dtype), weight[columns].to(hidden.dtype))
        if gram is not None:
            together = places.together(decay)
            gram.mul_(together[:, :, None]).mul_(together[:, None])
            _add_gram(gram, places.together(shares))
    return _finished(left, (most, total, target, slope), pulled, gram, kept)


def _finished(
    left: LogitGradients,
    found: tuple[Tensor, Tensor, Tensor, Tensor | None],
    pulled: Tensor | None,
    gram: Tensor | None,
    kept: Tensor | None,
) -> Scan:
    """The target's logit comes in; sums over the others, in units of exp(most), become those of q.

    `found`: the others' largest logit and sum; the target's logit and, under a soft cap, its slope.
    """
    most, total, target, slope = found
    wanted = left.labels >= 0
    top = torch.maximum(most, target)
    shrink = (most - top).exp()
    rest = total * shrink
    whole = rest + (target - top).exp()
    losses = torch.where(target >= most, rest.log1p(), (top - target) + whole.log())
    losses, scale, others = (torch.where(wanted, each, 0) for each in (losses, 1 / whole, rest / whole))
    if slope is not None:
        others = others * slope
    left = replace(left, top=top, scale=scale, others=others, kept=kept)
    if pulled is not None:
        pulled.mul_((shrink * scale)[:, None])
        pulled.sub_(wide(left.weight[left.labels.clamp(min=0)]).mul_(others[:, None]))
    if gram is not None:
        left = replace(left, products=_with_targets(left, gram, shrink * scale))
    return Scan(losses, left, pulled)


def _with_targets(left: LogitGradients, gram: Tensor, factor: Tensor) -> Tensor:
    """<q_t, q_s> from the products of all but their targets:

    <q_t, q_s> = <q'_t, q'_s> - o_s q'_t[y_s] - o_t q'_s[y_t] + o_t o_s [y_t = y_s],  with o the others' share.
    """
    if left.places.width > TRIANGLE:
        lower = gram.tril_()
        gram = lower + lower.tril(-1).transpose(1, 2)
    factor, others = left.places.together(factor), left.places.together(left.others)
    gram.mul_(factor[:, :, None]).mul_(factor[:, None])
    labels = left.places.together(left.labels + 1) - 1
    at_targets = left.columns(labels)  # -o_t where y_t = y_s
    crossed = at_targets * others[:, None]
    same = (labels[:, :, None] == labels[:, None]) & (labels >= 0)[:, None]
    gram.sub_(crossed).sub_(crossed.transpose(1, 2))
    return gram.sub_(same * others[:, :, None] * others[:, None])


def parts(rows: int, vocabulary: int) -> Iterator[slice]:
    """Parts of the vocabulary of which so many rows have at most BLOCK logits, and no fewer than LEAST columns."""
    size = max(LEAST, BLOCK // max(1, rows))
    return (slice(first, min(first + size, vocabulary)) for first in range(0, vocabulary, size))


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """(N, columns), float32 or wider; the product is in the dtype of `hidden`."""
    logits = wide(hidden @ weight[columns].to(hidden.dtype).T)
    return logits if bias is None else logits.add_(wide(bias[columns]))


def cap_(logits: Tensor, cap: float) -> Tensor:
    """Overwrite l with cap tanh(l / cap); returns its slope sech^2(l / cap), which 1 - tanh^2 has no digits of."""
    slopes = logits.div_(cap).cosh().reciprocal_().square_()
    logits.tanh_().mul_(cap)
    return slopes


def _put(
    values: Tensor, labels: Tensor, columns: slice, at_labels: Tensor, *, otherwise: Tensor | None = None
) -> Tensor:
    """Overwrite (N, columns) at the labels that are among them; returns what stood there, elsewhere `otherwise`."""
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
    """Add <u_t, u_s>, (B, T, T): its tiles on and below the diagonal."""
    for first in range(0, rows.shape[1], TRIANGLE):
        last = first + TRIANGLE
        total[:, first:last, :last].baddbmm_(rows[:, first:last], rows[:, :last].transpose(1, 2))
