"""Tables of texts: the rows of CSV, TSV and JSONL files, with their line numbers.

    .csv      a header, then fields separated by commas; fields with commas, quotes or line breaks in double quotes
    .tsv      a header, then fields separated by tabs; double quotes have no meaning
    .jsonl    one JSON object per line

No row is skipped: a row that cannot be read raises DataError, which names its line (inside
`memsave.data.errors.collecting_faults`, the row is left out and its fault kept).
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsave.config.errors import ConfigError
from memsave.config.fields import closest
from memsave.data.errors import DataError, faults_so_far, made, report
from memsave.files import parse_json

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl")
ENCODING = "data.encoding"


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    values: dict[str, Any]
    """The value of each column: a string, or any JSON value."""
    path: Path
    line: int
    """Number of its first line in the file; the first line is 1."""

    @property
    def is_plain(self) -> bool:
        """Whether the row is a line of a .txt file."""
        return self.path.suffix.lower() == ".txt"

    @property
    def where(self) -> str:
        """The place of the row, for error messages."""
        return f"{self.path}, line {self.line},"

    def text(self, column: str, *, key: str | None = None) -> str:
        """The text in a column, without blanks around it; a missing JSON value (null) is empty. Raises DataError.

        `key`: the config key that names the column, for the message.
        """
        if column not in self.values:
            holder = self.where if self.path.suffix.lower() == ".jsonl" else self.path
            raise DataError(
                f"{holder} has no column {column}{'' if key is None else f', which {key} names'}: its columns are "
                f"{', '.join(self.values) or 'none'}{closest(column, self.values)}."
            )
        value = self.values[column]
        if isinstance(value, str):
            return whole_text(value, where=self.where)
        if isinstance(value, (list, dict)):
            kind = "a list" if isinstance(value, list) else "an object"
            raise DataError(f"{self.where} has {kind} in the column {column}: give a text or a number.")
        return "" if value is None else json.dumps(value)

    def unit(self, column: str | None) -> str | None:
        """The person, from the column that data.unit names; None without one. Raises DataError if it is empty."""
        if column is None:
            return None
        found = self.text(column, key="data.unit")
        if not found:
            raise DataError(
                f"{self.where} has an empty {column}, which data.unit names: fill it in or delete the line."
            )
        return found


def whole_text(text: str, *, where: str) -> str:
    """The text without blanks around it. Raises DataError for half of a character, which JSON can write."""
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise DataError(f"{where} has half of a character (\\ud800 to \\udfff): write the text as UTF-8.")
    return text.strip()


def read_rows(path: str | Path, *, encoding: str = "utf-8", key: str = ENCODING, plain: str | None = None) -> list[Row]:
    """All rows of a file in its order; the suffix decides the format. Raises DataError, also for a file without rows.

    `key`: that of the encoding, for messages. `plain`: also read .txt files; each line is a row with this column.
    """
    path = Path(path).expanduser()
    suffix, suffixes = path.suffix.lower(), SUFFIXES if plain is None else (".txt", *SUFFIXES)
    if suffix not in suffixes:
        raise DataError(f"{path} is no table: give a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}.")
    text, before = read_text(path, encoding=encoding, key=key), faults_so_far()
    if suffix == ".txt" and plain is not None:
        rows = [Row({plain: line}, path, number) for number, line in enumerate(_lines(text), 1)]
    else:
        rows = list(_objects(path, text) if suffix == ".jsonl" else _fields(path, text, delimiter=DELIMITERS[suffix]))
    if not rows and faults_so_far() == before:
        raise DataError(f"{path} has no rows: give a file with at least one.")
    return rows


def read_text(path: Path, *, encoding: str = "utf-8", key: str = ENCODING) -> str:
    """The text of a file, without a byte order mark. Raises DataError, which names the line that cannot be decoded.

    `key`: that of the encoding, for the message.
    """
    if not path.is_file():
        raise DataError(f"The file {path} does not exist: check the path.")
    content = path.read_bytes()
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, errors="replace").count("\n") + 1
        other = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1"
        raise DataError(
            f"{path}, line {line}, is not {encoding} (byte {content[error.start]:#04x}): give its encoding, as in "
            f"{key}={other}, or save it as UTF-8."
        ) from error


def check_encoding(encoding: str, *, key: str = ENCODING) -> None:
    """Raise ConfigError for an encoding of text that Python does not know."""
    try:
        "a".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ConfigError(
            f"{key} is {encoding!r}, which is unknown; give utf-8, utf-16 or latin-1, for example"
        ) from error


def _fields(path: Path, text: str, *, delimiter: str) -> Iterator[Row]:
    """The rows of a file with a header."""
    file = io.StringIO(text, newline="")
    if delimiter == ",":
        reader = csv.reader(file, strict=True)
    else:
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    columns: list[str] = []
    empty = 0  # line number of an empty line, which is valid only at the end of the file
    line = 1
    try:
        for fields in reader:
            if empty:
                report(DataError(f"{path}, line {empty}, is empty: delete it."))
                empty = 0
            if not fields:
                empty = line
            elif not columns:
                columns = _columns(path, fields)
            elif len(fields) != len(columns):
                report(DataError(_wrong_count(path, line, len(fields), columns, delimiter=delimiter)))
            else:
                yield Row(dict(zip(columns, fields)), path, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}, cannot be read ({error}): check its double quotes.") from error


def _columns(path: Path, fields: list[str]) -> list[str]:
    """The names in the header: each once, and none empty."""
    columns = [each.strip() for each in fields]
    for number, name in enumerate(columns, 1):
        if not name:
            raise DataError(f"{path} has no name for column {number} in its first line: give it one.")
        if columns.count(name) > 1:
            raise DataError(f"{path} names two columns {name} in its first line: rename one of them.")
    return columns


def _wrong_count(path: Path, line: int, count: int, columns: list[str], *, delimiter: str) -> str:
    separator, remedy = "tab", "check its tabs"
    if delimiter == ",":
        separator, remedy = "comma", "put texts with commas in double quotes"
    fields = "1 field" if count == 1 else f"{count} fields"
    return (
        f"{path}, line {line}, has {fields} separated by a {separator}, and the first line names {len(columns)} "
        f"columns: {remedy}."
    )


def _objects(path: Path, text: str) -> Iterator[Row]:
    """The objects of a JSONL file."""
    lines = enumerate(_lines(text), 1)
    return made(lines, lambda each: Row(_object(each[1], f"{path}, line {each[0]},"), path, each[0]))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = parse_json(line)
    except ValueError as error:
        state = f"not JSON ({error})" if line.strip() else "empty"
        raise DataError(f"{where} is {state}: give one JSON object per line.") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} is a JSON {_json_name(found)}: give one JSON object per line.")
    return found


def _lines(text: str) -> list[str]:
    """The lines of a text, without empty ones at its end."""
    lines = text.split("\n")  # splitlines() would also split at U+2028 within a JSON string
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _json_name(value: object) -> str:
    names: Iterable[tuple[type, str]] = ((bool, "boolean"), (str, "string"), (list, "list"), (type(None), "null"))
    return next((name for kind, name in names if isinstance(value, kind)), "number")
