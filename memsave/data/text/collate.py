"""Tables and sentences as tokens: `table <eos> text <eos>`, where only the text is a target."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memsave.data.text.records import Record

IGNORED = -100  # the label that transformers ignores


Tokens = tuple[list[int], list[int]]
"""(tokens of the table and its end token, tokens of the text and its end token)."""


@dataclass
class Cuts:
    """Counts of the examples and tokens that truncation to the maximum length affects."""

    examples: int = 0
    cut_examples: int = 0
    cut_tokens: int = 0
    lost_texts: int = 0
    """Examples whose table fills the maximum length: one token of their text is left as a target."""

    def describe(self, *, max_length: int) -> str:
        """The counts in words."""
        if not self.cut_examples:
            return f"none cut to {max_length} tokens (data.max_length)"
        lost = f"{self.cut_examples} cut to {max_length} tokens (data.max_length), which drops {self.cut_tokens} tokens"
        return lost + (f"; {self.lost_texts} of them keep a single token of their text" if self.lost_texts else "")


def encode(record: Record, tokenizer: Any, *, max_length: int) -> Tokens:
    """Tokens of a record, truncated so that table and text together have at most `max_length` tokens.

    The text is truncated first, then the table; at least one token of the text stays as a target.
    """
    return _cut(_tokens(record, tokenizer), max_length=max_length)


def encode_all(records: Iterable[Record], tokenizer: Any, *, max_length: int) -> tuple[list[Tokens], Cuts]:
    """`encode` of each record, and the counts of truncated tokens."""
    found, cuts = [], Cuts()
    for record in records:
        whole = _tokens(record, tokenizer)
        kept = _cut(whole, max_length=max_length)
        lost = sum(map(len, whole)) - sum(map(len, kept))
        cuts.examples += 1
        cuts.cut_examples += lost > 0
        cuts.cut_tokens += lost
        cuts.lost_texts += len(kept[1]) == 1 < len(whole[1])
        found.append(kept)
    return found, cuts


def _tokens(record: Record, tokenizer: Any) -> Tokens:
    table, text = (tokenizer(part, add_special_tokens=False).input_ids for part in (record.table, record.text))
    return [*table, tokenizer.eos_token_id], [*text, tokenizer.eos_token_id]


def _cut(tokens: Tokens, *, max_length: int) -> Tokens:
    table, text = tokens
    if len(table) > max_length - 1:
        table = [*table[: max_length - 2], table[-1]]
    return table, text[: max_length - len(table)]


def prompt_format(tokenizer: Any, *, max_length: int, beams: int) -> dict[str, Any]:
    """The prompt format of a model trained on the examples of `encode`: the content of `prompt.json` in its folder.

    `prompt`, filled with a table of at most `max_table_tokens` tokens, has the tokens that `encode` gives the table.
    `generate` holds the options of transformers' `generate` that evaluation uses.
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
    """`input_ids`, `attention_mask` and `labels`, (B, T) each, padded on the right; (0, 1) for no examples."""
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
    """`input_ids` and `attention_mask`, (B, T) each, padded on the left, for generation."""
    longest = max(map(len, tables))
    ids = torch.tensor([[pad] * (longest - len(table)) + table for table in tables])
    mask = torch.tensor([[0] * (longest - len(table)) + [1] * len(table) for table in tables])
    return {"input_ids": ids, "attention_mask": mask}
