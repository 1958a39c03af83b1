"""Command-line arguments of the form key=value, read into a dataclass by OmegaConf.

Each field of the dataclass is a key. A field without a default (`omegaconf.MISSING`) is required. Its metadata may hold
`expects`, the end of the error message for a value of the wrong type: "give ...".
"""

import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")


class ArgumentError(ValueError):
    """An argument that cannot be used; the message is one sentence."""


def parse_arguments(arguments: Sequence[str], schema: type[T], *, example: str) -> T:
    """The arguments as an instance of the dataclass `schema`; the last value of a key counts.

    Values of `str` fields are kept as typed: YAML would read the folder 007 as the number 7. `example` is an argument
    for error messages. Raises ArgumentError for an argument of another form, an unknown key, a value of the wrong type
    and a missing key.
    """
    schema_fields = {each.name: each for each in fields(cast(Any, schema))}
    options: Any = OmegaConf.structured(schema)
    text: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ArgumentError(f"{argument!r} cannot be read: arguments have the form key=value, as in {example}")
        if key not in schema_fields:
            close = difflib.get_close_matches(key, schema_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ArgumentError(f"{key} is not known: the keys are {', '.join(schema_fields)}{hint}")
        if schema_fields[key].type in (str, str | None):
            text[key] = value
            continue
        try:
            options = OmegaConf.merge(options, OmegaConf.from_dotlist([argument]))
            options[key]  # resolves an interpolation
        except (OmegaConfBaseException, YAMLError) as error:
            raise ArgumentError(f"{key} is {value!r}: give {schema_fields[key].metadata['expects']}") from error
    required = [key for key, each in schema_fields.items() if each.default == MISSING]
    for key in required:
        if key not in text:
            expected = schema_fields[key].metadata.get("expects")
            remedy = f"name a folder, as in {key}=/my/{key}" if expected is None else f"give {expected}"
            raise ArgumentError(f"{key} is not given: {remedy}")
    parsed = OmegaConf.to_object(OmegaConf.merge(options, dict.fromkeys(required, "")))
    return replace(cast(Any, parsed), **text)


def names_in(text: str) -> list[str]:
    """The names of a list such as [t1,t2], with or without brackets."""
    names = (name.strip().strip("'\"") for name in text.strip().removeprefix("[").removesuffix("]").split(","))
    return [name for name in names if name]
