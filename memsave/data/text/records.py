"""Records for text generation: a prompt and its completion.

In the E2E challenge (Novikova et al. 2017, arXiv:1706.09254) a prompt is a table, the meaning representation, and a
completion is a text that describes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One example: a `prompt` such as `name[Blue Spice], near[the river]`, and the `completion` that follows it."""

    prompt: str
    completion: str
    unit: str | None = field(default=None, compare=False, repr=False)
    """The person whom the record is about, by data.unit; None without it."""


def references(records: Iterable[Record]) -> dict[str, list[str]]:
    """The distinct completions of each prompt, with prompts and completions in the order of their first occurrence."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        found.setdefault(record.prompt, {})[record.completion] = None
    return {prompt: list(completions) for prompt, completions in found.items()}
