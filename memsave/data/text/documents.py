"""`data=documents`: whole texts. One document is one example, whatever its length, and shares a row with no other.

A document is cut into chunks of at most L tokens, each a row of the same example. A chunk starts with the last token of
the chunk before it, the first with the token that begins every text, or the end token; the last target is the end:

    <eos> t1 t2 t3 | t3 t4 t5 t6 | t6 t7 <eos>         L = 4; every token after the first of its chunk is a target
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memsave.config import ConfigError, option, register
from memsave.data.errors import DataError, made
from memsave.data.text.collate import IGNORED, Example, Tokens, token_ids
from memsave.data.text.config import WritingData
from memsave.data.text.encode import start_ids
from memsave.data.text.facts import Facts, Lengths, lengths_of
from memsave.data.text.splits import OwnFiles, split_files
from memsave.data.text.tables import SUFFIXES, Row, check_encoding, read_rows, read_text
from memsave.data.units import UnitKeys


@dataclass(frozen=True)
class Document:
    """A text, and the file or line that holds it."""

    text: str
    place: str
    unit: str | None = field(default=None, compare=False, repr=False)
    """The person whom the document is about, by data.unit; None without it."""


@register("data", "documents")
@dataclass
class DocumentsData(UnitKeys, OwnFiles, WritingData):
    """Whole texts: a folder of .txt files, or a CSV, TSV or JSONL file with a column of texts."""

    kind: str = "documents"
    text: str = "text"
    """Column of the texts, if root is a table."""
    max_chunks: int | None = option(None, least=1)
    """Chunks of max_length tokens of a document; later ones are cut and counted. null keeps the whole document."""

    def validate(self) -> None:
        """Raise ConfigError without a file or folder, and for an unknown encoding."""
        if not self.root:
            raise ConfigError("data.root is not given; name the file or folder of the texts, as in data.root=/my/texts")
        check_encoding(self.encoding)

    def splits(self) -> tuple[list[Document], list[Document]]:
        """(training, held out) documents. Raises DataError."""
        root = Path(str(self.root)).expanduser()
        training, held_out = root, None if self.held_out is None else Path(self.held_out).expanduser()
        if root.is_dir() and not text_files(root):
            training, held_out = split_files(root, held_out=self.held_out, suffixes=SUFFIXES)
        return self.divided(training, held_out, self._read, key=lambda each: each.text)

    def facts(self, examples: Sequence[Document]) -> list[Facts]:
        """The texts."""
        return [Facts(each.text) for each in examples]

    def lengths(self, examples: Sequence[Document], tokenizer: Any, *, is_pair: bool = False) -> Lengths:
        """The tokens of whole documents; `max_chunks` cuts them."""

        def encode(part: Sequence[Document], max_length: int) -> tuple[list[Example], ChunkCuts]:
            return encode_documents(part, tokenizer, max_length=max_length, max_chunks=self.max_chunks)

        return lengths_of(examples, encode, max_length=self.max_length)

    def _read(self, path: Path) -> list[Document]:
        if path.is_dir() or path.suffix.lower() == ".txt":
            files = text_files(path)
            if self.unit is not None:
                raise DataError(
                    f"{path} has .txt files, in which data.unit={self.unit} can name no column: give a table with a "
                    f"column of texts, or data.unit=null."
                )
            if not files:
                raise DataError(f"{path} holds no .txt file: give a folder of .txt files, or a table of texts.")
            return list(made(files, lambda each: _document(read_text(each, encoding=self.encoding), f"{each}")))
        return list(made(read_rows(path, encoding=self.encoding), self._of_row))

    def _of_row(self, row: Row) -> Document:
        unit = row.unit(self.unit)
        return _document(row.text(self.text, key="data.text"), row.where.removesuffix(","), unit=unit)


def _document(text: str, place: str, *, unit: str | None = None) -> Document:
    if not text.strip():
        raise DataError(f"{place} is empty: delete it, or give it a text.")
    return Document(text, place, unit)


def text_files(path: Path) -> list[Path]:
    """The file itself, or the .txt files of a folder and its subfolders in the order of their names.

    Hidden files are left out.
    """
    if not path.is_dir():
        return [path]
    return sorted(
        each
        for each in path.rglob("*")
        if each.suffix.lower() == ".txt"
        and each.is_file()
        and not any(part.startswith(".") for part in each.relative_to(path).parts)
    )


@dataclass
class ChunkCuts:
    """Counts of documents, chunks and cut tokens."""

    examples: int = 0
    chunks: int = 0
    longest: int = 0
    """Chunks of the longest document, after the cut."""
    tokens: int = 0
    """Targets, after the cut."""
    cut_examples: int = 0
    cut_tokens: int = 0

    def describe(self, *, max_length: int) -> str:
        """The counts in words."""
        found = (
            f"{self.chunks} chunks of at most {max_length} tokens (data.max_length), the longest document has "
            f"{self.longest}"
        )
        if not self.cut_examples:
            return f"{found}, none cut"
        return f"{found}, {self.cut_examples} cut to that (data.max_chunks), which drops {self.cut_tokens} tokens"

    def as_dict(self) -> dict[str, int]:
        """For `result.json`."""
        return asdict(self)


def encode_documents(
    documents: Iterable[Document], tokenizer: Any, *, max_length: int, max_chunks: int | None = None
) -> tuple[list[Example], ChunkCuts]:
    """The chunks of each document, and the counts."""
    found, cuts = [], ChunkCuts()
    for document in documents:
        tokens = [*token_ids(document.text, tokenizer), tokenizer.eos_token_id]
        start = document_start(tokenizer)
        rows = chunks(tokens, start=start, max_length=max_length)
        kept = rows if max_chunks is None else rows[:max_chunks]
        count = sum(len(row.ids) - 1 for row in kept)
        cuts.examples += 1
        cuts.chunks += len(kept)
        cuts.longest = max(cuts.longest, len(kept))
        cuts.tokens += count
        cuts.cut_examples += len(kept) < len(rows)
        cuts.cut_tokens += len(tokens) - count
        found.append(kept)
    return found, cuts


def document_start(tokenizer: Any) -> int:
    """The token before a document: the one that begins every text, or else the end token."""
    return int((start_ids(tokenizer) or [tokenizer.eos_token_id])[0])


def chunks(tokens: Sequence[int], *, start: int, max_length: int) -> Example:
    """Rows of at most `max_length` tokens that predict each of `tokens` once; `start` comes before the first one."""
    step, rows = max_length - 1, []
    for first in range(0, len(tokens), step):
        before = tokens[first - 1] if first else start
        part = list(tokens[first : first + step])
        rows.append(Tokens([before, *part], [IGNORED, *part]))
    return rows
