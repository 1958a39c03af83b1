"""Records for table-to-text generation.

A record is a meaning representation in the form of the E2E challenge (Novikova et al. 2017, arXiv:1706.09254) and a
text that describes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One example: a `table` such as `name[Blue Spice], near[the river]`, and a `text` that describes it."""

    table: str
    text: str


def references(records: Iterable[Record]) -> dict[str, list[str]]:
    """The distinct texts of each table, with tables and texts in the order of their first occurrence."""
    texts: dict[str, dict[str, None]] = {}
    for record in records:
        texts.setdefault(record.table, {})[record.text] = None
    return {table: list(found) for table, found in texts.items()}
