"""The per-example losses of any encoder-decoder: each is normalised by the example's own targets.

The encoder reads the inputs x, the decoder predicts the targets y:

    loss_i = - mean over t of log p(y_it | x_i, y_i1 .. y_i,t-1)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost import linear_cross_entropy
from memsave.ghost.gradients import has_values
from memsave.models.language import HEADS, IGNORED
from memsave.models.own_head import own_head
from memsave.models.padding import base_of, check_same
from memsave.models.trial import has_passed, needed_by_any, note_passed, trial
from memsave.processes import class_of

TRIAL_TOKENS = 8
"""Tokens of the decoder in the trial of the encoder's padding."""


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model of transformers has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_decoder_losses(
    model: nn.Module, input_ids: Tensor, labels: Tensor, *, attention_mask: Tensor, head: str = "chunked"
) -> Tensor:
    """(B,): the mean cross-entropy over each example's targets; zero for an example without targets.

    Args:
        model: any encoder-decoder of transformers with a language-model head.
        input_ids: (B, S), of the encoder.
        labels: (B, T), the targets of the decoder; -100 at padding, which is on the right.
        attention_mask: (B, S), zero at padding of the input.
        head: "chunked" never computes all logits (B, T, V) at once; "logits" uses the logits of the model.

    Raises ValueError if padding of the input changes the model's logits. With head="chunked" also raises ValueError for
    heads that need head="logits"; see `causal_lm_losses`.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; choose one of {', '.join(HEADS)}")
    before = _tokens_before(model, labels)
    _check_padding(model, input_ids, attention_mask, before)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": before}
    if head == "chunked":
        linear, hidden, soft_cap = own_head(model, inputs)
        options: dict[str, Any] = {"bias": linear.bias, "ignore_index": IGNORED, "soft_cap": soft_cap}
        each = linear_cross_entropy(hidden, linear.weight, labels, **options)  # (B, T)
    else:
        logits = model(**inputs, use_cache=False).logits  # (B, T, V)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        options = {"reduction": "none", "ignore_index": IGNORED}
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options).view_as(labels)
    return each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _tokens_before(model: nn.Module, labels: Tensor) -> Tensor:
    """(B, T): the decoder's input, which is the targets moved by one, after the model's start token."""
    base: Any = base_of(model)
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        found: Tensor = base.prepare_decoder_input_ids_from_labels(labels=labels)
        return found
    moved = torch.full_like(labels, base.config.decoder_start_token_id)
    moved[:, 1:] = labels[:, :-1]
    return moved.masked_fill(moved == IGNORED, base.config.pad_token_id)


def _check_padding(model: nn.Module, input_ids: Tensor, mask: Tensor, before: Tensor) -> None:
    """Once for each model, raise ValueError unless an input has the same logits with and without its padding."""
    check = "padding of the encoder's input"
    if not has_values(mask) or not mask.numel() or has_passed(model, check):
        return
    kept = mask != 0
    padding = torch.where(kept.any(1), (~kept).sum(1), 0)
    row = int(padding.argmax())
    if not needed_by_any(model, bool(padding[row])):
        return
    rows, alone = slice(row, row + 1), kept[row] if kept[row].any() else torch.ones_like(kept[row])
    start, options = before[rows, :TRIAL_TOKENS], {"use_cache": False}
    inputs = {"input_ids": input_ids[rows], "attention_mask": mask[rows]}
    shorter = {key: value[:, alone] for key, value in inputs.items()}
    with trial(model):
        padded = model(**inputs, decoder_input_ids=start, **options).logits
        plain = model(**shorter, decoder_input_ids=start, **options).logits
    name = class_of(base_of(model)).__name__
    remedy = "make batches of examples of one length"
    check_same(padded, plain, f"padding of the encoder's input changes the logits of {name}", remedy=remedy)
    note_passed(model, check)
