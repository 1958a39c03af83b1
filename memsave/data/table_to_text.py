"""Tables and sentences as tokens: `table <eos> text <eos>`, in which the text alone is a target."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memsave.data.tables import Record

IGNORED = -100  # what transformers takes for no target


def encode(record: Record, tokenizer: Any, *, max_length: int) -> tuple[list[int], list[int]]:
    """(tokens of the table and its end, tokens of the text and its end), cut to `max_length` together.

    The text is cut first, then the table; at least one token of the text stays a target.
    """
    end = tokenizer.eos_token_id
    table = [*tokenizer(record.table, add_special_tokens=False).input_ids[: max_length - 2], end]
    text = [*tokenizer(record.text, add_special_tokens=False).input_ids, end]
    return table, text[: max_length - len(table)]


def prompt_format(tokenizer: Any, *, max_length: int, beams: int) -> dict[str, Any]:
    """How a model that was trained on `encode`'s examples is prompted: `prompt.json` in its folder.

    `prompt` with a table in it has the tokens that `encode` gives the table, up to `max_table_tokens` and the end, and
    `generate` are the options of transformers' `generate` that evaluations take.
    """
    return {
        "prompt": f"{{table}}{tokenizer.eos_token}",
        "completion": f"{{text}}{tokenizer.eos_token}",
        "example_table": "name[Blue Spice], near[the river]",
        "add_special_tokens": False,
        "max_table_tokens": max_length - 2,
        "generate": {
            "max_length": max_length,
            "num_beams": beams,
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    }


def collate(examples: Sequence[tuple[list[int], list[int]]], *, pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each, padded on the right to the longest; (0, 1) for none."""
    longest = max((len(table) + len(text) for table, text in examples), default=1)
    ids = torch.full((len(examples), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (table, text) in enumerate(examples):
        length = len(table) + len(text)
        ids[row, :length] = torch.tensor([*table, *text])
        mask[row, :length] = 1
        labels[row, len(table) : length] = torch.tensor(text)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prompts(tables: Sequence[list[int]], *, pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, T), padded on the left, for generation."""
    longest = max(map(len, tables))
    ids = torch.tensor([[pad] * (longest - len(table)) + table for table in tables])
    mask = torch.tensor([[0] * (longest - len(table)) + [1] * len(table) for table in tables])
    return {"input_ids": ids, "attention_mask": mask}
