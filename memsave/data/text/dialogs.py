"""Dialogs from files: `data=personachat`, the text format of Persona-Chat, and `data=chat`, JSON lines with messages.

Persona-Chat (Zhang et al. 2018, arXiv:1801.07243) numbers its lines, from 1 in each dialog. A dialog starts with the
persona of the speaker that a model imitates. A line then holds an utterance of the partner, a tab, and the reply:

    1 your persona: i have two dogs.
    2 hi ! how are you ?	i am walking my dogs .

Two more tabs and candidates for the reply may follow; they are ignored, like lines with the partner's persona. A chat
file holds one object per line, `{"messages": [{"role": "user", "content": "Hi"}, ...]}`, as for hosted models.
"""

import json
import random
import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from memsave.config import ConfigError, option, register
from memsave.data.errors import DataError
from memsave.data.text.config import TextData

ROLES = ("system", "user", "assistant")
OWN, PARTNER, SILENCE = "your persona:", "partner's persona:", "__SILENCE__"
NUMBERED = re.compile(r"(\d+) (.*)", re.DOTALL)


class Message(NamedTuple):
    """One turn, or instructions to the assistant such as a persona."""

    role: str
    """One of ROLES; the assistant is the speaker that the model imitates."""
    content: str


@dataclass(frozen=True)
class Dialog:
    """One dialog with at least one message of the assistant."""

    messages: tuple[Message, ...]
    where: str = field(default="the dialog", compare=False)
    """Its place in a file, for error messages."""


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


@dataclass
class DialogFiles(DialogData):
    """Dialogs in files. A subclass reads one file."""

    suffix: ClassVar[str]
    root: str | None = None
    """A file, or a folder with the files train and test (or valid)."""
    held_out_file: str | None = None
    """File with the held-out dialogs; null takes test or valid in the folder, or held_out_fraction of the dialogs."""
    held_out_fraction: float = option(0.1, least=0.0001, most=0.9)
    """Part of the dialogs that is held out, drawn at random, if there is no held-out file."""

    def validate(self) -> None:
        """Raise ConfigError without a file or folder."""
        if not self.root:
            name = f"/my/train{self.suffix}"
            raise ConfigError(f"data.root is not given; name the file or folder of the dialogs, as in data.root={name}")

    @abstractmethod
    def read(self, path: Path) -> list[Dialog]:
        """The dialogs of one file, in its order. Raises DataError for an invalid line."""

    def splits(self) -> tuple[list[Dialog], list[Dialog]]:
        """(training, held-out) dialogs: of two files, or of one file in a fixed random order."""
        root = Path(str(self.root)).expanduser()
        if not root.exists():
            raise DataError(f"The data.root {root} does not exist: give a {self.suffix} file or a folder of them.")
        training = root
        held_out = None if self.held_out_file is None else Path(self.held_out_file).expanduser()
        if root.is_dir():
            found = self._only(root, "train")
            if found is None:
                raise DataError(f"{root} holds no train{self.suffix}: put it there, or give data.root=FILE.")
            training, held_out = found, held_out or self._only(root, "test") or self._only(root, "valid")
        dialogs = self._read(training)
        if held_out is not None:
            return dialogs, self._read(held_out)
        count = max(1, round(len(dialogs) * self.held_out_fraction))
        if count >= len(dialogs):
            raise DataError(
                f"{training} holds {len(dialogs)} dialogs, of which {count} are held out "
                f"(data.held_out_fraction={self.held_out_fraction}): add dialogs, or give data.held_out_file."
            )
        random.Random(0).shuffle(dialogs)
        return dialogs[count:], dialogs[:count]

    def _read(self, path: Path) -> list[Dialog]:
        if not path.is_file():
            raise DataError(f"The file {path} does not exist: give a {self.suffix} file with dialogs.")
        dialogs = self.read(path)
        if not dialogs:
            raise DataError(f"{path} holds no dialog: write it again.")
        return dialogs

    def _only(self, folder: Path, name: str) -> Path | None:
        """The file `name`, or the only one whose name starts with it; None if there is none."""
        if (exact := folder / f"{name}{self.suffix}").is_file():
            return exact
        found = sorted(folder.glob(f"{name}*{self.suffix}"))
        if len(found) > 1:
            names = ", ".join(each.name for each in found)
            raise DataError(f"{folder} holds {names}: give data.root=FILE and data.held_out_file=FILE.")
        return found[0] if found else None


