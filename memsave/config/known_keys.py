"""The existing keys, and the error message for an unknown key: the options that have it, or the closest name.

The keys of a group depend on the chosen option: data=brats has `data.layout`, data=phantom does not.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache

from memsave.config.fields import closest
from memsave.config.registry import options
from memsave.config.schema import Config

ORDER = ("trainer", "privacy", "audit", "task", "data", "model", "adapter", "memory", "profiler")
"""The groups in the order in which messages name their keys."""
ALIKE = 0.75  # least similarity of a suggested key of another section


def unknown_key(path: str, names: Sequence[str], *, choices: Mapping[str, str]) -> str:
    """One sentence about an unknown key. `names` are the valid keys there; `choices` has the option of each group."""
    parent, _, key = path.rpartition(".")
    group = path.partition(".")[0]
    chosen, others = choices.get(group), options_with(path, group)
    if chosen and others:
        return f"{path} is not a key of {group}={chosen}; it is a key of {group}={listed(others)}{closest(key, names)}"
    near = difflib.get_close_matches(key, names, n=1, cutoff=ALIKE)
    similar = [] if near else difflib.get_close_matches(key, _by_last_part(choices), n=1, cutoff=ALIKE)
    found = _elsewhere(key, choices) or [each for last in similar for each in _elsewhere(last, choices)]
    if found:
        return f"{path} is not known (did you mean {listed(found)}?)"
    where = f"{group}={chosen}" if chosen and parent == group and len(keys_of(group)) > 1 else parent
    valid = f"valid in {where}" if where else "valid"
    return f"{path} is not known; {valid} are {', '.join(names)}{closest(key, names)}"


@cache
def keys_of(group: str) -> dict[str, tuple[str, ...]]:
    """The dotted keys of each option of a group."""
    return {name: tuple(_keys(schema, f"{group}.")) for name, schema in options(group).items()}


def listed(words: Sequence[str]) -> str:
    """The words as a list in a sentence: a, b or c."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def options_with(path: str, group: str) -> list[str]:
    """The options of the group that have the key."""
    return [option for option, keys in keys_of(group).items() if path in keys] if group in ORDER else []


def _keys(schema: type, prefix: str) -> Iterator[str]:
    for each in fields(schema):
        if isinstance(each.type, type) and is_dataclass(each.type):
            yield from _keys(each.type, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}"


def _by_last_part(choices: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys of the chosen options, by their last part."""
    found: dict[str, list[str]] = {}
    groups: Iterable[Iterable[str]] = (keys_of(group).get(choices.get(group, ""), ()) for group in ORDER)
    own = (each.name for each in fields(Config) if each.name not in ORDER)
    for key in (*own, *(key for keys in groups for key in keys)):
        if not key.endswith(".kind"):
            found.setdefault(key.rpartition(".")[2], []).append(key)
    return found


def _elsewhere(key: str, choices: Mapping[str, str]) -> list[str]:
    """The keys whose last part is `key`: of the chosen options, or of other options, which are then named."""
    found = _by_last_part(choices).get(key)
    if found or key == "kind":
        return found or []
    return [
        f"{name} of {group}={listed(options_with(name, group))}"
        for group in ORDER
        for name in dict.fromkeys(name for keys in keys_of(group).values() for name in keys)
        if name.rpartition(".")[2] == key
    ]
