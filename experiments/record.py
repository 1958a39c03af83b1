"""How a measurement is kept: JSON with the command, the machine and the day."""

import datetime
from pathlib import Path
from typing import Any

from memsave.training.result import hardware, versions, write_json


def keep(path: Path, *, command: str, results: dict[str, Any]) -> None:
    """Write the results beside what they depend on."""
    today = datetime.date.today().isoformat()
    write_json(
        path, {"command": command, "date": today, "hardware": hardware(), "versions": versions(), "results": results}
    )
    print(f"written to {path}")


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
