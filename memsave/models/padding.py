"""Position ids that skip padding, and a trial that checks that padding does not change the logits.

The loss of an example must not depend on its padding. Padding on the right has no effect under causal attention. With
padding on the left, a model that numbers positions from the first column needs the position ids of the example without
padding. Not every model satisfies this. Therefore, once for each model and side, a trial compares the logits of the
start of a row with and without padding.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import has_values
from memsave.models.trial import has_passed, needed_by_any, note_passed, trial
from memsave.processes import class_of

TRIAL_TOKENS = 8  # in the trial, with at most as much padding
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
}  # of the largest logit; norms are often float32
LOW_PRECISION_TOLERANCE = 5e-2  # in other dtypes
REMEDIES = {"left": "pad on the right", "right": "make batches of examples of one length"}


def positions(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor | None:
    """(B, T): position ids that skip the padding on the left; None without such padding or without values.

    Raises ValueError if the model takes no position ids, or if padding changes its logits nevertheless.
    """
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; give (B, T)")
    if not has_values(mask) or not mask.numel():
        return None
    kept = mask != 0
    runs = kept[:, 0] + (kept[:, 1:] & ~kept[:, :-1]).sum(1)  # of consecutive ones
    rows = {"left": (runs > 0) & ~kept[:, 0], "right": (runs == 1) & kept[:, 0] & ~kept[:, -1]}
    torn, left, right = torch.stack([(runs > 1).any(), *(each.any() for each in rows.values())]).tolist()
    name = class_of(base_of(model)).__name__
    if left and torn:
        row = int((runs > 1).nonzero()[0])
        raise ValueError(f"attention_mask has zeros on the left, and between ones in row {row}; {REMEDIES['left']}")
    if left and "position_ids" not in inspect.signature(type(base_of(model)).forward).parameters:
        raise ValueError(f"attention_mask has zeros on the left, and {name} takes no position_ids; {REMEDIES['left']}")
    for side, found in (("left", left), ("right", right)):
        if not has_passed(model, f"padding on the {side}") and needed_by_any(model, found):
            row = int(((rows[side] if found else 1) * kept.sum(1)).argmax())
            tokens = kept[row] if kept[row].any() else torch.ones_like(kept[row])
            _try(model, input_ids[row], tokens, side=side, name=name)
            note_passed(model, f"padding on the {side}")
    return numbered(mask) if left else None


def numbered(mask: Tensor) -> Tensor:
    """The index of each token among the tokens of its row; zero before the first one."""
    return ((mask != 0).cumsum(-1) - 1).clamp(min=0)


def base_of(model: Any) -> nn.Module:
    """The base model of a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def of_tokens(outputs: Tensor, input_ids: Tensor) -> Tensor:
    """Outputs (B, T, d) of the tokens (B, T), given those (B, V + T, d) of a model that puts V virtual tokens first."""
    extra = outputs.shape[1] - input_ids.shape[1]
    return outputs[:, extra:] if extra > 0 else outputs


def _try(model: Any, ids: Tensor, kept: Tensor, *, side: str, name: str) -> None:
    """Raise ValueError unless the start of a row has the same logits with and without padding."""
    width, ids = len(ids), ids[kept][None, :TRIAL_TOKENS]
    count = ids.shape[1]
    with trial(model):
        plain, whole_text = _logits(model, ids, torch.ones_like(ids))
        pad = getattr(model.config, "pad_token_id", None)
        # a token that padding never is; but models with one output for a text find its last token by the padding
        filler = torch.full_like(ids[:, :1], pad) if whole_text and pad is not None else ids[:, :1]
        filler = filler.expand(-1, min(TRIAL_TOKENS, width - count))
        alone = slice(-count, None) if side == "left" else slice(0, count)
        ids = torch.cat([filler, ids] if side == "left" else [ids, filler], 1)
        mask = torch.zeros_like(ids)
        mask[:, alone] = 1
        where = {"position_ids": numbered(mask)} if side == "left" else {}
        padded, _ = _logits(model, ids, mask, **where)
    given = ", although its position_ids skip it" if where else ""
    change = f"padding on the {side} changes the logits of {name}"
    check_same(padded if whole_text else padded[:, alone], plain, change, given=given, remedy=REMEDIES[side])


def _logits(model: Any, ids: Tensor, mask: Tensor, **where: Tensor) -> tuple[Tensor, bool]:
    """(logits (1, T, V) of the tokens, (1, T) of the start of an answer, or (1, L), whether they are of the text)."""
    outputs = model(input_ids=ids, attention_mask=mask, **where, use_cache=False)
    logits: Tensor = outputs.logits if "logits" in outputs else outputs.start_logits
    return (of_tokens(logits, ids) if logits.dim() == 3 else logits), "logits" in outputs and logits.dim() == 2


def check_same(padded: Tensor, plain: Tensor, change: str, *, given: str = "", remedy: str) -> None:
    """Raise ValueError, which starts with `change`, unless the logits with and without padding agree."""
    low = torch.is_autocast_enabled(plain.device.type) or plain.dtype not in TOLERANCE
    tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE[plain.dtype]
    difference, largest = float("nan"), plain[plain.isfinite()].abs().amax().item() if plain.isfinite().any() else 0.0
    if padded.shape == plain.shape:
        same = (padded == plain) | (padded.isnan() & plain.isnan())  # also for infinities
        difference = torch.where(same, 0, padded - plain).abs().max().item()
    if not difference <= tolerance * largest:
        raise ValueError(f"{change} by {difference:.3g} of {largest:.3g}{given}; {remedy}")
