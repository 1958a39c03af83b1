"""The config keys of units: examples that hold several records, such as all records of one person.

    data.unit=person data.records_per_unit=8        an example is a person; a step takes at most 8 of the records

The reader of a source stores the unit of each record. `memsave.training.units` makes one example of all records of a
unit, for every task.
"""

from dataclasses import dataclass

from memsave.config import ConfigError, option


@dataclass
class UnitKeys:
    """The keys of a source whose records can belong to units."""

    unit: str | None = None
    """Column that names the person; all records of a person are one example. null: each record is an example."""
    unit_loss: str = option("mean", choices=("mean", "sum"))
    """The loss of a unit, from the losses of its records in the step."""
    records_per_unit: int | None = option(None, least=1)
    """Records of a unit in one step; of a larger unit, each step draws other ones. null takes all. A plan needs it."""

    def check_units(self) -> None:
        """Raise ConfigError for an empty unit, and for keys that are only for units."""
        if self.unit is not None and not self.unit.strip():
            raise ConfigError("data.unit is empty; give the name of a column, or data.unit=null")
        cap, loss = self.records_per_unit is not None, self.unit_loss != "mean"
        if self.unit is None and (cap or loss):
            key = "data.records_per_unit" if cap else "data.unit_loss"
            raise ConfigError(f"{key} is for data.unit; name the column of the persons, as in data.unit=person")

    def describe_unit(self) -> str:
        """What privacy protects, for the statement of a run."""
        return f"one person: all records with the same value of {self.unit}"


def unit_key(data: object) -> str | None:
    """The value of data.unit; None if the records of the data config are its examples."""
    keys = units_of(data)
    return None if keys is None else keys.unit


def identity_of(data: object) -> dict[str, object]:
    """The keys of units that a resumed run must not change."""
    keys = units_of(data)
    return {"data.unit": unit_key(data), **({} if keys is None else {"data.records_per_unit": keys.records_per_unit})}


def units_of(data: object) -> UnitKeys | None:
    """The keys of a data config whose examples are units; None if its records are the examples."""
    return data if isinstance(data, UnitKeys) and data.unit is not None else None
