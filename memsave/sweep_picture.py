"""The picture of a sweep: largest sizes over the budget, or peak memory and scores of each job."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memsave.profiler import format_bytes
from memsave.profiler.plot import FAINT, INK

LINES = ("#5b6770", "#4f81a8", "#e08e45", "#4d9a94", "#a35d8f")
MARKS = ("status", "seconds", "job", "each step", "limit", "peak_bytes", "allocator_peak_bytes", "epsilon", "loss")

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, path: Path) -> None:
    """Draw the largest size over the budget for plans with several budgets, otherwise a bar for each row."""
    from matplotlib.figure import Figure

    sized = [row for row in rows if row.get("size") is not None and row.get("budget_bytes")]
    quantities = {key for row in sized for key in row if key.startswith("largest ")}
    # sizes of several kinds cannot share an axis
    by_budget = len({row["budget_bytes"] for row in sized}) > 1 and len(quantities) == 1
    height = 4.4 if by_budget else 1.2 + 0.34 * len(rows)
    figure = Figure(figsize=(8.6, height), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    axes.tick_params(labelsize=9, labelcolor=INK)
    if by_budget:
        _lines(axes, sized)
    else:
        _bars(axes, rows)
    figure.savefig(path)


def _lines(axes: Any, rows: Rows) -> None:
    """Draw the largest size by budget, one line per strategy, with a label at each point."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]  # keeps labels on a line readable
    quantity = next(key for key in rows[0] if key.startswith("largest "))
    near = 0.05 * max(row["size"] for row in rows)
    labelled: dict[int, list[int]] = {}  # by budget, the sizes that have a label
    named: list[int] = []
    for number, strategy in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
        own = [row for row in rows if row["strategy"] == strategy]
        points = sorted((row["budget_bytes"], row["size"], _label(row, quantity)) for row in own)
        colour = LINES[number % len(LINES)]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", color=colour, linewidth=1.8)
        for budget, size, label in points:
            below = any(abs(size - other) < near for other in labelled.setdefault(budget, []))
            labelled[budget].append(size)
            axes.annotate(label, (budget, size), xytext=(5, -13) if below else (-5, 6), textcoords="offset points",
                          ha="left" if below else "right", fontsize=8, color=colour, path_effects=halo)  # fmt: skip
        lower = any(abs(points[-1][1] - other) < near for other in named)
        named.append(points[-1][1])
        axes.annotate(
            strategy,
            points[-1][:2],
            xytext=(10, -25) if lower else (10, 1),
            textcoords="offset points",
            fontsize=10,
            color=colour,
        )
    budgets = sorted({row["budget_bytes"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [format_bytes(each).replace(".00", "") for each in budgets])
    axes.minorticks_off()
    axes.margins(x=0.16, y=0.14)
    axes.set_xlabel("budget", fontsize=10, color=FAINT)
    axes.set_title(f"The {quantity} that fits, predicted on fake tensors", loc="left", fontsize=12, color=INK)


def _label(row: Mapping[str, Any], quantity: str) -> str:
    """A plan's size, with the limit of the search if there is one; "at least" already implies a timeout."""
    timed_out = str(row[quantity]).startswith("at least")
    return f"{row[quantity]} ({row['limit']})" if row.get("limit") and not timed_out else str(row[quantity])


def _bars(axes: Any, rows: Rows) -> None:
    """Draw a bar of the measured or predicted peak memory of each row, with its scores."""
    labels, sizes = [], []
    for row in rows:
        keys = [key for key in row if key not in MARKS and not isinstance(row[key], float) and "_bytes" not in key]
        values = [str(row[key]) for key in keys if row[key] is not None and key not in ("size", "fits")]
        labels.append(", ".join(values) or f"job {row['job']}")
        sizes.append(row.get("calibrated_bytes") or row.get("peak_bytes") or 0)
    axes.barh(range(len(rows)), sizes, height=0.62, color="#e08e45")
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        scores = [f"{key} {row[key]:.3g}" for key in row if key not in MARKS and isinstance(row[key], float)][:2]
        words = [format_bytes(size) if size else "", *scores, *([] if row["status"] == "ok" else [row["status"]])]
        words += [row["limit"]] if row.get("limit") else []
        axes.text(size, number, "  " + ", ".join(word for word in words if word), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.6 * max([*sizes, 1]))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Peak memory of each job", loc="left", fontsize=12, color=INK)
