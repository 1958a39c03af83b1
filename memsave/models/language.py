"""Causal language models as they are: the loss of each example, normalised by that example alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # the label of what is no target


def causal_lm_losses(
    model: nn.Module, input_ids: Tensor, labels: Tensor, *, attention_mask: Tensor | None = None
) -> Tensor:
    """(B,): the mean cross-entropy over each example's own target tokens, zero for an example without any.

    Args:
        model: any causal language model of transformers.
        input_ids: (B, T).
        labels: (B, T), the same tokens where they are targets and -100 elsewhere; shifted in here, so that each is
            predicted from those before it.
        attention_mask: (B, T), zero at padding.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # shifted instead of the logits, which are not copied so
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view_as(targets).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether the layers run again in backward."""
    return bool(model.is_activation_checkpointing)


def set_checkpointing(model: nn.Module, *, on: bool) -> None:
    """Have the layers run again in backward, or keep what they computed."""
    switch: Any = model
    if on:
        switch.activation_checkpointing_enable({"use_reentrant": False})
    else:
        switch.activation_checkpointing_disable()
