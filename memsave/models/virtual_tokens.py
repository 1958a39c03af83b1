"""Generation with the virtual tokens of prompt tuning: they stand directly before each prompt of a batch.

PEFT puts the virtual tokens before the padding on the left, and numbers the positions of the padding:

    PEFT      v v v . . a b c        here      . . v v v a b c

so that the text after a short prompt would depend on the longest prompt of its batch, unlike in training.
"""

from typing import Any

import torch
from torch import Tensor

from memsave.models.padding import base_of


def generate(model: Any, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
    """(B, T + N): the prompts (B, T), padded on the left, and the N tokens that the model generates after them.

    Args:
        model: a causal language model of transformers, also with an adapter of PEFT.
        input_ids: (B, T).
        attention_mask: (B, T), zero at padding.
        options: those of transformers' `generate`.
    """
    if not _is_prompt_tuned(model):
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
    virtual: Tensor = model.get_prompt(batch_size=len(input_ids))  # (B, V, d)
    both = torch.cat([virtual, model.word_embeddings(input_ids).to(virtual.dtype)], 1)  # (B, V + T, d)
    count, padding = virtual.shape[1], attention_mask.eq(0).sum(1, keepdim=True)  # (B, 1)
    place = torch.arange(both.shape[1], device=both.device).expand(len(both), -1)  # (B, V + T)
    source = torch.where(place < padding, place + count, torch.where(place < padding + count, place - padding, place))
    embeddings = both.gather(1, source[..., None].expand_as(both))
    mask = (place >= padding).to(attention_mask.dtype)
    base: Any = base_of(model)
    new = base.generate(inputs_embeds=embeddings, attention_mask=mask, **options)  # (B, N)
    return torch.cat([input_ids, new], 1)


def _is_prompt_tuned(model: Any) -> bool:
    """Whether PEFT puts embeddings of virtual tokens before the text; the cache of prefix tuning needs no place."""
    if base_of(model) is model or not model.active_peft_config.is_prompt_learning:
        return False
    return str(model.active_peft_config.peft_type.value) == "PROMPT_TUNING"
