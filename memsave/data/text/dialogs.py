"""Dialogs from files: `data=personachat`, the text format of Persona-Chat, and `data=chat`, JSON lines with messages.

Persona-Chat (Zhang et al. 2018, arXiv:1801.07243) numbers its lines, from 1 in each dialog. A dialog starts with the
persona of the speaker that a model imitates. A line then holds an utterance of the partner, a tab, and the reply:

    1 your persona: i have two dogs.
    2 hi ! how are you ?	i am walking my dogs .

Two more tabs and candidates for the reply may follow; they are ignored, like lines with the partner's persona. A chat
file holds one object per line, `{"messages": [{"role": "user", "content": "Hi"}, ...]}`, as for hosted models.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memsave.config import ConfigError, option, register
from memsave.data.errors import DataError, made
from memsave.data.text.collate import IGNORED
from memsave.data.text.config import TextData
from memsave.data.text.encode_dialogs import encode_dialogs, format_of
from memsave.data.text.facts import WHOLE, Facts, Lengths
from memsave.data.text.messages import ROLES, Dialog, Message
from memsave.data.text.splits import OwnFiles, split_files
from memsave.data.text.tables import Row, check_encoding, read_rows, read_text, whole_text
from memsave.data.units import UnitKeys

OWN, PARTNER, SILENCE = "your persona:", "partner's persona:", "__SILENCE__"
NUMBERED = re.compile(r"(\d+) (.*)", re.DOTALL)


@dataclass
class DialogData(TextData):
    """A source of dialogs."""

    max_length: int = option(256, least=8)
    """Tokens of a row; a longer dialog has several rows, each with the turns before it as far as they fit."""
    max_rows: int | None = option(None, least=1)
    """Largest number of rows of a dialog; later replies are left out, and counted. null keeps all; a plan needs one."""

    def splits(self) -> tuple[list[Dialog], list[Dialog]]:
        """(training, held-out) dialogs. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no dialogs")

    def facts(self, examples: Sequence[Dialog]) -> list[Facts]:
        """The turns, without a persona or other instructions."""
        found = []
        for each in examples:
            turns = [message for message in each.messages if message.role != "system"]
            text = "\n".join(f"{message.role}: {message.content}" for message in turns)
            found.append(Facts(text, turns=len(turns)))
        return found

    def lengths(self, examples: Sequence[Dialog], tokenizer: Any, *, is_pair: bool = False) -> Lengths:
        """The tokens of whole dialogs, by the chat template of the tokenizer if it has one.

        Only replies are cut: those that are longer than a row, and those beyond `max_rows`.
        """
        form = format_of(tokenizer)
        whole, _ = encode_dialogs(examples, form, max_length=WHOLE)
        tokens = [len(row.ids) for (row,) in whole]
        targets = [len(row.labels) - row.labels.count(IGNORED) for (row,) in whole]
        long = [number for number, count in enumerate(tokens) if count > self.max_length]
        limits: dict[str, Any] = {"max_length": self.max_length, "max_rows": self.max_rows}
        _, counts = encode_dialogs([examples[number] for number in long], form, **limits)
        cut = sum(targets[number] for number in long) - counts.targets
        return Lengths(tokens, sum(targets), counts.cut_examples, cut)


@dataclass
class DialogFiles(OwnFiles, DialogData):
    """Dialogs in files. A subclass reads one file."""

    suffix: ClassVar[str]
    root: str | None = None
    """A file, or a folder with the files train and test, validation, valid or dev."""

    def validate(self) -> None:
        """Raise ConfigError without a file or folder, and for an unknown encoding."""
        if not self.root:
            name = f"/my/train{self.suffix}"
            raise ConfigError(f"data.root is not given; name the file or folder of the dialogs, as in data.root={name}")
        check_encoding(self.encoding)

    @abstractmethod
    def read(self, path: Path) -> list[Dialog]:
        """The dialogs of one file, in its order. Raises DataError for an invalid line."""

    def splits(self) -> tuple[list[Dialog], list[Dialog]]:
        """(training, held-out) dialogs."""
        training, held_out = split_files(str(self.root), held_out=self.held_out, suffixes=(self.suffix,))
        return self.divided(training, held_out, self._read, key=lambda each: repr(each.messages))

    def _read(self, path: Path) -> list[Dialog]:
        dialogs = self.read(path)
        if not dialogs:
            raise DataError(f"{path} holds no dialog: write it again.")
        return dialogs


