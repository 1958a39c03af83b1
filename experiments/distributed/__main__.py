"""Live bytes per process and time per step of one process and of several.

python -m experiments.distributed              # 1 and 2 processes; on GPUs also 4, 8, ... as there are
python -m experiments.distributed --quick      # small sizes; nothing is written
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from experiments.distributed.measure import work
from experiments.distributed.picture import draw, fullest, label
from experiments.distributed.problems import EXAMPLES
from experiments.record import insert, keep, machine
from memsave.profiler import CATEGORIES, format_bytes

HERE = Path(__file__).parent
ROUNDS = 9
SHOWN = tuple(name for name in CATEGORIES if name != "buffer")  # there are none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each variant is timed")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in each process; the hardware in the JSON says so
    results = measured(rounds=2 if given.quick else given.rounds, quick=given.quick)
    print(table(results))
    if given.quick:
        return
    insert(HERE / "README.md", name="distributed", text=table(results))
    insert(HERE.parents[1] / "docs" / "results.md", name="distributed", text=table(results, categories=()))
    draw(results, HERE / "bytes.png")
    keep(HERE / "results.json", command="python -m experiments.distributed", results=results)


def group_sizes() -> list[int]:
    """2, 4, 8, ...: at most one process for each GPU, and at most one for each example."""
    sizes, most = [2], min(EXAMPLES, torch.cuda.device_count())
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


def measured(*, rounds: int, quick: bool) -> dict[str, Any]:
    """By problem: its title and its rows; those of one process are measured in the group of two."""
    results: dict[str, Any] = {}
    for processes in group_sizes():
        print(f"a group of {processes} processes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            target = partial(work, rounds=rounds, quick=quick)
            spawn(target, (processes, folder), nprocs=processes)
            found = json.loads((Path(folder) / f"rows-{processes}.json").read_text())
        for name, each in found.items():
            rows = results.setdefault(name, {"title": each["title"], "rows": {}})["rows"]
            rows |= {key: row for key, row in each["rows"].items() if processes == 2 or row["processes"] > 1}
    return results


def table(results: dict[str, Any], *, categories: tuple[str, ...] = SHOWN) -> str:
    """One table for each problem, with columns for these categories of bytes."""
    lines = [f"{machine().replace('1 threads', '1 thread per process')}:"]
    for each in results.values():
        heads = [each["title"], "processes", "peak per process, over plain", *categories]
        heads += ["time per step", "over plain", "losses within", "first gradient within"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in each["rows"].values():
            found = cells(row, categories, first=each["rows"]["plain, one process"])
            lines.append(f"| {' | '.join([label(row), str(row['processes']), *found])} |")
    failures = [
        f"- {key}: `{row['error']}`" for each in results.values() for key, row in each["rows"].items() if "error" in row
    ]
    return "\n".join([*lines, "", "These failed, in their own words:", "", *failures] if failures else lines)


def cells(row: dict[str, Any], categories: tuple[str, ...], *, first: dict[str, Any]) -> list[str]:
    """Bytes, those of the process with the most; times; and differences from the one-process run."""
    if "error" in row:
        return [f"failed: {row['error'].partition(':')[0]}", *[""] * (len(categories) + 4)]
    peak, over = fullest(row), sum(fullest(row).values()) / sum(fullest(first).values())
    sizes = [f"{format_bytes(sum(peak.values()))}, {over:.2f}x", *(format_bytes(peak[name]) for name in categories)]
    ratios = [a / b for a, b in zip(row["rounds"], first["rounds"])]
    times = [f"{row['seconds']:.2f} s", f"{row['time_over_plain']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"]
    keys = ("largest_relative_loss_difference", "relative_gradient_difference")
    differences = [f"{row[key]:.0e}" if row[key] else "equal" for key in keys if key in row] or ["", ""]
    return sizes + times + differences


if __name__ == "__main__":
    main()
