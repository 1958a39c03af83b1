"""Causal language models as they are: the loss of each example, normalised by that example alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost import linear_cross_entropy
from memsave.ghost.gradients import has_values

IGNORED = -100  # the label of what is no target
HEADS = ("chunked", "logits")
PROBE = (-1024.0, -1.0, 0.0, 0.125, 1.0, 1024.0)  # powers of two: scaling them rounds nothing


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
        attention_mask: (B, T), zero at padding.
        head: "chunked" never holds the logits (B, T, V); "logits" takes those that the model gives.

    Raises ValueError for a head that is no `nn.Linear`, or whose logits are changed by more than a factor: those need
    head="logits".
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; choose one of {', '.join(HEADS)}")
    inputs, targets = {"input_ids": input_ids, "attention_mask": attention_mask}, labels[:, 1:]
    if head == "chunked":
        linear, hidden = _hidden(model, inputs)
        each = linear_cross_entropy(hidden[:, :-1], linear.weight, targets, bias=linear.bias, ignore_index=IGNORED)
    else:
        logits = model(**inputs, use_cache=False).logits  # (B, T, V)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        shifted = F.pad(targets, (0, 1), value=IGNORED).flatten()  # instead of the logits, which are not copied so
        each = F.cross_entropy(logits.flatten(0, 1), shifted, reduction="none", ignore_index=IGNORED).view_as(labels)
    return each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def _hidden(model: Any, inputs: dict[str, Any]) -> tuple[nn.Linear, Tensor]:
    """(the head, what it is given (B, T, d) times what its logits are scaled by), by the model's own forward.

    In the place of logits the forward gets a few known numbers, and what it does to them tells what it does to logits.
    """
    linear = model.get_output_embeddings()
    name = f"the head of {type(model).__name__}"
    if type(linear) is not nn.Linear:
        raise ValueError(f'{name} is a {type(linear).__name__} and no Linear; give head="logits"')
    seen: list[Tensor] = []

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return torch.tensor(PROBE, dtype=hidden.dtype, device=hidden.device)[None, None]

    with _forward_as(linear, note):
        try:
            found = model(**inputs, use_cache=False).logits
        except RuntimeError as error:
            if not seen:
                raise
            raise ValueError(f'the logits after {name} are changed ({error}); give head="logits"') from error
    if len(seen) != 1:
        raise ValueError(f'{name} ran {len(seen)} times in a forward, not once; give head="logits"')
    scale = _scale(found, name)
    if scale == 1:
        return linear, seen[0]
    if linear.bias is not None:
        raise ValueError(f'{name} has a bias, and its logits are scaled by {scale:g}; give head="logits"')
    return linear, seen[0] * scale


def _scale(found: Tensor, name: str) -> float:
    """The factor between PROBE and what became of it."""
    if not has_values(found):
        return 1.0
    values = found.detach().flatten().tolist()
    scale = values[PROBE.index(1.0)] if len(values) == len(PROBE) else 0.0
    if values != [scale * each for each in PROBE]:
        raise ValueError(
            f"the logits after {name} are changed by more than a factor, as by soft-capping "
            f'({PROBE[-1]:g} becomes {values[-1]:g}); give head="logits"'
        )
    return scale


@contextmanager
def _forward_as(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within, the module has another forward, in the place of its own or of a clipper's."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


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
