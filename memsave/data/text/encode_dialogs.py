"""Dialogs as tokens. Only the assistant's replies, each with the end of its turn, are targets.

A tokenizer with a chat template writes a dialog in its own format: the context of reply i is the rendering of the
messages before it with `add_generation_prompt=True`, and the reply is what the rendering with the reply adds. For other
tokenizers the plain format is

    persona <end> user: utterance <end> assistant: reply <end> user: ...

A dialog that is longer than a row has several rows. Each row is a shorter dialog in the same format: the system
messages at its start, the most recent turns that fit, and the replies that no earlier row has as targets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from memsave.data.errors import DataError
from memsave.data.text.collate import IGNORED, Example, Tokens, token_ids
from memsave.data.text.messages import Dialog, Message

PLAIN = {"system": "{content}", "user": "user: {content}", "assistant": "assistant: {content}"}
"""The plain format of a message, before its end token."""


class Piece(NamedTuple):
    """A part of a dialog."""

    ids: list[int]
    reply: int | None = None
    """The position of the message whose reply these tokens are; None for context."""


class PlainFormat:
    """The format without a chat template: each message ends with the end token."""

    name = "plain"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @property
    def ends(self) -> list[int]:
        """The tokens that end a reply."""
        return [self.tokenizer.eos_token_id]

    def pieces(self, messages: Sequence[Message], *, where: str = "") -> list[Piece]:
        """The tokens of the messages."""
        found = []
        for position, (role, content) in enumerate(messages):
            if role == "assistant":
                found += [
                    Piece(self._opening()),
                    Piece([*token_ids(f" {content}", self.tokenizer), *self.ends], position),
                ]
            else:
                text = PLAIN[role].replace("{content}", content)
                found.append(Piece([*token_ids(text, self.tokenizer), *self.ends]))
        return found

    def prompt(self, messages: Sequence[Message], *, where: str = "") -> list[int]:
        """The tokens of the messages and of the start of a reply."""
        return [*_joined(self.pieces(messages)), *self._opening()]

    def _opening(self) -> list[int]:
        return token_ids(PLAIN["assistant"].removesuffix(" {content}"), self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """The entries for `prompt.json`."""
        end = self.tokenizer.eos_token
        opening = PLAIN["assistant"].removesuffix(" {content}")
        return {**{role: text + end for role, text in PLAIN.items()}, "reply_start": opening}


class TemplateFormat:
    """The chat template of the tokenizer."""

    name = "chat_template"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def ends(self) -> list[int]:
        """The end token, and the special tokens with which the template ends a reply."""
        end = self.tokenizer.eos_token_id
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        messages = [Message("user", "Hi"), Message("assistant", "Hi")]
        context, whole = (
            self._render(messages[:1], where="A dialog", prompt=True),
            self._render(messages, where="A dialog"),
        )
        ids = token_ids(whole.removeprefix(context), self.tokenizer)
        return [end, *sorted((special & set(ids)) - {end})]

    def pieces(self, messages: Sequence[Message], *, where: str = "The dialog") -> list[Piece]:
        """The tokens of the messages up to the last reply. Raises DataError if the template cannot write them."""
        found, text = [], ""
        for position, message in enumerate(messages):
            if message.role != "assistant":
                continue
            context = self._render(messages[:position], where=where, prompt=True)
            whole = self._render(messages[: position + 1], where=where)
            if not (context.startswith(text) and whole.startswith(context)):
                raise DataError(
                    f"{where} is written differently by the tokenizer's chat template when a turn is added to it: give "
                    f"task.template=plain."
                )
            found.append(Piece(token_ids(context[len(text) :], self.tokenizer)))
            found += self._reply(token_ids(whole[len(context) :], self.tokenizer), position)
            text = whole
        return found

    def prompt(self, messages: Sequence[Message], *, where: str = "The dialog") -> list[int]:
        """The tokens of the messages and of the start of a reply, in the pieces of training."""
        known = self.pieces(messages, where=where)
        replies = [position for position, message in enumerate(messages) if message.role == "assistant"]
        text = self._render(messages[: replies[-1] + 1], where=where) if replies else ""
        rest = self._render(messages, where=where, prompt=True)[len(text) :]
        return [*_joined(known), *token_ids(rest, self.tokenizer)]

    def _reply(self, ids: list[int], position: int) -> list[Piece]:
        """The tokens up to the last end token are the reply; those after it, such as a line break, are context."""
        end = max((i + 1 for i, each in enumerate(ids) if each in self.ends), default=len(ids))
        return [Piece(ids[:end], position), *([Piece(ids[end:])] if ids[end:] else [])]

    def _render(self, messages: Sequence[Message], *, where: str, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        written = [message._asdict() for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=prompt))
        except TemplateError as error:
            raise DataError(
                f"{where} cannot be written by the tokenizer's chat template ({error}): give task.template=plain, or "
                f"change its roles."
            ) from error

    def describe(self) -> dict[str, Any]:
        """The entries for `prompt.json`."""
        return {"add_generation_prompt": True}


Format = PlainFormat | TemplateFormat


def format_of(tokenizer: Any, *, template: str = "auto") -> Format:
    """The format of a tokenizer: that of its chat template, if it has one and `template` is not plain."""
    if template == "plain" or not getattr(tokenizer, "chat_template", None):
        return PlainFormat(tokenizer)
    return TemplateFormat(tokenizer)


@dataclass
class DialogCounts:
    """Counts of dialogs, and of what does not fit into their rows."""

    examples: int = 0
    replies: int = 0
    targets: int = 0
    """Target tokens."""
    split_examples: int = 0
    """Dialogs with several rows."""
    most_rows: int = 0
    cut_examples: int = 0
    """Dialogs that lose target tokens or replies."""
    cut_replies: int = 0
    """Replies that are longer than a row."""
    cut_tokens: int = 0
    """The target tokens that they lose."""
    omitted_replies: int = 0
    """Replies beyond the largest number of rows."""

    def describe(self, *, max_length: int, max_rows: int | None) -> str:
        """The counts in words."""
        found = f"{self.replies} replies with {self.targets} target tokens"
        if self.split_examples:
            found += f", {self.split_examples} dialogs in up to {self.most_rows} rows"
        else:
            found += ", each dialog in one row"
        found += f" of {max_length} tokens (data.max_length)"
        if self.cut_replies:
            found += f"; {self.cut_replies} replies are cut, which drops {self.cut_tokens} tokens"
        if self.omitted_replies:
            found += f"; {self.omitted_replies} replies beyond {max_rows} rows (data.max_rows) are left out"
        return found


def encode_dialogs(
    dialogs: Iterable[Dialog], form: Format, *, max_length: int, max_rows: int | None = None
) -> tuple[list[Example], DialogCounts]:
    """The rows of each dialog, of at most `max_length` tokens, and the counts. Raises DataError."""
    found, counts = [], DialogCounts()
    for dialog in dialogs:
        rows = _Rows(dialog, form, max_length=max_length)
        example = rows.encode(max_rows)
        found.append(example)
        counts.examples += 1
        counts.replies += len(rows.replies)
        counts.targets += sum(label != IGNORED for row in example for label in row.labels)
        counts.split_examples += len(example) > 1
        counts.most_rows = max(counts.most_rows, len(example))
        counts.cut_examples += bool(rows.cut_replies or rows.omitted)
        counts.cut_replies += rows.cut_replies
        counts.cut_tokens += rows.cut_tokens
        counts.omitted_replies += rows.omitted
    return found, counts


def encode_context(messages: Sequence[Message], form: Format, *, limit: int, where: str = "The dialog") -> list[int]:
    """The tokens before a reply to these messages: the system messages at the start and the last turns that fit.

    If even the last turn does not fit into `limit` tokens, its last tokens remain.
    """
    head, turns = _without_head(messages)
    ids: list[int] = []
    for first in _starts(turns) or [0]:
        ids = form.prompt([*head, *turns[first:]], where=where)
        if len(ids) <= limit:
            return ids
    return ids[-limit:]


class _Rows:
    """The rows of one dialog; positions count from the first turn after the system messages."""

    def __init__(self, dialog: Dialog, form: Format, *, max_length: int):
        self.head, self.turns = _without_head(dialog.messages)
        self.form, self.max_length, self.where = form, max_length, dialog.where
        self.replies = [position for position, message in enumerate(self.turns) if message.role == "assistant"]
        self.cut_replies = self.cut_tokens = self.omitted = 0

    def encode(self, max_rows: int | None) -> Example:
        """All rows, or the first `max_rows`."""
        whole = self._row(0, self.replies[-1], since=0)
        if len(whole.ids) <= self.max_length:
            return [whole]
        rows: Example = []
        done = 0  # replies that a row has as targets
        while done < len(self.replies) and len(rows) != max_rows:
            row, count = self._next(done)
            rows.append(row)
            done += count
        self.omitted = len(self.replies) - done
        return rows

    def _next(self, done: int) -> tuple[Tokens, int]:
        """(the row with the next reply and those after it that fit, their number).

        The turns before the next reply take at most half of the row, unless the row has space left at the end.
        """
        reply = self.replies[done]
        starts = [start for start in _starts(self.turns) if start <= reply]
        if not self._fits(starts[-1], reply):
            return self._cut(self._row(starts[-1], reply, since=reply)), 1
        half = self.max_length // 2
        first = next((start for start in starts if self._context(start, reply) <= half), starts[-1])
        first = first if self._fits(first, reply) else starts[-1]
        last = reply
        for later in self.replies[done + 1 :]:
            if not self._fits(first, later):
                break
            last = later
        first = next(start for start in starts if self._fits(start, last))
        return self._row(first, last, since=reply), self.replies.index(last) + 1 - done

    def _row(self, first: int, last: int, *, since: int) -> Tokens:
        """The turns from `first` to `last`; replies from `since` are targets."""
        ids: list[int] = []
        labels: list[int] = []
        messages = [*self.head, *self.turns[first : last + 1]]
        for piece in self.form.pieces(messages, where=self.where):
            is_target = piece.reply is not None and piece.reply - len(self.head) + first >= since
            ids += piece.ids
            labels += piece.ids if is_target else [IGNORED] * len(piece.ids)
        while labels and labels[-1] == IGNORED:  # a template's line break after the last reply
            ids.pop()
            labels.pop()
        return Tokens(ids, labels)

    def _fits(self, first: int, last: int) -> bool:
        return len(self._row(first, last, since=last).ids) <= self.max_length

    def _context(self, first: int, reply: int) -> int:
        return len(self.form.prompt([*self.head, *self.turns[first:reply]], where=self.where))

    def _cut(self, row: Tokens) -> Tokens:
        """The first tokens of the reply and the last ones before it; at least one, because the first is no target."""
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        kept = max(1, self.max_length - (len(row.ids) - start))
        end = start - kept + self.max_length
        self.cut_replies += end < len(row.ids)
        self.cut_tokens += max(0, len(row.ids) - end)
        return Tokens(row.ids[start - kept : end], row.labels[start - kept : end])


def _without_head(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """(the system messages at the start, the turns after them)."""
    count = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    return list(messages[:count]), list(messages[count:])


def _starts(turns: Sequence[Message]) -> list[int]:
    """The positions at which a shorter dialog can start: all but those of replies."""
    return [i for i, message in enumerate(turns) if i == 0 or message.role != "assistant"]


def _joined(pieces: Iterable[Piece]) -> list[int]:
    return [each for piece in pieces for each in piece.ids]
