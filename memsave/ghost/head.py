"""The head of a language model and its loss in one function, without the logits (B, T, V).

Positions that are ignored are dropped first. One pass over blocks of the vocabulary then gives the losses and, if
needed, their gradients with respect to the hidden states and what the ghost norm of the head's weight needs. A second
pass, in the backward, gives the weight's gradient. The equations are in `logits.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.gradients import FactoredGrad, Gradient, PerSampleGrad, has_values, upcast
from memsave.ghost.late_checks import is_slow_to_read
from memsave.ghost.logits import KEPT, LogitGradients, TargetPositions, scan, vocabulary_blocks
from memsave.ghost.norm_hook import HookSpec, apply_norm_hook
from memsave.ghost.owners import clipper_of
from memsave.ghost.rows import RowSplit
from memsave.processes import is_sharded

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
    """(B, T): the cross-entropy of each target with logits l = W h + b; zero for ignored targets.

    The values and gradients are exact. If a GhostClipper clips `weight` or `bias`, the norms are exact, too; the hidden
    states must then come from the model's last forward. Under autocast, matrix products are in its dtype; all else is
    float32 or wider.

    Args:
        hidden: (B, T, d).
        weight: (V, d).
        targets: (B, T), row numbers of `weight`.
        bias: (V,).
        ignore_index: the value in `targets` that marks a position without a target.
        soft_cap: c, for logits c tanh(l / c) instead of l.

    Raises ValueError for shapes that do not match and for targets that are no rows of `weight`. There is no double
    backward. The logits do not exist: to scale them, scale `hidden`; for any other change, compute them yourself.
    """
    _check(hidden, weight, targets, bias, soft_cap)
    for parameter in (weight, bias):
        if parameter is not None and is_sharded(parameter):
            raise ValueError(
                f"{NAME} got a parameter {tuple(parameter.shape)} that FSDP has sharded, because the head's own "
                f"forward is over; leave the head to the fully_shard of the whole model, whose parameters stay whole "
                f"after its forward, or shard it with reshard_after_forward=False"
            )
    clipper, context = _clipper_of(weight, bias)
    if context is not None and not context.has_rows(targets):
        raise ValueError(
            f"{NAME} got targets for {len(targets)} rows, but the model saw a batch of {context.row_count}; keep the "
            f"batch in dimension 0"
        )
    of_row = list(range(len(targets))) if context is None else context.example_of_row
    batch = len(targets) if context is None else context.batch_size
    positions, labels = _target_positions(targets, ignore_index, vocabulary=weight.shape[0], of_row=of_row, batch=batch)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    tokens = positions.select(hidden)  # (N, d)
    trainable = {key: p for key, p in (("weight", weight), ("bias", bias)) if p is not None and p.requires_grad}
    if clipper is None or context is None:
        losses, *_ = _Head.apply(tokens, weight, bias, labels, positions, soft_cap, False, 0)
        return positions.scatter(losses)
    context.record_use(NAME, [p for p in trainable.values() if isinstance(p, nn.Parameter)], by=NAME)
    with_gram = "weight" in trainable and not (context.batch_size == 1 and clipper.passes_for(context) == 1)
    store = _columns_stored(positions.count, weight, context.ledger.bytes_left, upcast(tokens.detach()[:0]))
    fixed = (weight.detach(), None if bias is None else bias.detach(), labels, positions, soft_cap)
    losses, *numbers = _Head.apply(tokens, *fixed, with_gram, store)
    logit_grads = _logit_gradients(tokens.detach(), *fixed, numbers)
    return _with_norm_hook(losses, logit_grads, context, trainable)


def _with_norm_hook(
    losses: Tensor, logit_grads: LogitGradients, context: BackwardContext, trainable: dict[str, Tensor]
) -> Tensor:
    """The losses (N,) as (B, T), with a norm hook."""
    stored = [each for each in (logit_grads.stored, logit_grads.stored_max) if each is not None]
    if logit_grads.positions.count * len(logit_grads.weight) > KEPT:
        context.ledger.bytes_left -= sum(each.numel() * each.element_size() for each in stored)
    saved, unpack = _pack(logit_grads)
    names, positions = tuple(trainable), logit_grads.positions

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor, _: RowSplit) -> dict[str, Gradient]:
        return _per_example_grads(unpack(saved), grad, trainable=names)

    spec = HookSpec(NAME, names, per_example_grads, context.rows)
    return apply_norm_hook(positions.scatter(losses), spec, context, saved, list(trainable.values()))


def _columns_stored(count: int, weight: Tensor, bytes_left: int, like: Tensor) -> int:
    """How many of the V columns of logits are stored for `count` tokens: all of few, else what fits into the budget."""
    if count * len(weight) <= KEPT:
        return len(weight)
    stored, used = 0, 0
    for columns in vocabulary_blocks(count, weight):
        used += count * (columns.stop - columns.start + 1) * like.element_size()  # a number per token beside the block
        if used > bytes_left:
            break
        stored = columns.stop
    return stored


class _Head(torch.autograd.Function):
    """(losses (N,), then the numbers of `LogitGradients`) from hidden states (N, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        positions: TargetPositions,
        soft_cap: float | None,
        with_gram: bool,
        store: int,
    ) -> tuple[Tensor | None, ...]:
        empty = upcast(hidden.new_empty(0))
        grads = _logit_gradients(hidden, weight, bias, labels, positions, soft_cap, (empty, empty, empty))
        result = scan(grads, with_hidden_grads=ctx.needs_input_grad[0], with_gram=with_gram, store=store)
        grads, needs_second_pass = result.logit_grads, any(ctx.needs_input_grad[1:3])
        saved, ctx.unpack = _pack(grads) if needs_second_pass else ((), None)
        ctx.save_for_backward(result.hidden_grads, *saved)
        ctx.dtype = hidden.dtype
        numbers = (grads.max_logits, grads.inverse_sums, grads.minus_target_grads)
        outputs = (*numbers, grads.gram, grads.stored, grads.stored_max)
        ctx.set_materialize_grads(False)  # else autograd would allocate zeros of the size of the stored logits
        ctx.mark_non_differentiable(*(each for each in outputs if each is not None))
        return result.losses, *outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{NAME} has no double backward; compute the logits and their cross-entropy")
        hidden_grads, *saved = ctx.saved_tensors
        grad, of_weight, of_bias = upcast(grad), None, None
        of_hidden = None if hidden_grads is None else (grad[:, None] * hidden_grads).to(ctx.dtype)
        if ctx.unpack is not None:
            logit_grads = ctx.unpack(saved)
            weighted = upcast(logit_grads.hidden) * grad[:, None]
            if ctx.needs_input_grad[1]:
                of_weight = torch.empty_like(logit_grads.weight, dtype=weighted.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = torch.empty_like(logit_grads.bias, dtype=weighted.dtype)
            for columns, q in logit_grads.blocks():
                if of_weight is not None:
                    torch.mm(q.T, weighted, out=of_weight[columns])
                if of_bias is not None:
                    torch.mv(q.T, grad, out=of_bias[columns])
            of_weight = None if of_weight is None else of_weight.to(logit_grads.weight.dtype)
            of_bias = None if of_bias is None else of_bias.to(logit_grads.bias.dtype)
        return of_hidden, of_weight, of_bias, None, None, None, None, None


def _per_example_grads(logit_grads: LogitGradients, grad: Tensor, *, trainable: tuple[str, ...]) -> dict[str, Gradient]:
    """The gradients of weight and bias, from the gradient (B, T) of the losses."""
    positions, found = logit_grads.positions, dict[str, Gradient]()
    grad = upcast(positions.select(grad))[:, None]  # (N, 1)
    if "weight" in trainable:
        found["weight"] = FactoredGrad(logit_grads, positions.pad(upcast(logit_grads.hidden) * grad))  # (B, width, d)
    if "bias" in trainable:
        sums = [positions.pad(q * grad).sum(1) for _, q in logit_grads.blocks()]
        found["bias"] = PerSampleGrad(torch.cat(sums, 1))
    return found


def _logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    positions: TargetPositions,
    soft_cap: float | None,
    numbers: Sequence[Any],
) -> LogitGradients:
    """`numbers`: max_logits, inverse_sums, minus_target_grads and, if they exist, gram, stored and stored_max."""
    max_logits, inverse_sums, minus_target_grads, gram, stored, stored_max = (*numbers, None, None, None)[:6]
    return LogitGradients(
        hidden,
        weight,
        bias,
        labels,
        max_logits,
        inverse_sums,
        minus_target_grads,
        positions,
        gram,
        stored,
        stored_max,
        soft_cap,
    )


