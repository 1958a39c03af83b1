"""The loss of each example by the model's own definition, for the common heads of transformers.

A model of transformers returns one loss for a batch: the mean over the tokens or labels of all its examples, so that
each example's weight depends on the others. Here each example has the loss that the model returns for it alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.models.encoder_decoder import encoder_decoder_losses, is_encoder_decoder
from memsave.models.language import IGNORED, causal_lm_losses
from memsave.models.padding import base_of, positions
from memsave.processes import class_of

Batch = Mapping[str, Any]
LABELS = ("labels", "start_positions", "end_positions")


def model_losses(model: nn.Module, batch: Batch, *, head: str = "chunked") -> Tensor:
    """(B,): the loss that a model of transformers returns for each example alone, without its padding.

    Known heads: causal and masked language models, encoder-decoders, classification of texts, images, audio and tokens,
    regression, question answering, and multiple choice; also with an adapter of PEFT.

    Args:
        model: the model.
        batch: the arguments of its forward, with labels.
        head: of causal language models and encoder-decoders, see `causal_lm_losses`.

    Raises ValueError for another head, for a batch without labels, and if padding changes the model's logits.
    """
    base = base_of(model)
    kind, losses = _losses_of(base)
    wanted = LABELS[1:] if kind == "ForQuestionAnswering" else LABELS[:1]
    missing = [name for name in wanted if batch.get(name) is None]
    if missing:
        raise ValueError(f"the batch has no {' and no '.join(missing)}, only {', '.join(batch)}")
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits=True adds a loss over the experts that all examples of the batch share; "
            "set it to False"
        )
    inputs = {key: value for key, value in batch.items() if key not in LABELS and value is not None}
    return losses(model, inputs, batch, head)


def _losses_of(base: Any) -> tuple[str, Callable[[Any, dict[str, Any], Batch, str], Tensor]]:
    """(the kind of head, the function that gives its losses)."""
    name = class_of(base).__name__
    kind = getattr(base, "loss_type", None)
    if kind is None:
        kind = next((each for each in ("ForMultipleChoice", "LMHead") if each in name), "")
    if is_encoder_decoder(base) and kind in ("", "LMHead", "ForCausalLM", "ForConditionalGeneration"):
        return kind, _pairs
    if kind not in KINDS:
        raise ValueError(f"the loss of each example of {name} is not known; give a function that computes it")
    return kind, KINDS[kind]


def _causal(model: Any, inputs: dict[str, Any], batch: Batch, head: str) -> Tensor:
    others = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "input_ids" not in inputs:
        raise ValueError(f"the batch has no input_ids, only {', '.join(batch)}")
    mask = inputs.get("attention_mask")
    return causal_lm_losses(model, inputs["input_ids"], batch["labels"], attention_mask=mask, head=head, others=others)


def _pairs(model: Any, inputs: dict[str, Any], batch: Batch, head: str) -> Tensor:
    others = set(inputs) - {"input_ids", "attention_mask", "decoder_input_ids"}
    if others or "input_ids" not in inputs:
        raise ValueError(
            f"the loss of each example of an encoder-decoder is known for input_ids, attention_mask and labels; the "
            f"batch has {', '.join(batch)}"
        )
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return encoder_decoder_losses(model, ids, batch["labels"], attention_mask=mask, head=head)


def _tokens(model: Any, inputs: dict[str, Any], batch: Batch, head: str) -> Tensor:
    logits = _forward(model, inputs).logits  # (B, T, L)
    return _mean_over_tokens(_upcast(logits), batch["labels"])


def _classes(model: Any, inputs: dict[str, Any], batch: Batch, head: str) -> Tensor:
    logits = _upcast(_forward(model, inputs).logits)  # (B, L)
    labels, problem = batch["labels"], _problem(model, batch["labels"])
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(len(logits)), reduction="none", ignore_index=IGNORED)
    labels = labels.view(len(logits), -1).to(logits.dtype)
    if problem == "regression":
        return F.mse_loss(logits, labels, reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _problem(model: Any, labels: Tensor) -> str:
    """The kind of labels, by the rules of transformers, which writes it into the config at the first batch."""
    base: Any = base_of(model)
    config = base.config
    if config.problem_type is not None:
        return str(config.problem_type)
    if config.num_labels == 1:
        return "regression"
    whole = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if whole else "multi_label_classification"


def _spans(model: Any, inputs: dict[str, Any], batch: Batch, head: str) -> Tensor:
    """Unlike that of transformers, the softmax leaves padding out, whose length depends on the other examples."""
    outputs, mask = _forward(model, inputs), inputs.get("attention_mask")
    losses = []
    for logits, name in ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions")):
        target = batch[name].view(len(logits), 1)
        inside = (target >= 0) & (target < logits.shape[1])  # an answer outside of the text is no target
        target = target.where(inside, 0)
        if mask is not None:
            inside = inside & (mask.gather(1, target) != 0)
            logits = logits.masked_fill(mask == 0, -torch.inf)
        target = target.where(inside, IGNORED)[:, 0]
        losses.append(F.cross_entropy(_upcast(logits), target, reduction="none", ignore_index=IGNORED))
    return (losses[0] + losses[1]) / 2


def _choices(model: Any, inputs: dict[str, Any], batch: Batch, head: str) -> Tensor:
    logits = _upcast(model(**inputs).logits)  # (B, choices)
    return F.cross_entropy(logits, batch["labels"].view(len(logits)), reduction="none")


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(ids, Tensor) and ids.dim() == 2 and mask is not None and "position_ids" not in inputs:
        found = positions(model, ids, mask)
        inputs = inputs if found is None else {**inputs, "position_ids": found}
    return model(**inputs)


def _mean_over_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) of logits (B, T, L) and labels (B, T); zero for an example without labels."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view_as(labels).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _upcast(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


KINDS = {
    "ForCausalLM": _causal,
    "LMHead": _causal,
    "ForConditionalGeneration": _causal,
    "ForMaskedLM": _tokens,
    "ForTokenClassification": _tokens,
    "ForSequenceClassification": _classes,
    "ForImageClassification": _classes,
    "ForVideoClassification": _classes,
    "ForAudioClassification": _classes,
    "ForQuestionAnswering": _spans,
    "ForMultipleChoice": _choices,
}
"""transformers' name of the loss, or a part of the class's name: the losses of (model, inputs, batch, head)."""