@register("data", "personachat")
@dataclass
class PersonaChatData(DialogFiles):
    """Dialogs in the text format of Persona-Chat."""

    suffix: ClassVar[str] = ".txt"
    kind: str = "personachat"

    def read(self, path: Path) -> list[Dialog]:
        """See `read_personachat`."""
        return read_personachat(path)


@register("data", "chat")
@dataclass
class ChatData(DialogFiles):
    """Dialogs as JSON lines with messages."""

    suffix: ClassVar[str] = ".jsonl"
    kind: str = "chat"

    def read(self, path: Path) -> list[Dialog]:
        """See `read_chat`."""
        return read_chat(path)


def read_personachat(path: str | Path) -> list[Dialog]:
    """The dialogs of a file in the format of Persona-Chat. The persona is a system message, a line per sentence."""
    dialogs: list[Dialog] = []
    persona: list[str] = []
    turns: list[Message] = []
    start = last = 0

    def finish() -> None:
        if last == 0:
            return
        where = f"{path}, line {start},"
        if not turns:
            raise DataError(f"{where} starts a dialog without a reply: add its turns or delete it.")
        system = [Message("system", "\n".join(persona))] if persona else []
        dialogs.append(Dialog((*system, *turns), where))

    for number, line in _lines(Path(path)):
        where = f"{path}, line {number},"
        match = NUMBERED.fullmatch(line)
        if match is None:
            raise DataError(
                f"{where} does not start with a number and a space: number the lines of each dialog from 1."
            )
        position, text = int(match[1]), match[2]
        if position == 1:
            finish()
            persona, turns, start, last = [], [], number, 0
        if position != last + 1:
            raise DataError(f"{where} has the number {position} after {last}: number the lines of each dialog from 1.")
        last = position
        if text.startswith((OWN, PARTNER)):
            sentence = text.partition(":")[2].strip()
            if not sentence:
                raise DataError(f"{where} has an empty persona: fill it in or delete the line.")
            persona += [sentence] if text.startswith(OWN) else []
        else:
            turns += _exchange(text, where=where)
    finish()
    return dialogs


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


def read_chat(path: str | Path) -> list[Dialog]:
    """The dialogs of a JSON-lines file with messages."""
    dialogs = []
    for number, line in _lines(Path(path)):
        where = f"{path}, line {number},"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}): write one object per line.") from error
        dialogs.append(Dialog(parse_messages(found, where=where), where))
    return dialogs


def parse_messages(found: Any, *, where: str) -> tuple[Message, ...]:
    """The messages of a parsed object `{"messages": [...]}`, with a reply among them. Raises DataError."""
    listed = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise DataError(f'{where} has no list of messages: write {{"messages": [...]}}.')
    messages = []
    for position, each in enumerate(listed, 1):
        role, content = (each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None)
        if role not in ROLES:
            raise DataError(
                f"{where} has the role {role!r} in message {position}: give {', '.join(ROLES[:2])} or {ROLES[2]}."
            )
        if not isinstance(content, str):
            raise DataError(
                f"{where} has a content of type {type(content).__name__} in message {position}: give a text."
            )
        if not content.strip():
            raise DataError(f"{where} has an empty content in message {position}: fill it in or delete the message.")
        messages.append(Message(role, content.strip()))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant: add its reply or delete the line.")
    return tuple(messages)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a file that are not blank, without line ends. Raises DataError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                byte = f"{line[error.start]:#04x}"
                raise DataError(f"{path}, line {number}, is not UTF-8 (byte {byte}): save it as UTF-8.") from error
            if text.strip():
                yield number, text
