"""Overrides as text: quoting of `key=value` for the shell, and errors for values that Hydra would misread.

In Hydra's grammar commas, brackets, `=`, `#` and other characters have a meaning; a value in double quotes is literal.
The shell needs another pair of quotes around them: 'data.root="/my/a,b (c)"'.
"""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from memsave.config.errors import ConfigError

TEXTS = (
    "data.root", "data.split_file", "data.mask", "model.name", "model.cache", "trainer.resume", "hydra.run.dir",
    "hydra.sweep.dir",
)  # fmt: skip
"""Keys whose values are paths and names that the user chose."""
LISTS = ("data.modalities",)
"""Keys whose values are lists of such names."""
TEMPLATES = ("data.prompt", "data.completion", "task.template")
"""Keys whose values are templates such as {name} is; they are read as they are written, without quotes for Hydra."""


def override(key: str, value: object) -> str:
    """`key=value`, quoted for the shell and for Hydra. The value is a string or a list of strings."""
    written = f"[{','.join(map(_written, value))}]" if isinstance(value, (list, tuple)) else _written(value)
    return shlex.quote(f"{key}={written}")


OPTIONAL = ("task.template",)
"""Templates that may be null."""


def literal(text: str) -> str:
    """The override with a template quoted for Hydra; any other override, or one that is quoted already, unchanged."""
    key, _, value = text.partition("=")
    key_alone = key.lstrip("+")
    if key_alone not in TEMPLATES or not value or (key_alone in OPTIONAL and value == "null"):
        return text
    if value[0] in "'\"":
        try:
            if isinstance(OverridesParser.create().parse_override(text).value(), str):
                return text
        except (HydraException, ValueError):
            pass  # the quotes belong to the template
    return f"{key}={_written(value)}"


def parse(text: str, *, after: str | None = None) -> Override:
    """Parse an override by Hydra. Raises ConfigError if Hydra cannot parse it or reads another value than was written.

    `after` is the preceding argument: an unquoted path with a space arrives as two arguments.
    """
    key, equals, value = text.partition("=")
    try:
        found = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{text!r} cannot be read; {_remedy(text, after=after)}") from error
    if _is_one_of(TEXTS, key) and equals and not found.is_sweep_override():
        read = found.value()
        if read is not None and not value.startswith(("'", '"')) and str(read) != value:
            raise ConfigError(f"{text!r} would be read as {str(read)!r}; quote the value, as in {override(key, value)}")
    return found


def several(text: str) -> str:
    """The message for an override with several values when there is one job."""
    key, _, value = text.partition("=")
    whole = (
        f", or quote a single value that contains commas, as in {override(key, value)}"
        if _is_one_of(TEXTS, key)
        else ""
    )
    return f"{text!r} gives several values; add -m to run one job for each{whole}"


def _remedy(text: str, *, after: str | None) -> str:
    key, equals, value = text.partition("=")
    before, _, begun = (after or "").partition("=")
    if equals and _is_one_of(TEXTS, key):
        return f"quote the value, as in {override(key, value)}"
    if equals and _is_one_of(LISTS, key):
        return f"quote the names, as in {override(key, [each.strip() for each in value.strip('[]').split(',')])}"
    if not equals and before.lstrip("+") in TEMPLATES:
        template = OverridesParser.create().parse_override(str(after)).value()
        whole = shlex.quote(f"{before}={template} {text}")
        return f"if it is part of the preceding value, quote that value, as in {whole}"
    if not equals and _is_one_of(TEXTS, before):
        return f"if it is part of the preceding value, quote that value, as in {override(before, f'{begun} {text}')}"
    return "overrides have the form key=value"


def _is_one_of(keys: Sequence[str], key: str) -> bool:
    """Whether `key` is one of the keys, or the last part of one; unknown keys are reported later."""
    return any(each in (key.lstrip("+"), f"{each.rpartition('.')[0]}.{key.lstrip('+')}") for each in keys)


def _written(value: object) -> str:
    """The value in Hydra's grammar: unchanged if Hydra reads it unchanged, otherwise in double quotes."""
    text = str(value)
    try:
        found = OverridesParser.create().parse_override(f"key={text}")
        if text and "${" not in text and not found.is_sweep_override() and found.value() == text:
            return text
    except (HydraException, ValueError):
        pass
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # otherwise OmegaConf would interpolate it
    return '"' + re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + m[2].replace('"', '\\"'), escaped) + '"'