@register("data", "personachat")
@dataclass
class PersonaChatData(DialogFiles):
    """Dialogs in the text format of Persona-Chat."""

    suffix: ClassVar[str] = ".txt"
    kind: str = "personachat"

    def read(self, path: Path) -> list[Dialog]:
        """See `read_personachat`."""
        return read_personachat(path, encoding=self.encoding)


@register("data", "chat")
@dataclass
class ChatData(UnitKeys, DialogFiles):
    """Dialogs as JSON lines with messages."""

    suffix: ClassVar[str] = ".jsonl"
    kind: str = "chat"

    def read(self, path: Path) -> list[Dialog]:
        """See `read_chat`."""
        return read_chat(path, encoding=self.encoding, unit=self.unit)


def read_personachat(path: str | Path, *, encoding: str = "utf-8") -> list[Dialog]:
    """The dialogs of a file in the format of Persona-Chat. The persona is a system message, a line per sentence."""
    text = read_text(Path(path), encoding=encoding)
    groups: list[list[tuple[int, str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            if line.startswith("1 ") or not groups:
                groups.append([])
            groups[-1].append((number, line.rstrip("\r")))
    return list(made(groups, lambda lines: _dialog(lines, path=path)))


def _dialog(lines: Sequence[tuple[int, str]], *, path: str | Path) -> Dialog:
    """The dialog in its (number of the line, line)."""
    persona: list[str] = []
    turns: list[Message] = []
    start = f"{path}, line {lines[0][0]},"
    for expected, (number, line) in enumerate(lines, 1):
        where = f"{path}, line {number},"
        match = NUMBERED.fullmatch(line)
        if match is None or int(match[1]) != expected:
            found = "starts with no number and space" if match is None else f"has the number {match[1]}"
            raise DataError(f"{where} {found}, but {expected} is next: number the lines of each dialog from 1.")
        text = match[2]
        if text.startswith((OWN, PARTNER)):
            sentence = text.partition(":")[2].strip()
            if not sentence:
                raise DataError(f"{where} has an empty persona: fill it in or delete the line.")
            persona += [sentence] if text.startswith(OWN) else []
        else:
            turns += _exchange(text, where=where)
    if not turns:
        raise DataError(f"{start} starts a dialog without a reply: add its turns or delete it.")
    system = [Message("system", "\n".join(persona))] if persona else []
    return Dialog((*system, *turns), start)


def _exchange(text: str, *, where: str) -> list[Message]:
    """The partner's utterance, unless it is silent, and the reply."""
    utterance, tab, rest = text.partition("\t")
    if not tab:
        raise DataError(f"{where} has no tab: write the partner's utterance, a tab and the reply.")
    contents = utterance.strip(), rest.partition("\t")[0].strip()
    for name, content in zip(("utterance of the partner", "reply"), contents):
        if not content:
            raise DataError(f"{where} has an empty {name}: fill it in or delete the dialog.")
    messages = [Message("user", contents[0]), Message("assistant", contents[1])]
    return messages[1:] if contents[0] == SILENCE else messages


def read_chat(path: str | Path, *, encoding: str = "utf-8", unit: str | None = None) -> list[Dialog]:
    """The dialogs of a JSON-lines file with messages. `unit`: as data.unit, a key beside the messages."""
    rows = read_rows(path, encoding=encoding)
    return list(made(rows, lambda row: Dialog(parse_messages(row), row.where, row.unit(unit))))


def parse_messages(row: Row, *, with_reply: bool = True) -> tuple[Message, ...]:
    """The list in the column `messages`, with a reply unless `with_reply` is false. Raises DataError."""
    where, listed = row.where, row.values.get("messages")
    if not isinstance(listed, list):
        raise DataError(f'{where} has no list of messages: write {{"messages": [...]}}.')
    messages = []
    for position, each in enumerate(listed, 1):
        role, content = (each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None)
        if role not in ROLES:
            given = f"the role {role!r} in message {position}"
            raise DataError(f"{where} has {given}: give system, user or assistant.")
        if not isinstance(content, str):
            given = f"a content of type {type(content).__name__} in message {position}"
            raise DataError(f"{where} has {given}: give a text.")
        if not content.strip():
            raise DataError(f"{where} has an empty content in message {position}: fill it in or delete the message.")
        messages.append(Message(role, whole_text(content, where=where)))
    if with_reply and not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant: add its reply or delete the line.")
    return tuple(messages)
