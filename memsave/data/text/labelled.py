"""Labelled sentences and pairs of sentences, from one's own files: `data=labelled`, and GLUE's by their column names.

The files are TSV, CSV or JSONL with one example a line. A folder holds train.tsv and a held-out file beside it; of a
single file, a part is held out. GLUE (Wang et al. 2018, arXiv:1804.07461) writes TSV without quotes: a double quote is
an ordinary character there.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from memsave.config import ConfigError, option, register
from memsave.data.errors import DataError
from memsave.data.text.config import TextData
from memsave.data.text.lines import SUFFIXES, column, read_lines

TRAINING = ("train", "training")
HELD_OUT = ("dev", "dev_matched", "validation", "validation_matched", "valid", "val", "test")
"""Names of files without suffix, in the order in which they are looked for."""
MOST_LABELS = 1000


class Labelled(NamedTuple):
    """One example: a text, for pairs a second text, and the number of its label."""

    text: str
    pair: str | None
    label: int


@dataclass
class ClassifiedData(TextData):
    """What every source of labelled texts has in common."""

    max_length: int = option(128, least=8)
    """Tokens of a text with its template; longer texts are cut, and result.json counts them."""

    def label_names(self) -> list[str]:
        """The names of the labels, in the order of their numbers. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} has no labels")

    def splits(self) -> tuple[list[Labelled], list[Labelled]]:
        """(training, held-out) examples. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no examples")

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
class LabelledData(ClassifiedData):
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
    held_out: str | None = None
    """Held-out file beside the training file, such as test.tsv; null means dev, validation or test in a folder."""
    held_out_fraction: float = option(0.1, least=0.001, most=0.9)
    """Part of the training file that is held out if there is no held-out file."""
    seed: int = option(0, least=0)
    """Seed of the choice of that part."""
    quotes: bool | None = None
    """Whether double quotes enclose fields that hold separators; null means: in CSV files alone."""
    skip_invalid: bool = False
    """Leave lines with missing or empty fields out and count them, instead of an error."""

    def validate(self) -> None:
        """Raise ConfigError without a file, or with fewer than two labels."""
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
        return list(train), list(held_out)

    def _read(self) -> "_Read":
        train, held_out = find_files(str(self.root), held_out=self.held_out)
        files = tuple((path, path.stat().st_mtime_ns) for path in (train, held_out) if path is not None)
        names = None if self.labels is None else tuple(self.labels)
        columns = _Columns(self.text, self.pair, self.label, names, self.quotes, self.skip_invalid)
        return _read(files, columns, self.held_out_fraction, self.seed)


@register("data", "sst2")
@dataclass
class SST2Data(LabelledData):
    """GLUE's SST-2: sentences of film reviews with the labels 0, negative, and 1, positive."""

    kind: str = "sst2"
    text: str = "sentence"


@register("data", "qnli")
@dataclass
class QNLIData(LabelledData):
    """GLUE's QNLI: whether a sentence holds the answer to a question."""

    kind: str = "qnli"
    text: str = "question"
    pair: str | None = "sentence"


@register("data", "qqp")
@dataclass
class QQPData(LabelledData):
    """GLUE's QQP: whether two questions have the same meaning; some of its lines are broken, and are skipped."""

    kind: str = "qqp"
    text: str = "question1"
    pair: str | None = "question2"
    label: str = "is_duplicate"
    skip_invalid: bool = True


@register("data", "mnli")
@dataclass
class MNLIData(LabelledData):
    """GLUE's MNLI: whether the first sentence entails or contradicts the second one; held out is dev_matched."""

    kind: str = "mnli"
    text: str = "sentence1"
    pair: str | None = "sentence2"
    label: str = "gold_label"


def find_files(root: str | Path, *, held_out: str | None = None) -> tuple[Path, Path | None]:
    """(the training file, the held-out file or None). Raises DataError."""
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"The file or folder {root} does not exist: give the texts by data.root=.")
    folder = root if root.is_dir() else root.parent
    train = root if root.is_file() else _first_file(root, TRAINING)
    if train is None:
        names = " or ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise DataError(f"{root} holds no training file: put {names} there, or name a file by data.root=.")
    if held_out is None:
        return train, _first_file(root, HELD_OUT) if root.is_dir() else None
    if not (folder / held_out).is_file():
        raise DataError(f"data.held_out names {folder / held_out}, which does not exist: name a file beside {train}.")
    return train, folder / held_out


def _first_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    paths = (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


class _Columns(NamedTuple):
    """The keys of the config that decide how a line is read."""

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...] | None
    quotes: bool | None
    skip_invalid: bool


_Read = tuple[tuple[str, ...], list[Labelled], list[Labelled], int]
"""(names of the labels, training examples, held-out examples, number of skipped lines)."""


@lru_cache(maxsize=2)
def _read(files: tuple[tuple[Path, int], ...], columns: _Columns, fraction: float, seed: int) -> _Read:
    """The content of the files, each with its time of change, so that a changed file is read again."""
    found = [_named_rows(path, columns) for path, _ in files]
    skipped = sum(count for _, count in found)
    names = columns.labels or _label_names([label for *_, label in found[0][0]], path=files[0][0], columns=columns)
    examples = [_numbered(rows, names, path) for (rows, _), (path, _) in zip(found, files, strict=True)]
    if len(files) == 2:
        return names, examples[0], examples[1], skipped
    order = list(range(len(examples[0])))
    if len(order) < 2:
        raise DataError(f"{files[0][0]} has 1 example: give at least 2, of which one is held out.")
    random.Random(f"held out {seed}").shuffle(order)
    chosen = set(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
    train, held_out = ([each for i, each in enumerate(examples[0]) if (i in chosen) is out] for out in (False, True))
    return names, train, held_out, skipped


_Row = tuple[int, str, str | None, str]
"""(number of the line, text, second text, label)."""


def _named_rows(path: Path, columns: _Columns) -> tuple[list[_Row], int]:
    """(the rows of a file, the number of skipped ones)."""
    rows: list[_Row] = []
    skipped = 0
    keys = {key: name for key, name in columns._asdict().items() if key in ("text", "pair", "label") and name}
    for line, row in read_lines(
        path, columns={f"data.{key}": name for key, name in keys.items()}, quotes=columns.quotes
    ):
        try:
            where = f"{path}, line {line},"
            text, label = column(row, columns.text, where=where), column(row, columns.label, where=where)
            rows.append((line, text, columns.pair and column(row, columns.pair, where=where), label))
        except DataError:
            if not columns.skip_invalid:
                raise
            skipped += 1
    if not rows:
        raise DataError(f"{path} has no examples: give a file with at least one line of data.")
    return rows, skipped


def _label_names(labels: list[str], *, path: Path, columns: _Columns) -> tuple[str, ...]:
    different = set(labels)
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


def _numbered(rows: list[_Row], names: tuple[str, ...], path: Path) -> list[Labelled]:
    """The examples with the numbers of their labels. Raises DataError for a label without a number."""
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(names)}
    found = []
    for line, text, pair, label in rows:
        if label not in numbers:
            known: Any = list(names[:10])
            raise DataError(
                f"{path}, line {line}, has the label {label!r}, which is not one of {', '.join(known)}"
                f"{' ...' if len(names) > 10 else ''}: correct it, or name all labels by data.labels=[...]."
            )
        found.append(Labelled(text, pair, numbers[label]))
    return found
