"""What all sources of text have in common; `data=visits` and `data=e2e`: tables and sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memsave.config import ConfigError, option, register
from memsave.config.schema import DataConfig
from memsave.data.text.facts import Facts, Lengths, lengths_of
from memsave.data.text.records import Record
from memsave.data.text.visits import private_records

HELD_OUT_SEED = 10**6
"""Distance of the seed of held-out records from that of the training records."""


@dataclass
class TextData(DataConfig):
    """What every source of text has in common."""

    root: str | None = None
    """File or folder of the data, for data sets that have files."""
    max_length: int = option(100, least=8)
    """Tokens of a row of the batch; longer examples are cut, and result.json counts them."""

    def splits(self) -> tuple[list[Any], list[Any]]:
        """(training, held-out) examples. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no examples")

    # for `python -m memsave.data.check`

    def facts(self, examples: Sequence[Any]) -> list[Facts]:
        """What a check compares of the examples."""
        return [Facts(repr(each)) for each in examples]

    def lengths(self, examples: Sequence[Any], tokenizer: Any, *, is_pair: bool = False) -> Lengths | None:
        """The tokens of the examples, and how many `max_length` cuts; None if the source cannot tell.

        `is_pair`: the tokenizer is that of an encoder-decoder.
        """
        return None


@dataclass
class WritingData(TextData):
    """A source of texts that the model learns to write: records or documents."""


@dataclass
class RecordsData(WritingData):
    """A source of prompts and completions."""

    separator: str | None = None
    """Text between prompt and completion, such as a space; null is the end token. Encoder-decoders use none."""

    def splits(self) -> tuple[list[Record], list[Record]]:
        """(training, held-out) records. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")

    def facts(self, examples: Sequence[Record]) -> list[Facts]:
        """Prompts and completions."""
        return [Facts(each.prompt, each.completion) for each in examples]

    def lengths(self, examples: Sequence[Record], tokenizer: Any, *, is_pair: bool = False) -> Lengths:
        """The tokens of prompt and completion together, or of the longer one for an encoder-decoder."""
        from memsave.data.text.encode import encode_records
        from memsave.data.text.pairs import encode_pairs

        def encode(part: Sequence[Record], max_length: int) -> tuple[list[Any], Any]:
            if is_pair:
                return encode_pairs(part, tokenizer, max_length=max_length)
            return encode_records(part, tokenizer, max_length=max_length, separator=self.separator)

        return lengths_of(examples, encode, max_length=self.max_length, pairs=is_pair)


@register("data", "visits")
@dataclass
class VisitsData(RecordsData):
    """Generated records of visits to a clinic: the private data of the built-in example."""

    kind: str = "visits"
    records: int = option(6000, least=1)
    """Training records, one per person."""
    held_out: int = option(300, least=1)
    """Held-out records."""
    seed: int = option(0, least=0)
    """Seed of the records."""

    def splits(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records, of different seeds."""
        return (
            private_records(self.records, seed=self.seed),
            private_records(self.held_out, seed=self.seed + HELD_OUT_SEED),
        )


@register("data", "e2e")
@dataclass
class E2EData(RecordsData):
    """The CSV files (mr, ref) of the E2E challenge: descriptions of restaurants."""

    kind: str = "e2e"

    def validate(self) -> None:
        """Raise ConfigError without a folder."""
        if not self.root:
            raise ConfigError("data.root is not given; name the folder of the CSV files, as in data.root=/my/e2e")

    def splits(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records of the files in `root`."""
        from memsave.data.text.e2e import e2e_splits

        return e2e_splits(str(self.root))
