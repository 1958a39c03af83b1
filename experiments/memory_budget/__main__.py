"""The largest volume, depth and width that train in a budget, for each strategy to keep activations.

    python -m experiments.memory_budget            # about an hour on two cores with 24 GiB
    python -m experiments.memory_budget predicted  # without the real steps: ten minutes
    python -m experiments.memory_budget measured   # only the real steps, with earlier predictions
    python -m experiments.memory_budget measured --more    # those that an interrupted command did not reach

Live bytes of the whole training step of the U-Net of `experiment=brats_full` (five levels, 16 to 256 channels, float32,
AdamW, one volume) are predicted on fake tensors. Real steps then measure the sizes for the budgets of MEASURED. Pendse
et al. (2020) report up to 3 times the volume, 25% more depth or twice the channels of the corresponding non-reversible
network.
"""

import argparse
import datetime
import gc
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from experiments.record import earlier, insert, keep, machine
from memsave.config.compose import compose, to_objects
from memsave.config.schema import Config
from memsave.planning.budget import free_bytes
from memsave.planning.fake_step import fake_step
from memsave.planning.plan import variation
from memsave.profiler import MemoryRecorder, format_bytes, parse_bytes, peak_on_fake
from memsave.profiler.calibration import create_state
from memsave.profiler.planner import search
from memsave.training.process import process_peak, reset_process_peak, return_freed_memory

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
CPU = torch.device("cpu")
BUDGETS = ("8GiB", "11GiB", "16GiB", "24GiB", "32GiB", "80GiB")
STRATEGIES = {
    "stored": ["memory=stored"],
    "checkpoint": ["memory=checkpoint"],
    "reversible, hooks": ["memory=reversible", "memory.engine=hooks"],
    "reversible, fused": ["memory=reversible", "memory.engine=fused"],
}
CROP = "data.crop_size=[128,128,128]"
VARIES = {  # overrides, and the sizes to search
    "volume": (["data.crop_size=[240,240,160]"], 720),
    "depth": ([CROP], 12),
    "channels": ([CROP], 160),
}
MEASURED = {"volume": ("8GiB", "11GiB", "16GiB"), "depth": ("8GiB",), "channels": ("8GiB",)}  # larger ones take hours
ALLOCATOR = 1.2  # upper bound for the memory of the process per live byte


def config_of(strategy: str, vary: str) -> Config:
    overrides, _ = VARIES[vary]
    base = ["experiment=brats_full", "mode=plan", f"vary={vary}", "budget=8GiB"]
    return to_objects(compose([*base, *STRATEGIES[strategy], *overrides]))


@cache
def predicted(strategy: str, vary: str, size: int) -> int:
    """Live bytes at the peak of a step."""
    config = variation(config_of(strategy, vary)).at(size)
    found = peak_on_fake(lambda: fake_step(config, device=CPU)).peak_bytes
    print(f"{strategy}, {vary} {size}: {format_bytes(found)}", flush=True)
    return found


def largest_in(strategy: str, vary: str, budget: str) -> int | None:
    varied = variation(config_of(strategy, vary))
    sizes = range(varied.low, VARIES[vary][1] + 1, varied.multiple)
    start = sizes[-1] if vary == "depth" else min(varied.start, sizes[-1])  # with fused, either all depths fit or none
    total = partial(predicted, strategy, vary)
    return search(sizes, total, limit=parse_bytes(budget), start=start, power=varied.power)


def row_of(strategy: str, vary: str, budget: str) -> dict[str, Any]:
    size = largest_in(strategy, vary, budget)
    words = "none" if size is None else variation(config_of(strategy, vary)).describe(size)
    voxels = [] if size is None else variation(config_of(strategy, vary)).at(size).data.crop_size
    return {
        "strategy": strategy,
        "vary": vary,
        "budget_bytes": parse_bytes(budget),
        "size": size,
        "described": words,
        "voxels": None if size is None else voxels[0] * voxels[1] * voxels[2],
        "predicted_bytes": None if size is None else predicted(strategy, vary, size),
        "at_the_end_of_the_search": size == VARIES[vary][1],
    }


def measured(row: dict[str, Any]) -> dict[str, Any] | None:
    """Measure a real step at the size of a row; None if this machine has too little memory."""
    if row["predicted_bytes"] * ALLOCATOR > free_bytes(CPU):
        print(f"not enough memory for {row['strategy']}, {row['vary']} {row['described']}", flush=True)
        return None
    made = fake_step(variation(config_of(row["strategy"], row["vary"])).at(row["size"]), device=CPU)
    if not create_state(made.optimizer):
        raise RuntimeError("the optimizer could not make its state, and a first step holds less than the others")
    gc.collect()
    reset_process_peak()
    started = time.perf_counter()
    with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
        made.run()
    found = {"measured_bytes": recorder.report().peak_bytes, "seconds": time.perf_counter() - started}
    print(
        row["strategy"],
        row["described"],
        format_bytes(found["measured_bytes"]),
        f"{found['seconds']:.0f} s",
        flush=True,
    )
    return {**row, **found, "process_bytes": process_peak(), "date": datetime.date.today().isoformat()}


