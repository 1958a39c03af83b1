"""Constraints of config keys, kept as metadata of dataclass fields.

    layout: str = option("brats2021", choices=LAYOUTS)
    crop_size: list[int] = option([48, 48, 48], least=1, length=3)

`check_fields` raises ConfigError for the first value that violates its constraint. `constraint_of` returns the
constraint of a field; `python -m memsave.config` prints the table of options from it.
"""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from memsave.config.errors import ConfigError
from memsave.profiler import parse_bytes

CONSTRAINT = "memsave"
"""The key of the constraint in a field's metadata."""
COUNTS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Constraint:
    """The values that a field accepts; for a list, the values of its elements. The field's type decides about None."""

    choices: Collection[Any] | None = None
    least: float = -math.inf
    most: float = math.inf
    length: int | None = None
    """Number of elements of a list."""
    size: bool = False
    """Whether the value is a number of bytes such as 16GiB; the words in `choices` are then valid as well."""
    example: tuple[Any, ...] = ()
    """Elements of a valid list, for the error message."""

    def check(self, key: str, value: Any) -> None:
        """Raise ConfigError if the value of `key` violates the constraint."""
        if value is None:
            return
        several = isinstance(value, (list, tuple))
        if several and self.length is not None and len(value) != self.length:
            count = COUNTS.get(self.length, str(self.length))
            raise ConfigError(f"{key} is {list(value)}; give {count} numbers{self._example(key)}")
        for each in value if several else (value,):
            self.check_one(key, each)

    def check_one(self, key: str, value: Any) -> None:
        """`check` of a value that is neither None nor a list if it is valid."""
        if self.size:
            if value in (self.choices or ()):
                return
            try:
                parse_bytes(value)
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error
        elif self.choices is not None and value not in self.choices:
            names = [str(each) for each in self.choices]
            raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(names)}{closest(str(value), names)}")
        elif isinstance(value, (int, float)) and not self.least <= value <= self.most:
            raise ConfigError(f"{key} is {value}; it must be {' and '.join(self._limits()) or 'a number'}")

    def _example(self, key: str) -> str:
        given = self.example or (1,) * (self.length or 0)
        return f", as in {key}=[{','.join(map(str, given))}]"

    def describe(self) -> str:
        """The constraint in words; empty if every value satisfies it."""
        if self.size:
            return " | ".join(["a size such as 16GiB", *map(str, self.choices or ())])
        if self.choices is not None:
            return " | ".join(map(str, self.choices))
        return ", ".join(self._limits())

    def _limits(self) -> list[str]:
        low = [] if self.least == -math.inf else [f"at least {self.least:g}"]
        return low + ([] if self.most == math.inf else [f"at most {self.most:g}"])


def option(
    default: Any = MISSING,
    *,
    choices: Collection[Any] | None = None,
    least: float = -math.inf,
    most: float = math.inf,
    length: int | None = None,
    size: bool = False,
    example: Iterable[Any] | None = None,
) -> Any:
    """A dataclass field with a constraint; see `Constraint`. Each instance gets its own copy of a default list."""
    elements = tuple(example or (default if isinstance(default, list) else ()))
    constraint = Constraint(choices, least, most, length, size, elements)
    metadata = {CONSTRAINT: constraint}
    if isinstance(default, list):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def constraint_of(found: Field) -> Constraint:
    """The constraint of a field; without one, a constraint that every value satisfies."""
    return found.metadata.get(CONSTRAINT, Constraint())


def sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (prefix of the keys, dataclass) for a config and all configs nested in it, outermost first."""
    yield prefix, config
    for found in fields(config):
        value = getattr(config, found.name)
        if is_dataclass(value):
            yield from sections(value, f"{prefix}{found.name}.")


def check_fields(config: Any) -> None:
    """Raise ConfigError for the first value that violates the constraint of its field, nested configs included."""
    for prefix, section in sections(config):
        for found in fields(section):
            value = getattr(section, found.name)
            constraint = constraint_of(found)
            if found.name == "kind":  # set by the option of the group, as in data=brats
                constraint = Constraint(choices=(type(section).kind,))
            if is_dataclass(value):
                continue
            check = constraint.check_one if found.type is Any else constraint.check  # OmegaConf checks other types
            check(prefix + found.name, value)


def closest(word: str, names: Iterable[str]) -> str:
    """The most similar name as a question in parentheses; empty if none is similar."""
    match = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
