"""The head of a language model and its loss in one, without the logits (B, T, V).

Places that are ignored go first. A pass over blocks of the vocabulary then gives the losses and, where they are wanted,
their gradients in the hidden states and what the ghost norm of the head's weight needs; a second one, in backward, the
weight's gradient. The equations are in `logits.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import Dense, Gradient, Outer, has_values, wide
from memsave.ghost.layer import note_uses
from memsave.ghost.logits import LogitGradients, Places, scan
from memsave.ghost.tap import Tap, Tapped, clipper_of

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
) -> Tensor:
    """(B, T): the cross-entropy of each target with logits l = W h + b; zero where it is ignored.

    Exact in value and gradient; where a GhostClipper holds `weight` or `bias`, in the norms, too, and call it then
    with hidden states of the model's last forward. Under autocast products are in its dtype; all else is float32 or
    wider.

    Args:
        hidden: (B, T, d).
        weight: (V, d).
        targets: (B, T), row numbers of `weight`.
        bias: (V,).
        ignore_index: the target of what is no target.
        soft_cap: c, for the logits c tanh(l / c) in the place of l.

    Raises ValueError for shapes that do not go together and for targets that are no rows of `weight`; has no double
    backward. No outputs of the head exist: to scale them scale `hidden`; to change them otherwise take the logits.
    """
    _check(hidden, weight, targets, bias, ignore_index, soft_cap)
    places, labels = _places(targets, ignore_index)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    rows = places.select(hidden)  # (N, d)
    owned = {key: p for key, p in (("weight", weight), ("bias", bias)) if p is not None and p.requires_grad}
    clipper = next((found for found in map(clipper_of, owned.values()) if found is not None), None)
    call = None if clipper is None else clipper.call_of(NAME, after=True)
    if clipper is None or call is None:
        losses, *_ = _Head.apply(rows, weight, bias, labels, places, soft_cap, False, 0)
        return places.spread(losses)
    if len(targets) != call.batch_size:
        raise ValueError(
            f"{NAME} got targets for {len(targets)} examples, but the model saw a batch of {call.batch_size}; keep "
            f"the batch in dimension 0"
        )
    note_uses(call, NAME, [p for p in owned.values() if isinstance(p, nn.Parameter)])
    fixed = None if bias is None else bias.detach()
    products = "weight" in owned and not (call.batch_size == 1 and clipper.passes_of(call) == 1)
    keep = min(len(weight), call.room // max(1, places.count * wide(rows.detach()[:0]).element_size()))
    losses, *found = _Head.apply(rows, weight.detach(), fixed, labels, places, soft_cap, products, keep)
    left = _left(rows.detach(), weight.detach(), fixed, labels, places, soft_cap, found)
    call.room -= 0 if left.kept is None else left.kept.numel() * left.kept.element_size()
    saved, restored = _packed(left)

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        return _per_example(restored(saved), grad, wanted=tuple(owned))

    tapped = Tapped(NAME, tuple(owned), per_example)
    return Tap.apply(places.spread(losses), call.probe, tapped, call, len(saved), *saved, *owned.values())


class _Head(torch.autograd.Function):
    """(losses (N,), then what `left` found out) of rows (N, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        places: Places,
        soft_cap: float | None,
        products: bool,
        keep: int,
    ) -> tuple[Tensor | None, ...]:
        nothing = wide(hidden.new_empty(0))
        left = _left(hidden, weight, bias, labels, places, soft_cap, (nothing, nothing, nothing))
        found = scan(left, pull=ctx.needs_input_grad[0], products=products, keep=keep)
        left, again = found.left, any(ctx.needs_input_grad[1:3])
        saved, ctx.restored = _packed(left) if again else ((), None)
        ctx.save_for_backward(found.pulled, *saved)
        ctx.dtype = hidden.dtype
        outputs = (left.top, left.scale, left.others, left.products, left.kept)
        ctx.set_materialize_grads(False)  # zeros as large as the logits that are kept
        ctx.mark_non_differentiable(*(each for each in outputs if each is not None))
        return found.losses, *outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{NAME} has no double backward; take the logits, and a cross-entropy of them")
        pulled, *saved = ctx.saved_tensors
        grad, of_weight, of_bias = wide(grad), None, None
        of_hidden = None if pulled is None else (grad[:, None] * pulled).to(ctx.dtype)
        if ctx.restored is not None:
            left = ctx.restored(saved)
            right = wide(left.hidden) * grad[:, None]
            if ctx.needs_input_grad[1]:
                of_weight = torch.empty_like(left.weight, dtype=right.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = torch.empty_like(left.bias, dtype=right.dtype)
            for columns, q in left.blocks():
                if of_weight is not None:
                    torch.mm(q.T, right, out=of_weight[columns])
                if of_bias is not None:
                    torch.mv(q.T, grad, out=of_bias[columns])
            of_weight = None if of_weight is None else of_weight.to(left.weight.dtype)
            of_bias = None if of_bias is None else of_bias.to(left.bias.dtype)
        return of_hidden, of_weight, of_bias, None, None, None, None, None


def _per_example(left: LogitGradients, grad: Tensor, *, wanted: tuple[str, ...]) -> dict[str, Gradient]:
    """From the gradient (B, T) of the losses."""
    grad, found = wide(left.places.select(grad))[:, None], dict[str, Gradient]()  # (N, 1)
    if "weight" in wanted:
        right = left.places.together(wide(left.hidden) * grad)  # (B, width, d)
        found["weight"] = Outer(left, right, rows=len(left.weight))
    if "bias" in wanted:
        sums = [left.places.together(q * grad).sum(1) for _, q in left.blocks()]
        found["bias"] = Dense(torch.cat(sums, 1))
    return found


def _left(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    places: Places,
    soft_cap: float | None,
    found: Sequence[Any],
) -> LogitGradients:
    """`found`: top, scale and others; products and kept, where they are."""
    top, scale, others, products, kept = (*found, None, None)[:5]
    return LogitGradients(hidden, weight, bias, labels, top, scale, others, places, products, kept, soft_cap)


def _packed(left: LogitGradients) -> tuple[tuple[Tensor, ...], Any]:
    """Its tensors, and what puts them together again: a function that holds none."""
    mine = {each.name: getattr(left, each.name) for each in fields(left)}
    places, soft_cap = mine.pop("places"), mine.pop("soft_cap")
    mine |= {"index": places.index, "spots": places.spots}
    names = [name for name, value in mine.items() if value is not None]
    empty, bare = dict.fromkeys(mine), replace(places, index=None, spots=None)

    def restored(tensors: Any) -> LogitGradients:
        values = {**empty, **dict(zip(names, tensors, strict=True))}
        where = replace(bare, index=values.pop("index"), spots=values.pop("spots"))
        return LogitGradients(places=where, soft_cap=soft_cap, **values)

    return tuple(mine[name] for name in names), restored


def _places(targets: Tensor, ignore_index: int) -> tuple[Places, Tensor]:
    """Where targets are, and the (N,) of them; fake tensors, which do not say, keep all places."""
    batch, length = targets.shape
    wanted = targets != ignore_index
    everywhere = Places(batch, length, length, None, None)
    if not has_values(targets):
        return everywhere, targets.masked_fill(~wanted, -1).flatten()
    counts = wanted.sum(1).tolist()
    if min(counts, default=0) == length:
        return everywhere, targets.flatten()
    width, wanted_flat = max(counts, default=0), wanted.flatten()
    index = wanted_flat.nonzero()[:, 0]
    first = torch.arange(batch, device=targets.device)[:, None] * width
    spots = (first + wanted.cumsum(1) - 1).flatten()[index]
    all_full = len(index) == batch * width
    return Places(batch, length, width, index, None if all_full else spots), targets.flatten()[index]


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    soft_cap: float | None,
) -> None:
    if (
        hidden.dim() != 3
        or weight.dim() != 2
        or hidden.shape[:2] != targets.shape
        or hidden.shape[2] != weight.shape[1]
    ):
        raise ValueError(
            f"{NAME} got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)}; give (B, T, d), (V, d) and (B, T)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME} got a bias {tuple(bias.shape)} for {len(weight)} rows; give ({len(weight)},)")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{NAME} got soft_cap={soft_cap}; give a positive number, or None for no cap")
    if has_values(targets) and targets.numel():
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))
        if wrong.any():
            raise ValueError(
                f"{NAME} got the target {targets[wrong][0].item()}, but the weight has {len(weight)} rows; give "
                f"numbers below that, or ignore_index={ignore_index}"
            )
