"""Examples as tokens, and batches of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

IGNORED = -100  # the label that transformers ignores


class Tokens(NamedTuple):
    """One row of a batch: the numbers of its tokens, and a label for each."""

    ids: list[int]
    labels: list[int]
    """The token itself where it is a target, and IGNORED elsewhere."""


Example = list[Tokens]
"""The rows of one example: one, or the chunks of a long text."""


def in_batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in batches of `size`; the last one may be smaller."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def collate(examples: Sequence[Example], *, pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (B, T) each, padded on the right; (0, 1) for no examples.

    If an example has several rows, the shape is (B, K, T); the mask of a row that an example lacks is zero everywhere.
    """
    rows = max((len(example) for example in examples), default=1)
    length = max((len(row.ids) for example in examples for row in example), default=1)
    ids = torch.full((len(examples), rows, length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for b, example in enumerate(examples):
        for k, row in enumerate(example):
            count = len(row.ids)
            ids[b, k, :count] = torch.tensor(row.ids)
            mask[b, k, :count] = 1
            labels[b, k, :count] = torch.tensor(row.labels)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found if rows > 1 else {key: value.squeeze(1) for key, value in found.items()}


def prompts(tokens: Sequence[list[int]], *, pad: int, right: bool = False) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, T) each, padded on the left, or on the `right`, for generation."""
    longest = max(map(len, tokens))
    ids, mask = [], []
    for each in tokens:
        missing = longest - len(each)
        ids.append([*each, *[pad] * missing] if right else [*[pad] * missing, *each])
        mask.append([1] * len(each) + [0] * missing if right else [0] * missing + [1] * len(each))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
