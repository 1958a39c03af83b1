"""`data=visits` and `data=e2e`: tables and sentences."""

from dataclasses import dataclass

from memsave.config import ConfigError, option, register
from memsave.config.schema import DataConfig
from memsave.data.text.records import Record
from memsave.data.text.visits import private_records

HELD_OUT_SEED = 10**6
"""Distance of the seed of held-out records from that of the training records."""


@dataclass
class TextData(DataConfig):
    """What every source of tables and sentences has in common."""

    root: str | None = None
    """Folder of the data files, for data sets that have files."""
    max_length: int = option(100, least=8)
    """Tokens of table and sentence together; longer examples are cut, and result.json counts them."""
    evaluate: int = option(500, least=1)
    """Number of held-out records for the perplexity; the first ones are taken."""
    generate: int = option(64, least=1)
    """Number of held-out tables for which sentences are generated, for BLEU, ROUGE-L and samples.md."""
    beams: int = option(4, least=1)
    """Width of the beam search."""

    def records_by_split(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} reads no records")


@register("data", "visits")
@dataclass
class VisitsData(TextData):
    """Generated records of visits to a clinic: the private data of the built-in example."""

    kind: str = "visits"
    records: int = option(6000, least=1)
    """Training records, one per person."""
    held_out: int = option(300, least=1)
    """Held-out records."""
    seed: int = option(0, least=0)
    """Seed of the records."""

    def records_by_split(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records, of different seeds."""
        return (
            private_records(self.records, seed=self.seed),
            private_records(self.held_out, seed=self.seed + HELD_OUT_SEED),
        )


@register("data", "e2e")
@dataclass
class E2EData(TextData):
    """The CSV files (mr, ref) of the E2E challenge: descriptions of restaurants."""

    kind: str = "e2e"

    def validate(self) -> None:
        """Raise ConfigError without a folder."""
        if not self.root:
            raise ConfigError("data.root is not given; name the folder of the CSV files, as in data.root=/my/e2e")

    def records_by_split(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records of the files in `root`."""
        from memsave.data.text.e2e import e2e_splits

        return e2e_splits(str(self.root))
