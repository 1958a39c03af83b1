"""What a check of a data set asks about its examples, whatever their kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from memsave.data.text.collate import Example

WHOLE = 10**9
"""A maximum length that cuts nothing."""


@dataclass(frozen=True)
class Facts:
    """One example as text."""

    text: str
    """What the model reads: a prompt, a text with its pair, a document or a dialog."""
    target: str = ""
    """What it learns to give: a completion or a label."""
    label: str | None = None
    """The name of the label, of labelled texts."""
    turns: int | None = None
    """The number of turns, of dialogs."""


@dataclass
class Lengths:
    """The tokens of examples, and how many of them are cut."""

    tokens: list[int] = field(default_factory=list)
    """The length of each example before it is cut; of an encoder-decoder, of the longer side."""
    total: int = 0
    """The tokens of all examples that can be cut, before they are."""
    cut_examples: int = 0
    cut_tokens: int = 0

    def add(self, other: "Lengths") -> None:
        """Count the examples of `other`, too."""
        self.tokens += other.tokens
        self.total += other.total
        self.cut_examples += other.cut_examples
        self.cut_tokens += other.cut_tokens


def lengths_of(
    examples: Sequence[Any],
    encode: Callable[[Sequence[Any], int], tuple[list[Example], Any]],
    *,
    max_length: int,
    pairs: bool = False,
) -> Lengths:
    """The lengths of examples by their own encoder: `encode(examples, max_length)` gives rows and counts of cuts.

    All examples are encoded without a limit, and those that are longer again with it. `pairs`: the labels of a row are
    the tokens of another side, the decoder's, which is cut as well.
    """
    whole, _ = encode(examples, WHOLE)
    rows = [row for (row,) in whole]
    tokens = [max(len(row.ids), len(row.labels)) for row in rows]
    _, cuts = encode([each for each, count in zip(examples, tokens, strict=True) if count > max_length], max_length)
    total = sum(len(row.ids) + (len(row.labels) if pairs else 0) for row in rows)
    return Lengths(tokens, total, cuts.cut_examples, cuts.cut_tokens)
