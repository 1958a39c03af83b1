"""Exactness, memory and time on one GPU of CUDA.

    python -m experiments.gpu              # writes what it measured after each table
    python -m experiments.gpu --quick      # small sizes; nothing is written

Peaks are those of PyTorch's allocator (`torch.cuda.max_memory_allocated`) above the start of a step; parameters are
not included. Times are medians of steps taken in turn, by the events of the device.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.gpu.exactness import exactness
from experiments.gpu.language import language
from experiments.gpu.volumes import PRECISIONS, operators, volumes
from experiments.planning.__main__ import STEPS, compare
from experiments.record import earlier, insert, keep, machine
from experiments.speed.ghost import Shape
from memsave.profiler import format_bytes

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "results.md"
PARTS = ("exactness", "language", "volumes", "planning", "operators")
WHOLE = "240x240x160"
SIZES = {"128^3": (128, 128, 128), WHOLE: (240, 240, 160)}
SHAPES = [Shape(12, 8, 512), Shape(12, 32, 100)]
QUICK_STEPS = (0, 2, 6, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as measured before")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "PyTorch finds no GPU here; `python -m experiments.memory_modes` and `experiments.speed.ghost` need none"
        )
    results: dict[str, Any] = {} if given.quick else earlier(HERE / "results.json")
    others = [part for part in results if part not in given.parts]
    of = machine() + (f" ({', '.join(others)}: earlier, on the same GPU)" if others else "")
    for part in given.parts:
        print(part, flush=True)
        results[part] = {}
        for name, rows in measured(part, quick=given.quick):
            results[part][name] = rows
            if not given.quick:  # what is measured is kept if the rest fails
                results = {part: results[part] for part in PARTS if part in results}
                write(results, of=of)
                keep(
                    HERE / "results.json",
                    command=shlex.join(["python", "-m", "experiments.gpu", *sys.argv[1:]]),
                    results=results,
                )
    print(table(results, of=of))


def write(results: dict[str, Any], *, of: str) -> None:
    """Put the tables into the documents."""
    insert(HERE / "README.md", name="gpu", text=table(results, of=of))
    whole = {"volumes": {name: rows for name, rows in results.get("volumes", {}).items() if name == WHOLE}}
    insert(RESULTS, name="gpu", text=table(whole, of=of))


def measured(part: str, *, quick: bool) -> Iterator[tuple[str, Any]]:
    """(name, rows) of each table of a part."""
    repeats = 3 if quick else 15
    if part == "exactness":
        yield "", exactness()
    elif part == "language":
        for shape in [Shape(4, 4, 100)] if quick else SHAPES:
            yield str(shape), language(shape, repeats=repeats, precisions=PRECISIONS)
    elif part == "volumes":
        for name, size in ({"64^3": (64, 64, 64)} if quick else SIZES).items():
            yield name, volumes(size, repeats=repeats, precisions=PRECISIONS)
    elif part == "planning":
        chosen = [STEPS[number] for number in QUICK_STEPS] if quick else STEPS
        yield "", [compare(overrides, device=torch.device("cuda")) for overrides in chosen]
    else:
        yield "", operators(48 if quick else 96, repeats=repeats)


def table(results: dict[str, Any], *, of: str) -> str:
    lines = [f"{of}:"]
    for part, tables in results.items():
        for name, rows in tables.items():
            if part == "exactness":
                lines += exactness_table(rows)
            elif part == "planning":
                lines += planning_table(rows)
            elif part == "operators":
                lines += cost_table("one operator, forward and backward", rows, ratios=False)
            else:
                lines += cost_table(f"{'U-Net' if part == 'volumes' else 'GPT-2'}, {name}", rows)
    return "\n".join(lines)


def exactness_table(rows: dict[str, dict[str, float]]) -> list[str]:
    names = list(next(iter(rows.values())))
    lines = ["", f"| relative error | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {p} | {' | '.join(f'{row[name]:.0e}' for name in names)} |" for p, row in rows.items()]


def cost_table(title: str, by_precision: dict[str, dict[str, dict[str, Any]]], *, ratios: bool = True) -> list[str]:
    """One line for each way, with time and peak in each precision, and their ratios over the first way."""
    ways = list(dict.fromkeys(way for rows in by_precision.values() for way in rows))
    lines = ["", f"| {title} | {' | '.join(by_precision)} |", "|---" * (len(by_precision) + 1) + "|"]
    for way in ways:
        cells = [cost(rows.get(way, {}), rows[ways[0]] if ratios else {}) for rows in by_precision.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def cost(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Time and peak that were measured, with their ratios over those of `first`."""
    if "error" in row:
        return row["error"]
    show = {"seconds": lambda value: f"{value * 1000:.1f} ms", "peak_bytes": format_bytes}
    cells = []
    for key, described in show.items():
        if key in row:
            over = f" ({row[key] / first[key]:.2f}x)" if key in first and row is not first else ""
            cells.append(described(row[key]) + over)
    return ", ".join(cells)


def planning_table(rows: list[dict[str, Any]]) -> list[str]:
    worst = max(abs(row["error"]) for row in rows)
    lines = [
        "",
        f"| planned steps; largest error {worst:.2%} | predicted | allocator, measured | error |",
        "|---" * 4 + "|",
    ]
    for row in rows:
        sizes = (row["calibrated_bytes"], row["measured_allocator_bytes"])
        lines.append(f"| {' '.join(row['overrides'])} | {' | '.join(map(format_bytes, sizes))} | {row['error']:+.2%} |")
    return lines


if __name__ == "__main__":
    main()