def _pack(logit_grads: LogitGradients) -> tuple[tuple[Tensor, ...], Any]:
    """Its tensors, and a function without tensors that puts them together again."""
    values = {each.name: getattr(logit_grads, each.name) for each in fields(logit_grads)}
    positions, soft_cap = values.pop("positions"), values.pop("soft_cap")
    values |= {"index": positions.index, "slots": positions.slots}
    names = [name for name, value in values.items() if value is not None]
    empty, without_tensors = dict.fromkeys(values), replace(positions, index=None, slots=None)

    def unpack(tensors: Any) -> LogitGradients:
        values = {**empty, **dict(zip(names, tensors, strict=True))}
        positions = replace(without_tensors, index=values.pop("index"), slots=values.pop("slots"))
        return LogitGradients(positions=positions, soft_cap=soft_cap, **values)

    return tuple(values[name] for name in names), unpack


def _clipper_of(*parameters: Tensor | None) -> tuple[Any, BackwardContext | None]:
    """(the clipper of the trainable parameters, the context of its model's last forward), or (None, None)."""
    clippers = (clipper_of(p) for p in parameters if p is not None and p.requires_grad)
    clipper = next((found for found in clippers if found is not None), None)
    return clipper, None if clipper is None else clipper.context_for(NAME, after_forward=True)


