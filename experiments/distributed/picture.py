"""The picture: peak live bytes per process by category, one bar for each variant."""

from pathlib import Path
from typing import Any

from experiments.distributed.variants import APART
from memsave.profiler import CATEGORIES, format_bytes
from memsave.profiler.plot import COLOURS, FAINT, INK

UNIT = 2**20


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel for each problem, one above the other."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [
        (each["title"], [row for row in each["rows"].values() if "peaks" in row and row["parallel"] != APART])
        for each in results.values()
    ]
    heights = [len(rows) + 1.2 for _, rows in panels]
    figure = Figure(figsize=(9.5, 0.8 + 0.34 * sum(heights)), dpi=160, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for number, (title, rows) in enumerate(panels):
        axes = figure.add_subplot(grid[number, 0])
        draw_bars(axes, rows)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    seen = {name for _, rows in panels for row in rows for name, size in fullest(row).items() if size > UNIT / 2}
    handles = [Patch(color=COLOURS[name], label=name) for name in CATEGORIES if name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, labelcolor=INK)
    figure.savefig(path)


def draw_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    first = sum(fullest(rows[0]).values())
    for place, row in enumerate(rows):
        left = 0.0
        for name in CATEGORIES:
            size = fullest(row)[name] / UNIT
            axes.barh(place, size, left=left, color=COLOURS[name], height=0.72)
            left += size
        ratio = "" if row is rows[0] else f"  {left * UNIT / first:.2f}x"
        axes.text(left, place, f" {format_bytes(round(left * UNIT))}{ratio}", va="center", fontsize=9, color=INK)
    axes.set_yticks(
        range(len(rows)),
        [f"{label(row)}, {row['processes']}" if row["parallel"] else f"{label(row)}, one process" for row in rows],
        fontsize=9,
        color=INK,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(sum(fullest(row).values()) for row in rows) / UNIT)
    axes.set_xlabel("MiB per process at its peak", fontsize=9, color=FAINT)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def label(row: dict[str, Any]) -> str:
    """The way and how the processes share it."""
    return f"{row['way']}, {row['parallel']}" if row["parallel"] else row["way"]


def fullest(row: dict[str, Any]) -> dict[str, int]:
    """The bytes by category of the process with the most."""
    return max(row["peaks"], key=lambda each: sum(each.values()))
