"""GhostClipper with the adapters of PEFT over tiny models of transformers, against one backward per example.

    python -m experiments.adapters

`--only "*DoRA*"` checks the set-ups whose names match, and writes nothing.
"""

import argparse
import fnmatch
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.adapters.check import check
from experiments.adapters.setups import SETUPS
from experiments.models.__main__ import DOCUMENT, quiet, time_limit
from experiments.models.check import Row
from experiments.models.table import VERDICTS, told
from experiments.record import insert, keep

HERE = Path(__file__).parent
SECONDS = 30  # time limit of a set-up


def table(rows: list[Row]) -> str:
    """A row for each set-up below the counts."""
    counts = Counter(row.verdict for row in rows)
    lines = [", ".join(f"{counts[each]} {each}" for each in VERDICTS) + f", of {len(rows)}.", ""]
    lines += ["| adapter | model | trainable parameters | verdict |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.family} | {row.parameters:,} | {told(row)} |" for row in rows]
    return "\n".join(lines)


def line(row: Row, seconds: float) -> str:
    """What is printed of a set-up."""
    error = "" if row.error is None else f"{row.error:.1e} of {row.tolerance:.1e}"
    apart = "" if row.apart else "mixes examples"
    parts = (row.name, row.family, row.mode, row.parameters, row.verdict, error, row.message, apart)
    return " | ".join([*map(str, parts), f"{seconds:.1f} s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="of set-ups, such as '*DoRA*'")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    rows, begin = [], time.perf_counter()
    for setup in SETUPS:
        if not fnmatch.fnmatch(setup.name, options.only or "*"):
            continue
        before = time.perf_counter()
        try:
            with time_limit(SECONDS):
                row = check(setup)
        except TimeoutError as error:
            row = Row(setup.base, setup.name, "", message=str(error))
        rows.append(row)
        print(line(row, time.perf_counter() - before), flush=True)
    seconds = time.perf_counter() - begin
    print(dict(Counter(row.verdict for row in rows)), f"{seconds:.0f} s")
    if options.only is None:
        insert(DOCUMENT, name="adapters", text=table(rows))
        packages = {name: version(name) for name in ("peft", "transformers")}
        results = {"packages": packages, "seconds": round(seconds), "adapters": [row.as_dict() for row in rows]}
        keep(HERE / "results.json", command="python -m experiments.adapters", results=results)


if __name__ == "__main__":
    main()