def measured_rows(rows: list[dict], before: list[dict]) -> Iterator[dict]:
    """One real step at each size of MEASURED; steps of `before` with the same prediction are not repeated."""
    chosen = {
        (row["strategy"], row["vary"], row["size"]): row
        for row in rows
        if row["size"] is not None and row["budget_bytes"] in map(parse_bytes, MEASURED[row["vary"]])
    }
    for row in chosen.values():
        earlier_ones = [each for each in before if row.items() <= each.items()]
        if found := earlier_ones[0] if earlier_ones else measured(row):
            yield found


def gain(rows: list[dict], row: dict[str, Any]) -> str:
    """The ratio to the size of stored in the same budget."""
    base = next(r for r in rows if r["strategy"] == "stored" and r["budget_bytes"] == row["budget_bytes"])
    if row["size"] is None or base["size"] is None or row is base:
        return ""
    key = "voxels" if row["vary"] == "volume" else "size"
    least = "at least " if row["at_the_end_of_the_search"] else ""
    return f" ({least}{row[key] / base[key]:.1f}x)"


def table(rows: list[dict], vary: str) -> str:
    heads = {
        "volume": "the largest volume",
        "depth": "the most blocks a level, at 128^3",
        "channels": "channels, at 128^3",
    }
    lines = [f"| {heads[vary]} | " + " | ".join(BUDGETS) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    mine = [row for row in rows if row["vary"] == vary]
    for strategy in STRATEGIES:
        cells = [
            row["described"].removesuffix(" blocks a level")
            + (" or more" if row["at_the_end_of_the_search"] else "")
            + gain(mine, row)
            for row in mine
            if row["strategy"] == strategy
        ]
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured_table(rows: list[dict]) -> str:
    lines = [
        f"{machine()}:\n",
        "| budget | strategy | what | size | predicted | measured | the process |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = [format_bytes(row[key]) for key in ("predicted_bytes", "measured_bytes")]
        process = "" if row["process_bytes"] is None else format_bytes(row["process_bytes"])
        cells = [format_bytes(row["budget_bytes"]), row["strategy"], row["vary"], row["described"], *sizes, process]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Draw voxels over the budget, one line per strategy."""
    from matplotlib.figure import Figure

    from memsave.sweep_picture import LINES

    figure = Figure(figsize=(8.6, 4.4), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for strategy, colour in zip(STRATEGIES, LINES):
        mine = [row for row in rows if row["vary"] == "volume" and row["strategy"] == strategy and row["size"]]
        points = [(row["budget_bytes"], row["voxels"] / 1e6) for row in mine]
        axes.plot(*zip(*points), marker="o", color=colour, linewidth=1.8)
        axes.annotate(strategy, points[-1], xytext=(8, -3), textcoords="offset points", fontsize=10, color=colour)
    whole = 240 * 240 * 160 / 1e6
    axes.axhline(whole, color="#8a9096", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate("a whole BraTS volume", (1, whole), xycoords=("axes fraction", "data"), xytext=(0, -12),
                  textcoords="offset points", ha="right", fontsize=9, color="#8a9096")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([parse_bytes(each) for each in BUDGETS], [each.replace("GiB", " GiB") for each in BUDGETS])
    axes.minorticks_off()
    axes.margins(x=0.2)
    axes.set_ylabel("million voxels", fontsize=10, color="#8a9096")
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.set_title("The largest volume that trains in a budget, predicted", loc="left", fontsize=12)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("predicted", "measured"))
    parser.add_argument("--more", action="store_true", help="do not repeat real steps that results.json has")
    options = parser.parse_args()
    return_freed_memory()
    kept = earlier(RESULTS)
    if options.part == "measured" and "predicted" not in kept:
        parser.error("nothing was predicted on this machine yet; run it without an argument")
    if options.part != "measured":
        kept["predicted"] = [
            row_of(strategy, vary, budget) for vary in VARIES for strategy in STRATEGIES for budget in BUDGETS
        ]
        texts = {f"budget {vary}": table(kept["predicted"], vary) for vary in VARIES}
        write(texts, kept)
        insert(ROOT / "docs" / "results.md", name="budget volume", text=texts["budget volume"])
        draw(kept["predicted"], HERE / "volumes.png")
    if options.part != "predicted":
        before, kept["measured"] = kept.get("measured", []) if options.more else [], []
        for row in measured_rows(kept["predicted"], before):
            kept["measured"].append(row)
            write({"budget measured": measured_table(kept["measured"])}, kept)


def write(texts: dict[str, str], kept: dict[str, Any]) -> None:
    """Write tables and results, after each of the long steps."""
    for name, text in texts.items():
        insert(HERE / "README.md", name=name, text=text)
    keep(RESULTS, command="python -m experiments.memory_budget", results=kept)


if __name__ == "__main__":
    main()