def _target_positions(
    targets: Tensor, ignore_index: int, *, vocabulary: int, of_row: list[int], batch: int
) -> tuple[TargetPositions, Tensor]:
    """The positions with a target, and their targets (N,); of fake tensors, which have no values, all positions.

    `of_row`: the example of each row of the targets (R, T), of `batch` examples. Raises ValueError for a target beyond
    the vocabulary.
    """
    rows, length = targets.shape
    has_target = targets != ignore_index
    known = has_values(targets)
    counts = _counts(targets, has_target, vocabulary, ignore_index) if known else [length] * rows
    before, total = [], [0] * batch  # targets of the example in earlier rows, and in all rows
    for example, count in zip(of_row, counts, strict=True):
        before.append(total[example])
        total[example] += count
    width = max(total, default=0)
    first = torch.tensor([e * width + k for e, k in zip(of_row, before, strict=True)], device=targets.device)[:, None]
    in_order = of_row == sorted(of_row) and sum(total) == batch * width
    if min(counts, default=0) == length:
        slots = None if in_order else (first + torch.arange(length, device=targets.device)).flatten()
        labels = targets if known else targets.masked_fill(~has_target, -1)
        return TargetPositions(rows, length, batch, width, None, slots), labels.flatten()
    index = _true_indices(has_target.flatten(), sum(counts))
    slots = None if in_order else (first + has_target.cumsum(1) - 1).flatten()[index]
    return TargetPositions(rows, length, batch, width, index, slots), targets.flatten()[index]


def _counts(targets: Tensor, has_target: Tensor, vocabulary: int, ignore_index: int) -> list[int]:
    """How many targets each row of the targets (R, T) has; ValueError for one beyond the vocabulary. One read."""
    wrong = has_target & ((targets < 0) | (targets >= vocabulary))
    *counts, wrongs = torch.cat([has_target.sum(1), wrong.sum()[None]]).tolist()
    if wrongs:
        raise ValueError(
            f"{NAME} got the target {targets[wrong][0].item()}, but the weight has {vocabulary} rows; give numbers "
            f"below that, or ignore_index={ignore_index}"
        )
    return counts


def _true_indices(flags: Tensor, count: int) -> Tensor:
    """The positions of the `count` flags (n,) that are True, in their order; `nonzero` would wait for a GPU."""
    if not is_slow_to_read(flags):
        return flags.nonzero()[:, 0]
    return flags.logical_not().to(torch.uint8).argsort(stable=True)[:count]


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
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
