"""The picture of the lower bounds beside the promises."""

from pathlib import Path
from typing import Any

from memsave.profiler.plot import FAINT, INK

BOUND, REFUTED, PROMISE = "#4f81a8", "#e08e45", "#a35d8f"
KINDS = {"one run": "one run with many canaries", "trials": "many trainings with and without one record"}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw each bound as a dot and each promise as a line, one panel per kind of audit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.2), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        rows = {name: row[kind] for name, row in results.items() if kind in row}
        for number, found in enumerate(rows.values()):
            bounds = [each["bound"] for each in found]
            colours = [REFUTED if each["bound"] > each["promised"] else BOUND for each in found]
            axes.scatter(bounds, [number] * len(bounds), s=26, c=colours, alpha=0.7, linewidths=0)
        promised = next(iter(rows.values()))[0]["promised"]
        axes.axvline(promised, color=PROMISE, linewidth=1.6)
        axes.text(promised, -0.72, f" promised {promised:.2f}", fontsize=9, color=PROMISE, va="center")
        axes.set_yticks(range(len(rows)), [name.replace("none: an ", "") for name in rows])
        axes.set_ylim(len(rows) - 0.5, -1.0)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=9, labelcolor=INK)
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
        axes.set_xlabel("lower bound of epsilon, 95% confidence", fontsize=9, color=FAINT)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    figure.savefig(path)
