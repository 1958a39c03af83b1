"""Records as tokens of an encoder-decoder: the prompt for the encoder, the completion as targets of the decoder.

Both have the special tokens of the model's tokenizer, and end with its end token.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memsave.data.text.collate import IGNORED, Example, Tokens
from memsave.data.text.encode import Cuts
from memsave.data.text.records import Record


def encode_pairs(records: Iterable[Record], tokenizer: Any, *, max_length: int) -> tuple[list[Example], Cuts]:
    """The tokens of each record, prompt and completion cut to `max_length` each, and the counts of cut tokens.

    The labels of a row are the targets of the decoder, and not those of its ids.
    """
    found, cuts = [], Cuts()
    for record in records:
        inputs, targets = input_tokens(record.prompt, tokenizer), target_tokens(record.completion, tokenizer)
        kept, target = cut_input(inputs, max_length=max_length), targets[:max_length]
        lost = len(inputs) + len(targets) - len(kept) - len(target)
        cuts.examples += 1
        cuts.cut_examples += lost > 0
        cuts.cut_tokens += lost
        found.append([Tokens(kept, target)])
    return found, cuts


def input_tokens(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt for the encoder."""
    return _ended(tokenizer(prompt).input_ids, tokenizer)


def target_tokens(completion: str, tokenizer: Any) -> list[int]:
    """The tokens of a completion for the decoder."""
    return _ended(tokenizer(text_target=completion).input_ids, tokenizer)


def cut_input(tokens: list[int], *, max_length: int) -> list[int]:
    """At most `max_length` tokens; the last one, which ends the prompt, stays."""
    return tokens if len(tokens) <= max_length else [*tokens[: max_length - 1], tokens[-1]]


def _ended(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """The tokens with the end token as the last one."""
    end = tokenizer.eos_token_id
    return list(tokens) if tokens and tokens[-1] == end else [*tokens, end]


def collate_pairs(examples: Sequence[Example], *, pad: int) -> dict[str, Tensor]:
    """`input_ids` and `encoder_mask`, (B, S) each, and `labels` (B, T), padded on the right; (0, 1) for no examples."""
    rows = [row for (row,) in examples]
    ids = torch.full((len(rows), max((len(row.ids) for row in rows), default=1)), pad)
    labels = torch.full((len(rows), max((len(row.labels) for row in rows), default=1)), IGNORED)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        mask[b, : len(row.ids)] = 1
        labels[b, : len(row.labels)] = torch.tensor(row.labels)
    return {"input_ids": ids, "encoder_mask": mask, "labels": labels}


def pair_format(tokenizer: Any, *, max_length: int, beams: int) -> dict[str, Any]:
    """The prompt format of an encoder-decoder: `prompt.json` in its folder.

    The tokenizer's own special tokens are added to the prompt, which is cut before its last token.
    """
    return {
        "task": "generation",
        "model": "encoder_decoder",
        "prompt": "{prompt}",
        "completion": "{completion}",
        "separator": None,
        "add_special_tokens": True,
        "max_prompt_tokens": max_length,
        "generate": {
            "max_new_tokens": max_length,
            "num_beams": beams,
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    }
