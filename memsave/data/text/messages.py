"""Dialogs as messages with roles."""

from dataclasses import dataclass, field
from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn, or instructions to the assistant such as a persona."""

    role: str
    """One of ROLES; the assistant is the speaker that the model imitates."""
    content: str


@dataclass(frozen=True)
class Dialog:
    """One dialog with at least one message of the assistant."""

    messages: tuple[Message, ...]
    where: str = field(default="The dialog", compare=False, repr=False)
    """Its place in a file, for error messages."""
    unit: str | None = field(default=None, compare=False, repr=False)
    """The person whom the dialog is about, by data.unit; None without it."""
