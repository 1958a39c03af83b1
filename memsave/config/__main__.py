"""Prints docs/configuration.md: every option of every config group, with its keys.

python -m memsave.config
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass

from omegaconf import MISSING

from memsave.config.fields import constraint_of
from memsave.config.registry import GROUPS, experiments, options
from memsave.config.schema import Config

HEAD = """# Configuration

This page lists every key of every option; `python -m memsave.config` prints it. Choose the option of a group by its
name, as in `data=brats`, and set a key by `key=value`, as in `data.root=/my/BraTS2021`. The file of an option in conf/
can set other defaults; `python -m memsave.run experiment=NAME --cfg job` prints the composed config.
"""


def main() -> None:
    """Print the page."""
    print(HEAD)
    print("\n".join(lines()))


def lines() -> Iterator[str]:
    """The lines of the page below HEAD."""
    yield from ["## The whole run", "", *_table(Config, prefix="", skip=set(GROUPS)), ""]
    yield from ["## experiment", "", ", ".join(f"`experiment={name}`" for name in experiments()), ""]
    for group in GROUPS[1:]:
        by_schema: dict[type, list[str]] = {}
        for name, schema in options(group).items():
            by_schema.setdefault(schema, []).append(name)
        yield from [f"## {group}", ""]
        for schema, names in by_schema.items():
            yield from ["### " + ", ".join(f"`{group}={name}`" for name in names), ""]
            yield from [" ".join((schema.__doc__ or "").split()), ""]
            yield from [*_table(schema, prefix=f"{group}.", skip=set()), ""]


def _table(schema: type, *, prefix: str, skip: set[str]) -> Iterator[str]:
    yield "| key | default | valid | meaning |"
    yield "|---|---|---|---|"
    yield from _rows(schema, prefix=prefix, skip=skip | {"kind"})


def _rows(schema: type, *, prefix: str, skip: set[str]) -> Iterator[str]:
    notes = _notes(schema)
    for each in fields(schema):
        if each.name in skip:
            continue
        if isinstance(each.type, type) and is_dataclass(each.type):
            yield from _rows(each.type, prefix=f"{prefix}{each.name}.", skip=set())
            continue
        cells = [f"`{prefix}{each.name}`", _default(each), _valid(each), notes.get(each.name, "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _valid(each: Field) -> str:
    return constraint_of(each).describe()


def _default(each: Field) -> str:
    value = each.default_factory() if each.default_factory is not NO_DEFAULT else each.default
    if value is NO_DEFAULT or value == MISSING:
        return ""
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return {"None": "null", "True": "true", "False": "false"}.get(
        text, f"{value:.3g}" if isinstance(value, float) else text
    )


def _notes(schema: type) -> dict[str, str]:
    """The string below each field, by field name; the strings of a subclass replace those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:]):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[ast.unparse(node.target)] = " ".join(str(after.value.value).split())
    return found


if __name__ == "__main__":
    main()
