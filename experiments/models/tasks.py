"""By task: the batch, ragged and right-padded, and one loss per example that depends on its own row alone."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXAMPLES, PLACES, TARGETS = 4, 7, 6
LENGTHS = (7, 4, 6, 3)
PAD, START, END, MASK, FIRST = 0, 1, 2, 3, 5
Batch = dict[str, Tensor]


def tokens(
    generator: torch.Generator, places: int, lengths: tuple[int, ...], *, end: bool = True
) -> tuple[Tensor, Tensor]:
    """Token numbers (B, T) with the end token last and padding after it, and the attention mask (B, T)."""
    ids = torch.randint(FIRST, FIRST + 20, (EXAMPLES, places), generator=generator)
    mask = torch.arange(places)[None] < torch.tensor(lengths)[:, None]
    if end:
        ids[torch.arange(EXAMPLES), torch.tensor(lengths) - 1] = END
    return ids.masked_fill(~mask, PAD), mask.long()


def text_batch(model: nn.Module, task: str, settings: dict[str, Any]) -> Batch:
    """Texts, with what else the model's forward takes."""
    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    scale = settings.get("_scale", 1)
    ids, mask = tokens(generator, PLACES * scale, tuple(length * scale for length in LENGTHS))
    if task == "masked language model":
        ids[:, 0], ids[:, 2 * scale - 1] = MASK, MASK
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "text to text":
        ours, ours_mask = tokens(generator, TARGETS, (6, 5, 3, 4))
        batch |= {"decoder_input_ids": ours, "decoder_attention_mask": ours_mask}
    if "bbox" in taken:
        batch["bbox"] = torch.randint(0, 5, (EXAMPLES, len(ids[0]), 4), generator=generator).sort(-1).values
    everything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    needed = ("input_ids", "attention_mask", "bbox", "decoder_input_ids")
    return {name: value for name, value in batch.items() if name in taken or (everything and name in needed)}


def image_batch(model: nn.Module, task: str, settings: dict[str, Any]) -> Batch:
    """Images of noise; for models that read an image as a text, its tokens."""
    if settings.get("_text"):
        return text_batch(model, task, settings)
    generator = torch.Generator().manual_seed(0)
    config = getattr(model.config, "vision_config", model.config)
    size = settings.get("_image", getattr(config, "image_size", 32))
    height, width = (size, size) if isinstance(size, int) else size
    channels = settings.get("_channels", getattr(config, "num_channels", 3))
    return {"pixel_values": torch.randn(EXAMPLES, channels, height, width, generator=generator)}


def audio_batch(model: nn.Module, task: str, settings: dict[str, Any]) -> Batch:
    """Sound of noise, as samples or as features; ragged where the model takes a mask."""
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    shape = settings.get("_sound", (2400,))
    name = "input_values" if "input_values" in taken else "input_features"
    sound = torch.randn(EXAMPLES, *shape, generator=generator)
    if "attention_mask" not in taken or settings.get("_no_mask"):
        return {name: sound}
    places = shape[0]
    lengths = torch.tensor([places, places * 3 // 4, places * 4 // 5, places // 2])
    mask = torch.arange(places)[None] < lengths[:, None]
    return {
        name: sound.masked_fill(~mask.reshape(*mask.shape, *[1] * (len(shape) - 1)), 0),
        "attention_mask": mask.long(),
    }


def causal_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over each text's own next tokens."""
    return next_tokens(model(**batch).logits, batch["input_ids"])


def target_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over each target text's own next tokens."""
    logits, targets = model(**batch).logits, batch.get("decoder_input_ids")
    same = targets is not None and logits.shape[1] == targets.shape[1]
    return next_tokens(logits, targets if same else batch["input_ids"])  # some families have no decoder of their own


def next_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """(B,) from logits (B, T, V)."""
    if logits.shape[:2] != ids.shape:
        raise NotImplementedError(f"logits have the shape {tuple(logits.shape)} for tokens {tuple(ids.shape)}")
    return weighted(logits[:, :-1], ids[:, 1:], ids[:, 1:] != PAD)


def masked_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over each text's own masked tokens."""
    ids = batch["input_ids"]
    return weighted(model(**batch).logits, (ids + torch.arange(ids.shape[1])) % 20 + FIRST, ids == MASK)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over each text's own tokens, of two classes."""
    ids = batch["input_ids"]
    return weighted(model(**batch).logits[:, : ids.shape[1]], ids % 2, ids != PAD)


def weighted(logits: Tensor, targets: Tensor, chosen: Tensor) -> Tensor:
    """(B,): the mean of the cross-entropies (B, T) where `chosen`."""
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (each * chosen).sum(1) / chosen.sum(1)


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    """One class per example; the label follows from its own input, so that it stays with the row."""
    logits = model(**batch).logits
    first = next(iter(batch.values()))
    labels = (first.reshape(len(first), -1)[:, 0] > first.reshape(len(first), -1)[:, 1]).long()
    return F.cross_entropy(logits, labels, reduction="none")


def span_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The first and the last token of an answer."""
    found = model(**batch)
    first = torch.ones(len(found.start_logits), dtype=torch.long)
    last = (batch["input_ids"] != PAD).sum(1) - 1
    start = F.cross_entropy(found.start_logits, first, reduction="none")
    return start + F.cross_entropy(found.end_logits, last, reduction="none")


TASKS: dict[str, tuple[str, Callable[..., Batch], Callable[..., Tensor]]] = {
    "causal language model": ("CAUSAL_LM", text_batch, causal_losses),
    "masked language model": ("MASKED_LM", text_batch, masked_losses),
    "text to text": ("SEQ_TO_SEQ_CAUSAL_LM", text_batch, target_losses),
    "text classification": ("SEQUENCE_CLASSIFICATION", text_batch, class_losses),
    "token classification": ("TOKEN_CLASSIFICATION", text_batch, token_losses),
    "question answering": ("QUESTION_ANSWERING", text_batch, span_losses),
    "image classification": ("IMAGE_CLASSIFICATION", image_batch, class_losses),
    "audio classification": ("AUDIO_CLASSIFICATION", audio_batch, class_losses),
}
"""By task: the name of the mapping of transformers, the batch, and the losses."""
