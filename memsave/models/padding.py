"""Padding that changes nothing: positions that do not count it, and a trial that tells.

An example is the same whatever it is padded to. On the right causal attention sees to that. On the left a model that
numbers its positions from the first column must be given other numbers, those of the example alone. Some models have
neither: once for each model and side, the start of a padded row must have the logits that it has alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.gradients import has_values
from memsave.models.trial import has_passed, note_passed, trial

TOKENS = 8  # in the trial, and as much padding
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the largest logit; many norms are float32 in any model
ROUGH = 5e-2  # in other dtypes
REMEDIES = {"left": "pad on the right", "right": "make batches of examples of one length"}


def positions(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor | None:
    """(B, T): the positions without the padding on the left; None where there is none, or no values to tell from.

    Raises ValueError for a model that does not take positions, or whose logits padding changes all the same.
    """
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; give (B, T)")
    if not has_values(mask) or not mask.numel():
        return None
    kept = mask != 0
    runs = kept[:, 0] + (kept[:, 1:] & ~kept[:, :-1]).sum(1)  # of ones
    rows = {"left": (runs > 0) & ~kept[:, 0], "right": (runs == 1) & kept[:, 0] & ~kept[:, -1]}
    torn, left, right = torch.stack([(runs > 1).any(), *(each.any() for each in rows.values())]).tolist()
    name = type(base_of(model)).__name__
    if left and torn:
        row = int((runs > 1).nonzero()[0])
        raise ValueError(f"attention_mask has zeros on the left, and between ones in row {row}; {REMEDIES['left']}")
    if left and "position_ids" not in inspect.signature(type(base_of(model)).forward).parameters:
        raise ValueError(f"attention_mask has zeros on the left, and {name} takes no position_ids; {REMEDIES['left']}")
    for side, found in (("left", left), ("right", right)):
        if found and not has_passed(model, f"padding on the {side}"):
            row = int((rows[side] * kept.sum(1)).argmax())
            _try(model, input_ids[row], kept[row], side=side, name=name)
            note_passed(model, f"padding on the {side}")
    return numbered(mask) if left else None


def numbered(mask: Tensor) -> Tensor:
    """The number of each token among those of its row; zero before the first."""
    return ((mask != 0).cumsum(-1) - 1).clamp(min=0)


def base_of(model: Any) -> nn.Module:
    """The model inside one of peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _try(model: Any, ids: Tensor, kept: Tensor, *, side: str, name: str) -> None:
    """The start of a row's tokens, padded with one of them and alone, must have the same logits."""
    width, ids = len(ids), ids[kept][None, :TOKENS]
    count = ids.shape[1]
    filler = ids[:, :1].expand(-1, min(TOKENS, width - count))
    alone = slice(-count, None) if side == "left" else slice(0, count)
    ids = torch.cat([filler, ids] if side == "left" else [ids, filler], 1)
    mask = torch.zeros_like(ids)
    mask[:, alone] = 1
    where = {"position_ids": numbered(mask)} if side == "left" else {}
    with trial(model):
        padded = model(input_ids=ids, attention_mask=mask, **where, use_cache=False).logits[:, alone]
        plain = model(input_ids=ids[:, alone], attention_mask=mask[:, alone], use_cache=False).logits
    tolerance = ROUGH if torch.is_autocast_enabled(ids.device.type) else TOLERANCE.get(plain.dtype, ROUGH)
    difference, largest = float("nan"), plain[plain.isfinite()].abs().amax().item() if plain.isfinite().any() else 0.0
    if padded.shape == plain.shape:
        same = (padded == plain) | (padded.isnan() & plain.isnan())  # infinities, too
        difference = torch.where(same, 0, padded - plain).abs().max().item()
    if not difference <= tolerance * largest:
        given = ", though its position_ids do not count it" if where else ""
        raise ValueError(
            f"padding on the {side} changes the logits of {name} by {difference:.3g} of {largest:.3g}{given}; "
            f"{REMEDIES[side]}"
        )
