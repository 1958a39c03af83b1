"""Causal language models as they are: the loss of each example, normalised by that example alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost import linear_cross_entropy
from memsave.ghost.gradients import has_values
from memsave.models.own_head import own_head
from memsave.models.padding import positions

IGNORED = -100  # the label of what is no target
HEADS = ("chunked", "logits")


def causal_lm_losses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    head: str = "chunked",
) -> Tensor:
    """(B,): the mean cross-entropy over each example's own target tokens, zero for an example without any.

    Args:
        model: any causal language model of transformers.
        input_ids: (B, T).
        labels: (B, T), the same tokens where they are targets and -100 elsewhere; shifted in here, so that each is
            predicted from those before it.
        attention_mask: (B, T), zero at padding, which is on the right or on the left: the loss is that of the example
            alone. A token after padding is no target.
        head: "chunked" never holds the logits (B, T, V); "logits" takes those that the model gives.

    Raises ValueError for padding on the left of a model whose logits it changes, and for targets that are padding. With
    head="chunked", also for a head that is no `nn.Linear`, and for logits that are changed by more than a factor or a
    soft cap that the model's configuration names: those need head="logits".
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; choose one of {', '.join(HEADS)}")
    inputs, targets = {"input_ids": input_ids, "attention_mask": attention_mask}, labels[:, 1:]
    if attention_mask is not None:
        where = positions(model, input_ids, attention_mask)
        inputs |= {} if where is None else {"position_ids": where}
        targets = _after_tokens(targets, attention_mask)
    if head == "chunked":
        linear, hidden, soft_cap = own_head(model, inputs)
        options: dict[str, Any] = {"bias": linear.bias, "ignore_index": IGNORED, "soft_cap": soft_cap}
        each = linear_cross_entropy(hidden[:, :-1], linear.weight, targets, **options)
    else:
        logits = model(**inputs, use_cache=False).logits  # (B, T, V)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        shifted = F.pad(targets, (0, 1), value=IGNORED).flatten()  # instead of the logits, which are not copied so
        each = F.cross_entropy(logits.flatten(0, 1), shifted, reduction="none", ignore_index=IGNORED).view_as(labels)
    return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def _after_tokens(targets: Tensor, mask: Tensor) -> Tensor:
    """The targets (B, T - 1) that the example alone has: those after a token."""
    wrong = (targets != IGNORED) & (mask[:, 1:] == 0) & (mask[:, :-1] != 0)
    if has_values(wrong) and bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels has the target {int(targets[row, place])} at row {row}, column {place + 1}, where attention_mask "
            f"is 0; give {IGNORED} there, or a mask of 1"
        )
    return targets.masked_fill(mask[:, :-1] == 0, IGNORED)


def fuse_gelu(model: nn.Module) -> int:
    """Put PyTorch's own tanh GELU in the place of transformers' (`gelu_new`); returns how many were.

    The same function in one operation, which keeps one tensor for backward where the other keeps four.
    """
    found = [
        (parent, key)
        for parent in model.modules()
        for key, child in parent.named_children()
        if type(child).__name__ in ("NewGELUActivation", "FastGELUActivation")
    ]
    for parent, key in found:
        setattr(parent, key, nn.GELU(approximate="tanh"))
    return len(found)


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
