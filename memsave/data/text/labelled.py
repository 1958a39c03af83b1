"""Labelled sentences and pairs of sentences, from one's own files: `data=labelled`, and GLUE's by their column names.

The files are TSV, CSV or JSONL with one example a line (see `tables.py`). A folder holds train.tsv and a held-out file
beside it; of a single file, a part is held out. GLUE (Wang et al. 2018, arXiv:1804.07461) has TSV files.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from memsave.config import ConfigError, option, register
from memsave.data.errors import DataError, collecting_faults, collection, made, read_each
from memsave.data.text.config import TextData
from memsave.data.text.facts import WHOLE, Facts, Lengths
from memsave.data.text.splits import OwnFiles, hold_out, refuse_shared_units, split_files
from memsave.data.text.tables import SUFFIXES, Row, check_encoding, read_rows
from memsave.data.units import UnitKeys

HELD_OUT = ("dev", "dev_matched", "validation", "validation_matched", "valid", "test")
"""Names of held-out files in the order of search: the labels of a test file are often secret."""
MOST_LABELS = 1000


class _Fields(NamedTuple):
    text: str
    pair: str | None
    label: int


class Labelled(_Fields):
    """One example: a text, for pairs a second text, and the number of its label."""

    unit: str | None = None
    """The person whom the text is about, by data.unit; no part of the tuple. None without data.unit."""


@dataclass
class ClassifiedData(TextData):
    """What every source of labelled texts has in common."""

    infilling_template: ClassVar[str | None] = None
    """The template for task.objective=infilling, if the data set has one of its own."""
    label_words: ClassVar[Mapping[str, str]] = {}
    """The word for each of its labels, by name."""

    max_length: int = option(128, least=8)
    """Tokens of a text with its template; longer texts are cut, and result.json counts them."""

    def label_names(self) -> list[str]:
        """The names of the labels, in the order of their numbers. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} has no labels")

    def splits(self) -> tuple[list[Labelled], list[Labelled]]:
        """(training, held-out) examples. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no examples")

    def facts(self, examples: Sequence[Labelled]) -> list[Facts]:
        """Texts, with the second text of a pair, and the names of the labels."""
        names, found = self.label_names(), []
        for text, pair, number in examples:
            found.append(Facts(text if pair is None else f"{text} / {pair}", names[number], names[number]))
        return found

    def lengths(self, examples: Sequence[Labelled], tokenizer: Any, *, is_pair: bool = False) -> Lengths:
        """The tokens of the texts, without task.template."""
        from memsave.data.text.templates import Template, Text, encode_texts

        texts = [Text(each.text, each.pair) for each in examples]
        tokens = [len(each.ids) for each in encode_texts(texts, tokenizer, Template(None, WHOLE))[0]]
        beyond = [count - self.max_length for count in tokens if count > self.max_length]
        return Lengths(tokens, sum(tokens), len(beyond), sum(beyond))

    @property
    def has_pairs(self) -> bool:
        """Whether an example has two texts."""
        return False

    @property
    def skipped(self) -> int:
        """The number of lines that were left out."""
        return 0


@register("data", "labelled")
@dataclass
class LabelledData(UnitKeys, OwnFiles, ClassifiedData):
    """Labelled sentences or pairs in one's own TSV, CSV or JSONL files."""

    kind: str = "labelled"
    text: str = "text"
    """Column of the text."""
    pair: str | None = None
    """Column of the second text of a pair; null for single texts."""
    label: str = "label"
    """Column of the label."""
    labels: list[str] | None = None
    """The labels in the order of their numbers; null means those of the training file, sorted."""
    skip_invalid: bool = False
    """Leave lines with missing or empty fields out and count them, instead of an error."""

    def validate(self) -> None:
        """Raise ConfigError without a file, or with fewer than two labels."""
        check_encoding(self.encoding)
        if not self.root:
            raise ConfigError("data.root is not given; name the file or folder of the texts, as in data.root=/my/texts")
        if self.labels is not None and len(set(self.labels)) != max(2, len(self.labels)):
            raise ConfigError(f"data.labels is {self.labels}; give at least two different labels")

    @property
    def has_pairs(self) -> bool:
        """Whether an example has two texts."""
        return self.pair is not None

    @property
    def skipped(self) -> int:
        """The number of lines of the training and held-out files that were left out."""
        return self._read()[3]

    def label_names(self) -> list[str]:
        """`labels`, or the labels of the training file: as numbers if all are whole numbers, otherwise by name."""
        return list(self._read()[0])

    def splits(self) -> tuple[list[Labelled], list[Labelled]]:
        """(training, held out) examples of the files."""
        _, train, held_out, _ = self._read()
        return list(train), copy(held_out)

    def _read(self) -> "_Read":
        train, held_out = split_files(str(self.root), held_out=self.held_out, suffixes=SUFFIXES, names=HELD_OUT)
        files = tuple((path, _changed(path)) for path in (train, held_out) if path is not None)
        names = None if self.labels is None else tuple(self.labels)
        columns = _Columns(self.text, self.pair, self.label, names, self.encoding, self.skip_invalid, self.unit)
        return _read(files, columns, self.held_out_fraction, self.seed, collection())


@register("data", "sst2")
@dataclass
class SST2Data(LabelledData):
    """GLUE's SST-2: sentences of film reviews with the labels 0, negative, and 1, positive."""

    infilling_template = "{text} It was {mask}."  # the templates and words of Gao et al. (2021)
    label_words: ClassVar = {"0": "terrible", "1": "great"}
    kind: str = "sst2"
    text: str = "sentence"


