"""The logits of a few words at one position of each example, through the model's own output head.

A classifier by label words (Gao et al. 2021, arXiv:2012.15723) predicts one of L words at one position p of a text:

    z_l = w_{v(l)} . h_p + b_{v(l)},  l = 1..L        v(l): the token of label word l; h_p (d,): input of the head

The head is the one of pretraining, of which the L rows W[v] and b[v] are used; a tied embedding stays tied. During the
forward, the head returns these logits, (B, L), instead of those of the vocabulary, (B, T, V), which are never computed.
Not every model passes the output of its head on unchanged. Once for each model, a forward of one example with all
logits must confirm the result. Otherwise the logits are taken from (B, T, V).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost.gradients import has_values
from memsave.models.own_head import replaced_forward
from memsave.models.padding import base_of
from memsave.models.trial import has_passed, note_passed, trial

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2


def label_word_logits(model: nn.Module, inputs: Mapping[str, Tensor], *, position: Tensor, words: Tensor) -> Tensor:
    """(B, L): the logits of the tokens `words` at one position of each example.

    Args:
        model: a masked or causal language model of transformers.
        inputs: input_ids (B, T), and the other inputs of its forward.
        position: (B,), of the head's input: for a causal model the one before the predicted token.
        words: (L,) tokens.
    """
    linear: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(linear, nn.Linear) or not _is_confirmed(model, linear, inputs, position, words):
        return _from_all_logits(model, inputs, position, words)
    return _from_chosen_rows(model, linear, inputs, position, words)


def _from_chosen_rows(
    model: nn.Module, linear: nn.Linear, inputs: Mapping[str, Tensor], position: Tensor, words: Tensor
) -> Tensor:
    def forward(hidden: Tensor) -> Tensor:
        at = position + (hidden.shape[1] - inputs["input_ids"].shape[1])  # tokens that prompt tuning puts in front
        chosen = _at(hidden, at)  # (B, d)
        return F.linear(chosen, linear.weight[words], None if linear.bias is None else linear.bias[words])

    with replaced_forward(linear, forward):
        found: Tensor = model(**inputs, **_options(model)).logits
    return found


def _from_all_logits(model: nn.Module, inputs: Mapping[str, Tensor], position: Tensor, words: Tensor) -> Tensor:
    logits = model(**inputs, **_options(model)).logits  # (B, T, V)
    at = position + (logits.shape[1] - inputs["input_ids"].shape[1])
    return _at(logits, at)[:, words]


def _at(values: Tensor, position: Tensor) -> Tensor:
    """(B, d): the values (B, T, d) at one position of each example."""
    # unlike values[arange, position], gather keeps the examples apart without reading a tensor's values
    return values.gather(1, position[:, None, None].expand(-1, 1, values.shape[2])).squeeze(1)


def _is_confirmed(
    model: nn.Module, linear: nn.Linear, inputs: Mapping[str, Tensor], position: Tensor, words: Tensor
) -> bool:
    """Whether both ways give the same logits for the first example; assumed without values, as for fake tensors."""
    if not len(position) or not has_values(position):
        return True
    if not has_passed(model, "label words") and not has_passed(model, "label words from all logits"):
        one = {key: value[:1] for key, value in inputs.items()}
        with trial(model):
            expected = _from_all_logits(model, one, position[:1], words)
            try:
                found = _from_chosen_rows(model, linear, one, position[:1], words)
            except (RuntimeError, IndexError, ValueError, TypeError):
                found = expected[:0]
        same = _close(found, expected)
        note_passed(model, "label words" if same else "label words from all logits")
        return same
    return has_passed(model, "label words")


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    low = torch.is_autocast_enabled(found.device.type) or found.dtype not in TOLERANCE
    tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE[found.dtype]
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30))


def _options(model: nn.Module) -> dict[str, Any]:
    """Without a cache, which training does not read."""
    takes_cache = "use_cache" in inspect.signature(type(base_of(model)).forward).parameters
    return {"use_cache": False} if takes_cache else {}
