"""Constraints of fields: errors for invalid values, and the page of all keys."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from memsave.config import ConfigError, option
from memsave.config.fields import check_fields
from memsave.config.schema import Config, MemoryConfig, Section, TrainerConfig
from tests.support.commands import run_command

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@dataclass
class Inner(Section):
    rate: float = option(0.5, least=0, most=1)


@dataclass
class Outer(Section):
    colour: str = option("red", choices=("red", "green"))
    sizes: list[int] = option([1, 2, 3], least=1, length=3)
    budget: str | None = option(None, size=True, choices=("auto",))
    passes: Any = option("auto", choices=("auto", 1, 2))
    lowest: float = option(0.0, most=5)
    free: float = 0.0
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "gren"}, r"^colour is 'gren'; choose one of red, green \(did you mean green\?\)$"),
        ({"sizes": [1, 2]}, r"^sizes is \[1, 2\]; give three numbers, as in sizes=\[1,2,3\]$"),
        ({"sizes": [1, 0, 2]}, r"^sizes is 0; it must be at least 1$"),
        ({"budget": "much"}, r"^budget: 'much' is no size"),
        ({"inner.rate": 1.5}, r"^inner\.rate is 1\.5; it must be at least 0 and at most 1$"),
        ({"inner.rate": float("nan")}, r"^inner\.rate is nan"),
        ({"passes": None}, r"^passes is None; choose one of auto, 1, 2$"),
        ({"passes": []}, r"^passes is \[\]; choose one of auto, 1, 2$"),
        ({"passes": [1]}, r"^passes is \[1\]; choose one of auto, 1, 2"),
        ({"passes": "1"}, r"^passes is '1'; choose one of auto, 1, 2"),
        ({"lowest": 6.0}, r"^lowest is 6\.0; it must be at most 5$"),
        ({"free": float("nan")}, r"^free is nan; it must be a number$"),
    ],
)
def test_an_error_names_the_key_of_an_invalid_value(changes, words):
    with pytest.raises(ConfigError, match=words):
        Outer().changed(changes)


@pytest.mark.parametrize("changes", [{"budget": "auto"}, {"budget": "16GiB"}, {"budget": None}, {"sizes": [1, 1, 1]}])
def test_a_valid_value_is_accepted(changes):
    check_fields(Outer().changed(changes))


def test_a_frozen_config_can_only_be_copied_with_changes():
    config = Outer().freeze()
    with pytest.raises(AttributeError, match="immutable"):
        config.inner.rate = 1.0
    other = config.changed({"inner.rate": 1.0, "sizes": [4, 5, 6]})
    assert (config.inner.rate, other.inner.rate, other.sizes) == (0.5, 1.0, [4, 5, 6])
    with pytest.raises(AttributeError, match="immutable"):
        other.colour = "green"
    with pytest.raises(AttributeError, match=r"inner\.speed is not a key"):
        config.changed({"inner.speed": 1})


def test_defaults_are_not_shared_between_instances():
    Outer().sizes.append(9)
    assert Outer().sizes == [1, 2, 3]


def test_every_default_satisfies_its_constraint():
    for schema in (TrainerConfig, MemoryConfig):
        check_fields(schema(**({"mode": "stored"} if schema is MemoryConfig else {})))
    assert Config.__dataclass_fields__["budget"].default is None


def test_the_page_of_all_keys_is_up_to_date(tmp_path):
    done = run_command(tmp_path, module="memsave.config")
    assert done.stdout == PAGE.read_text(), "run: python -m memsave.config > docs/configuration.md"
