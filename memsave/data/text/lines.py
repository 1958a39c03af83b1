"""Lines of a table of texts with their numbers: TSV, CSV or JSONL, as UTF-8."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memsave.config.fields import closest
from memsave.data.errors import DataError

SUFFIXES = (".tsv", ".csv", ".jsonl")
Numbered = tuple[int, Mapping[str, Any]]
"""(number of the line, values by column)."""


def read_lines(path: Path, *, columns: Mapping[str, str], quotes: bool | None = None) -> Iterator[Numbered]:
    """The lines of a file that have values; the column None holds fields beyond the header.

    Args:
        path: the file; its suffix names the format.
        columns: the columns that must exist, by the config key that names each.
        quotes: whether double quotes enclose fields; None means in CSV files alone.

    Raises DataError, which names the number of the line.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise DataError(f"{path} has the suffix {path.suffix!r}: give a file that ends in {', '.join(SUFFIXES)}.")
    text = _decoded(path)
    if not text.strip():
        raise DataError(f"{path} is empty: give a file with examples.")
    if kind == ".jsonl":
        yield from _json_lines(text, path=path, columns=columns)
        return
    rows = _quoted(text, path, kind) if (kind == ".csv" if quotes is None else quotes) else _plain(text, kind)
    _, header = next(rows)
    for key, name in columns.items():
        if name not in header:
            raise DataError(_no_column(path, key, name, header))
    for number, values in rows:
        row: dict[Any, Any] = dict(zip(header, values))
        if len(values) > len(header):
            row[None] = values[len(header) :]
        yield number, row


def column(row: Mapping[Any, Any], name: str, *, where: str) -> str:
    """The text of a column. Raises DataError if it is missing or empty, or if the line has too many fields."""
    if None in row:
        raise DataError(f"{where} has more fields than the header: put texts with separators in double quotes.")
    value = row.get(name)
    if value is None:
        raise DataError(f"{where} has no field {name}: add it or delete the line.")
    found = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not found.strip():
        raise DataError(f"{where} has an empty {name}: fill it in or delete the line.")
    return found.strip()


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}, is not UTF-8 ({content[error.start]:#04x}): save it as UTF-8."
        ) from error


def _plain(text: str, kind: str) -> Iterator[tuple[int, list[str]]]:
    separator = "\t" if kind == ".tsv" else ","
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r").split(separator)


def _quoted(text: str, path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True)
    start = 1
    try:
        for values in reader:
            if any(value.strip() for value in values):
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}, is not valid ({error}): close its double quotes, or give data.quotes=false."
        ) from error


def _json_lines(text: str, *, path: Path, columns: Mapping[str, str]) -> Iterator[Numbered]:
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is not JSON ({error}): write one object a line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, is no JSON object: write one object a line.")
        for key, name in columns.items() if first else ():
            if name not in row:
                raise DataError(_no_column(path, key, name, list(row)))
        first = False
        yield number, row


def _no_column(path: Path, key: str, name: str, header: list[str]) -> str:
    return f"{path} has no column {name}{closest(name, header)}: give {key}= one of {', '.join(header)}."