@register("data", "qnli")
@dataclass
class QNLIData(LabelledData):
    """GLUE's QNLI: whether a sentence holds the answer to a question."""

    infilling_template = "{text}? {mask}, {pair}"
    label_words: ClassVar = {"entailment": "Yes", "not_entailment": "No"}
    kind: str = "qnli"
    text: str = "question"
    pair: str | None = "sentence"


@register("data", "qqp")
@dataclass
class QQPData(LabelledData):
    """GLUE's QQP: whether two questions have the same meaning; some of its lines are broken, and are skipped."""

    infilling_template = "{text} {mask}, {pair}"
    label_words: ClassVar = {"0": "No", "1": "Yes"}
    kind: str = "qqp"
    text: str = "question1"
    pair: str | None = "question2"
    label: str = "is_duplicate"
    skip_invalid: bool = True


@register("data", "mnli")
@dataclass
class MNLIData(LabelledData):
    """GLUE's MNLI: whether the first sentence entails or contradicts the second one; held out is dev_matched."""

    infilling_template = "{text}? {mask}, {pair}"
    label_words: ClassVar = {"contradiction": "No", "entailment": "Yes", "neutral": "Maybe"}
    kind: str = "mnli"
    text: str = "sentence1"
    pair: str | None = "sentence2"
    label: str = "gold_label"


class _Columns(NamedTuple):
    """The keys of the config that decide how a line is read."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...] | None
    encoding: str
    skip_invalid: bool
    unit: str | None


_Read = tuple[tuple[str, ...], list[Labelled], list[Labelled], int]
"""(names of the labels, training examples, held-out examples, number of skipped lines)."""


@lru_cache(maxsize=2)
def _read(
    files: tuple[tuple[Path, int], ...], columns: _Columns, fraction: float, seed: int, _collection: int
) -> _Read:
    """The content of the files, each with its time of change, so that a changed file is read again.

    Inside `collecting_faults`, invalid lines are left out: `_collection` keeps such content from other calls.
    """
    read = read_each([path for path, _ in files], lambda path: [_rows(path, columns)])
    found = [each[0] if each else ([], 0) for each in read]
    skipped, train = sum(count for _, count in found), files[0][0]
    names = columns.labels or _label_names([label for *_, label in found[0][0]], path=train, columns=columns)
    examples = [_numbered(rows, names) for rows, _ in found]
    if len(files) == 1:
        examples = list(
            hold_out(examples[0], key=lambda each: repr(each[:2]), fraction=fraction, seed=seed, source=train)
        )
    else:
        refuse_shared_units(*examples, held_out=files[1][0])
    return names, examples[0], examples[1], skipped


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


_Line = tuple[Row, str | None, str, str | None, str]
"""(the row, its unit, text, second text, label)."""


def _rows(path: Path, columns: _Columns) -> tuple[list[_Line], int]:
    """(the lines of a file, the number of skipped ones)."""
    skipping: AbstractContextManager[list[DataError]] = collecting_faults() if columns.skip_invalid else nullcontext([])
    with skipping as faults:
        found = list(made(read_rows(path, encoding=columns.encoding), lambda row: _line(row, columns)))
    if not found and faults:
        raise DataError(f"{path} has no valid line, as in: {faults[0]}")
    return found, len(faults)


def _line(row: Row, columns: _Columns) -> _Line:
    pair = columns.pair and _filled(row, columns.pair, "data.pair")
    text, label = (_filled(row, getattr(columns, key), f"data.{key}") for key in ("text", "label"))
    return row, row.unit(columns.unit), text, pair, label


def _filled(row: Row, column: str, key: str) -> str:
    """The text in a column. Raises DataError if there is no such column, or if it is empty."""
    if column not in row.values:
        try:
            row.text(column)
        except DataError as error:
            raise DataError(f"{str(error).removesuffix('.')}; choose one by {key}=.") from error
    text = row.text(column)
    if not text:
        raise DataError(f"{row.where} has an empty {column}: fill it in or delete the line.")
    return text


def _label_names(labels: list[str], *, path: Path, columns: _Columns) -> tuple[str, ...]:
    different = set(labels)
    if not different:
        raise DataError(f"{path} has no example that can be used: correct its lines.")
    if len(different) < 2:
        raise DataError(
            f"{path} has the single label {next(iter(different))!r} in the column {columns.label}: "
            "give examples of at least two labels, or all labels by data.labels=[...]."
        )
    if len(different) > MOST_LABELS:
        raise DataError(
            f"The column {columns.label} of {path} has {len(different)} different labels, and the limit is "
            f"{MOST_LABELS}: name the column of the labels by data.label=."
        )
    numbers = all(each.isdecimal() for each in different)
    return tuple(sorted(different, key=lambda name: (int(name), name) if numbers else name))


def _numbered(rows: list[_Line], names: tuple[str, ...]) -> list[Labelled]:
    """The examples with the numbers of their labels. Raises DataError for a label without a number."""
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(names)}

    def numbered(line: _Line) -> Labelled:
        row, unit, text, pair, label = line
        if label not in numbers:
            known = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            raise DataError(
                f"{row.where} has the label {label!r}, which is not one of {known}: "
                "correct it, or name all labels by data.labels=[...]."
            )
        found = Labelled(text, pair, numbers[label])
        found.unit = unit
        return found

    return list(made(rows, numbered))
