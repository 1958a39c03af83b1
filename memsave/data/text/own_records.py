"""`data=records`: one's own prompts and completions, by templates over the columns of a table.

    data.prompt='{name} is'  data.completion='{text}'

A field in braces is the name of a column; {{ and }} are literal braces.
"""

from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from memsave.config import ConfigError, register
from memsave.data.errors import DataError, made
from memsave.data.text.config import RecordsData
from memsave.data.text.records import Record
from memsave.data.text.splits import OwnFiles, split_files
from memsave.data.text.tables import SUFFIXES, Row, check_encoding, read_rows
from memsave.data.units import UnitKeys


@register("data", "records")
@dataclass
class OwnRecordsData(UnitKeys, OwnFiles, RecordsData):
    """A CSV, TSV or JSONL file of one's own, or a folder with train.* and test.*, validation.* or dev.*."""

    kind: str = "records"
    prompt: str = "{prompt}"
    """Template of the prompt over the columns, such as {name} is."""
    completion: str = "{completion}"
    """Template of the completion over the columns."""
    separator: str | None = " "
    """Text between prompt and completion, such as a space; null is the end token. Encoder-decoders use none."""

    def validate(self) -> None:
        """Raise ConfigError without a file, for a template that is not valid, and for an unknown encoding."""
        if not self.root:
            raise ConfigError("data.root is not given; name the file of the records, as in data.root=/my/records.csv")
        check_encoding(self.encoding)
        Template(self.prompt, key="data.prompt")
        if not Template(self.completion, key="data.completion").columns:
            raise ConfigError(
                f"data.completion is {self.completion!r}, which names no column; give one, as in "
                f"data.completion='{{text}}'"
            )

    def splits(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records."""
        training, held_out = split_files(str(self.root), held_out=self.held_out, suffixes=SUFFIXES)
        return self.divided(training, held_out, self._read, key=lambda each: each.prompt)

    def _read(self, path: Path) -> list[Record]:
        prompt = Template(self.prompt, key="data.prompt")
        completion = Template(self.completion, key="data.completion")
        rows = read_rows(path, encoding=self.encoding)
        return list(made(rows, lambda row: Record(prompt.fill(row), completion.fill(row), row.unit(self.unit))))


class Template:
    """A text with columns in braces; raises ConfigError, which names the key, if it cannot be read."""

    def __init__(self, text: str, *, key: str):
        self.key = key
        try:
            self.parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{key} is {text!r}, which is no template ({error}); write a literal brace twice, as in {{{{"
            ) from error
        for _, name, form, conversion in self.parts:
            if name == "":
                raise ConfigError(f"{key} is {text!r}; give the name of a column in each pair of braces")
            if form or conversion:
                raise ConfigError(
                    f"{key} is {text!r}; give the name of a column alone in braces, without a format after : or !"
                )
        self.columns = [name for _, name, _, _ in self.parts if name is not None]

    def fill(self, row: Row) -> str:
        """The text for a row. Raises DataError for a column that does not exist, and if all columns are empty."""
        values = ["" if name is None else row.text(name, key=self.key) for _, name, _, _ in self.parts]
        found = "".join(before + value for (before, *_), value in zip(self.parts, values, strict=True))
        if not (any(values) if self.columns else found.strip()):
            columns = f"fill in {' or '.join(self.columns)}" if self.columns else f"change {self.key}"
            raise DataError(f"{row.where} gives an empty {self.key}: {columns}, or delete the line.")
        return found
