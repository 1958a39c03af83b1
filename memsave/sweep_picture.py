"""The picture of a sweep: what fits by budget, or what each job held and reached."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memsave.profiler import format_bytes
from memsave.profiler.plot import FAINT, INK

LINES = ("#5b6770", "#4f81a8", "#e08e45", "#4d9a94", "#a35d8f")
MARKS = ("status", "seconds", "job", "each step", "limit", "peak_bytes", "allocator_peak_bytes", "epsilon", "loss")

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, path: Path) -> None:
    """Lines of the largest size over the budget for plans of several budgets; else a bar for each row."""
    from matplotlib.figure import Figure

    sized = [row for row in rows if row.get("size") is not None and row.get("budget_bytes")]
    whats = {key for row in sized for key in row if key.startswith("largest ")}
    by_budget = (
        len({row["budget_bytes"] for row in sized}) > 1 and len(whats) == 1
    )  # sizes of several kinds have no axis
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
    """The largest size by budget, one line a strategy, each point with its size in words."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]  # words that meet a line stay readable
    what = next(key for key in rows[0] if key.startswith("largest "))
    near = 0.05 * max(row["size"] for row in rows)
    written: dict[int, list[int]] = {}  # by budget, the sizes that have their words
    named: list[int] = []
    for number, strategy in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
        points = sorted(
            (row["budget_bytes"], row["size"], _words(row, what)) for row in rows if row["strategy"] == strategy
        )
        colour = LINES[number % len(LINES)]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", color=colour, linewidth=1.8)
        for budget, size, words in points:
            below = any(abs(size - other) < near for other in written.setdefault(budget, []))
            written[budget].append(size)
            axes.annotate(words, (budget, size), xytext=(5, -13) if below else (-5, 6), textcoords="offset points",
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
    axes.set_title(f"The {what} that fits, predicted on fake tensors", loc="left", fontsize=12, color=INK)


def _words(row: Mapping[str, Any], what: str) -> str:
    """A plan's size, and why no larger one was tried, where the words for the size leave that open."""
    timed_out = str(row[what]).startswith("at least")
    return f"{row[what]} ({row['limit']})" if row.get("limit") and not timed_out else str(row[what])


def _bars(axes: Any, rows: Rows) -> None:
    """What each row held at its peak, or would, and its scores beside it."""
    labels, sizes = [], []
    for row in rows:
        keys = [key for key in row if key not in MARKS and not isinstance(row[key], float) and "_bytes" not in key]
        told = [str(row[key]) for key in keys if row[key] is not None and key not in ("size", "fits")]
        labels.append(", ".join(told) or f"job {row['job']}")
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
