"""The picture of an audit: the scores of included and excluded canaries, and the bounds beside the promise."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from memsave.privacy.audit import AuditReport, CanaryGroup
from memsave.profiler.plot import FAINT, INK

INCLUDED, EXCLUDED, PROMISE = "#e08e45", "#4f81a8", "#a35d8f"
BINS = 40


def draw_audit(report: AuditReport, path: Path) -> None:
    """Draw a histogram for each kind of canary, and the bounds of all of them."""
    from matplotlib.figure import Figure

    panels = len(report.groups) + 1
    figure = Figure(figsize=(4.6 * panels, 3.6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        for spine in ("top", "right"):
            each.spines[spine].set_visible(False)
        each.tick_params(labelsize=9, labelcolor=INK)
    for group, each in zip(report.groups, axes, strict=False):
        _scores(each, group)
    _bounds(axes[-1], report)
    figure.savefig(path)


def _scores(axes: Any, group: CanaryGroup) -> None:
    scores, truth = np.array(group.scores), np.array(group.truth)
    low, high = np.quantile(scores, [0.002, 0.998])
    bins = np.linspace(low, high if high > low else low + 1, BINS)
    shown = np.clip(scores, bins[0], bins[-1])
    for which, colour, name in ((~truth, EXCLUDED, "excluded"), (truth, INCLUDED, "included")):
        axes.hist(shown[which], bins=bins, color=colour, alpha=0.65, label=f"{int(which.sum())} {name}")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("score", fontsize=9, color=FAINT)
    axes.set_title(f"{group.canaries} canaries in {group.kind} space", loc="left", fontsize=11, color=INK)


def _bounds(axes: Any, report: AuditReport) -> None:
    rows = [(f"{group.kind}, {name}", bound) for group in report.groups for name, bound in group.bounds.items()]
    axes.barh(range(len(rows)), [bound for _, bound in rows], height=0.55, color=EXCLUDED)
    for number, (_, bound) in enumerate(rows):
        axes.text(bound, number, f" {bound:.2f}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.9)
    largest = max([bound for _, bound in rows] + ([report.promised] if report.promised < math.inf else []))
    axes.set_xlim(0, 1.25 * largest or 1)
    if report.promised < math.inf:
        axes.axvline(report.promised, color=PROMISE, linewidth=1.6)
        axes.text(report.promised, -0.75, f"promised {report.promised:.2f} ", ha="right", fontsize=9, color=PROMISE)
    axes.set_xlabel("epsilon", fontsize=9, color=FAINT)
    axes.set_title(f"Lower bounds, {report.confidence:.0%} confidence", loc="left", fontsize=11, color=INK)
