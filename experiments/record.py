"""How a measurement is kept: JSON with the command, the machine and the day."""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from memsave.files import write_json
from memsave.training.process import keep_freed_memory
from memsave.training.result import hardware, versions


def keep(path: Path, *, command: str, results: dict[str, Any]) -> None:
    """Write the results beside what they depend on."""
    today = datetime.date.today().isoformat()
    write_json(
        path, {"command": command, "date": today, "hardware": hardware(), "versions": versions(), "results": results}
    )
    print(f"written to {path}")


def earlier(path: Path) -> dict[str, Any]:
    """The results that this machine wrote there before; empty where it wrote none."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    return content["results"] if content.get("hardware") == hardware() else {}


def without_options(doc: str | None) -> None:
    """For a program that takes no options: answer `--help`, and refuse everything else, before anything is measured."""
    argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def have_freed_memory_kept(parser: argparse.ArgumentParser, *, missing: set[str]) -> None:
    """For `--keep-freed`, which adds to rows that are there; without them, or without glibc, the program ends."""
    if missing:
        parser.error(f"--keep-freed adds a column to what was measured here before; first measure {sorted(missing)}")
    if not keep_freed_memory():
        parser.error("--keep-freed is for glibc, and this malloc is another")


def insert(document: Path, *, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`, so that no number is ever copied by hand."""
    before, opening, rest = document.read_text().partition(f"<!-- {name} -->")
    _, closing, after = rest.partition("<!-- end -->")
    if not closing:
        raise ValueError(f"{document} has no part <!-- {name} --> ... <!-- end --> to put the table into; add the two")
    document.write_text(f"{before}{opening}\n{text}\n{closing}{after}")


def machine() -> str:
    """The machine and the day, for the line above a table."""
    here = hardware()
    return f"measured on {here['gpu'] or here['cpu']}, {here['threads']} threads, {datetime.date.today().isoformat()}"


def median(values: list[float]) -> float:
    """The middle value: a shared machine now and then takes a break."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
