"""The per-example losses of any causal language model: each is normalised by the example's own tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost import example_rows, linear_cross_entropy
from memsave.ghost.gradients import has_values
from memsave.models.own_head import own_head
from memsave.models.padding import of_tokens, positions

IGNORED = -100  # the label of a position without target
HEADS = ("chunked", "logits")


def causal_lm_losses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    head: str = "chunked",
    others: Mapping[str, Any] | None = None,
) -> Tensor:
    """(B,): the mean cross-entropy over each example's target tokens; zero for an example without targets.

    An example may have several rows, such as the chunks of a long document: shape (B, K, T). The rows do not see each
    other, and the loss is the mean over the targets of all of them.

    Args:
        model: any causal language model of transformers, also with an adapter of PEFT. Virtual tokens of an adapter
            are no targets.
        input_ids: (B, T) or (B, K, T).
        labels: of the same shape, equal to input_ids at targets and -100 elsewhere. The function shifts them, so that
            each target is predicted from the tokens before it.
        attention_mask: of the same shape, zero at padding on the right or on the left. The loss equals that of the
            example without padding. The first token after padding is no target. Rows of zeros do not exist.
        head: "chunked" never computes all logits (B, T, V) at once; "logits" uses the logits of the model.
        others: further inputs of the model's forward, for input_ids (B, T).

    Raises ValueError if padding changes the model's logits, and for targets at padding. With head="chunked" also raises
    ValueError if the head is no `nn.Linear`, or if the model changes the logits by more than a factor or a soft cap
    named in its configuration: these need head="logits".
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; choose one of {', '.join(HEADS)}")
    if input_ids.dim() == 2:
        losses, counts = _row_losses(model, input_ids, labels, attention_mask, head=head, others=others or {})
        return losses / counts.clamp(min=1)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    batch_size, chunks = input_ids.shape[:2]
    exists = mask.flatten(0, 1).any(1)  # (B K,)
    rows = exists.nonzero()[:, 0] if has_values(exists) else torch.arange(batch_size * chunks, device=mask.device)
    of_row = (rows // chunks).tolist() if has_values(exists) else [b for b in range(batch_size) for _ in range(chunks)]
    with example_rows(of_row, examples=batch_size):
        chosen = (each.flatten(0, 1)[rows] for each in (input_ids, labels, mask))
        losses, counts = _row_losses(model, *chosen, head=head, others={})
    example = torch.tensor(of_row, device=mask.device)
    total = losses.new_zeros(batch_size).index_add(0, example, losses)
    return total / counts.new_zeros(batch_size).index_add(0, example, counts).clamp(min=1)


def _row_losses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    *,
    head: str,
    others: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """(sums of the cross-entropy over the targets of each row (R,), numbers of targets (R,)) of a batch (R, T)."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **others}
    targets = labels[:, 1:]
    if attention_mask is not None:
        position_ids = None if "position_ids" in others else positions(model, input_ids, attention_mask)
        inputs |= {} if position_ids is None else {"position_ids": position_ids}
        targets = _after_tokens(targets, attention_mask)
    if head == "chunked":
        linear, hidden, soft_cap = own_head(model, inputs)
        options: dict[str, Any] = {"bias": linear.bias, "ignore_index": IGNORED, "soft_cap": soft_cap}
        hidden = of_tokens(hidden, input_ids)
        each = linear_cross_entropy(hidden[:, :-1], linear.weight, targets, **options)
    else:
        logits = of_tokens(model(**inputs, use_cache=False).logits, input_ids)  # (R, T, V)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        # The targets are padded, because slicing the logits would copy them.
        shifted = F.pad(targets, (0, 1), value=IGNORED).flatten()
        each = F.cross_entropy(logits.flatten(0, 1), shifted, reduction="none", ignore_index=IGNORED).view_as(labels)
    return each.sum(1), (targets != IGNORED).sum(1)


def _after_tokens(targets: Tensor, mask: Tensor) -> Tensor:
    """The targets (R, T - 1) that follow a token; the first token after padding is no target."""
    wrong = (targets != IGNORED) & (mask[:, 1:] == 0) & (mask[:, :-1] != 0)
    if has_values(wrong) and bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels has the target {int(targets[row, column])} at row {row}, column {column + 1}, where "
            f"attention_mask is 0; give {IGNORED} there, or a mask of 1"
        )
    return targets.masked_fill(mask[:, :-1] == 0, IGNORED)


def fuse_gelu(model: nn.Module) -> int:
    """Replace transformers' tanh GELU (`gelu_new`) by PyTorch's; returns the number of replacements.

    The function is the same; PyTorch's kernel saves one tensor for backward, the other four.
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
    """Whether the layers of the model are checkpointed."""
    return bool(model.is_activation_checkpointing)


def set_checkpointing(model: nn.Module, *, on: bool) -> None:
    """Enable or disable non-reentrant checkpoints of the model's layers."""
    switch: Any = model
    if on:
        switch.activation_checkpointing_enable({"use_reentrant": False})
    else:
        switch.activation_checkpointing_disable()
    # Enabling makes frozen embeddings differentiable, which only reentrant checkpoints need; disabling keeps it.
    switch.disable_input_require_grads()
