"""The picture of a training step: live bytes by category, several reports side by side on one memory axis.

The horizontal axis counts allocations and releases, because a recording has no other clock (fake tensors take no time).
Changes that are too small to be seen take no width; otherwise the thousand scalars of an optimizer would fill half of
the picture with a flat line. Each panel runs from the first change to the last, above a strip with the phases.
Persistent categories are at the bottom in greys and blues; those that a training method can change are on top in warm
colours. A dashed line shows the first panel's peak in the others. Each category is labelled once, inside its area where
it is thickest; areas too thin for a label are in the legend, and invisible ones are omitted. Of a step with many
micro-batches only the one with the peak is drawn.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from memsave.profiler.sizes import format_bytes
from memsave.profiler.timeline import CATEGORIES, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "parameter": "#5b6770",
    "gathered": "#7d9a86",
    "buffer": "#b9bfc4",
    "optimizer": "#8fa1ad",
    "gradient": "#4f81a8",
    "input": "#a9c6d9",
    "activation": "#e08e45",
    "temporary": "#f3cf9f",
}
DARK = {"parameter", "gradient"}
PHASE_COLOURS = {"forward": "#d9dcdf", "backward": "#9aa1a7", "recompute": "#4d9a94", "optimizer": "#5b6770"}
INK = "#2b2f33"
FAINT = "#8a9096"
VISIBLE = 0.003  # smallest visible share of the axis, about the width of a line
MIN_VISIBLE_CHANGES = 16  # a panel with fewer visible changes counts all changes
LINE_HEIGHT = 0.055  # of a line of text, as a share of the axis
MAX_FORWARDS = 4  # with more forwards in one step only one of them is drawn
LABEL_WIDTH = 0.20  # of a category's name, as a share of a panel


class Recording(Protocol):
    """The attributes of a `MemoryReport` that are drawn."""

    @property
    def timeline(self) -> Timeline:
        """Live bytes by category in every state."""

    @property
    def peak_bytes(self) -> int:
        """The largest number of live bytes in any state."""

    @property
    def peak_index(self) -> int:
        """The first state with `peak_bytes`."""


@dataclass(frozen=True)
class Excerpt:
    """The part of a recording that is drawn."""

    timeline: Timeline
    peak_bytes: int
    peak_index: int
    forwards: int
    """The number of forwards in the recording of which only one is drawn; 1 if all of it is drawn."""

    @property
    def note(self) -> str:
        """Says after the title that not all micro-batches are drawn."""
        return f" (one of {self.forwards} micro-batches)" if self.forwards > 1 else ""


def excerpt_of(report: Recording) -> Excerpt:
    """The forward and backward with the peak if there are many forwards, otherwise the whole recording."""
    timeline = report.timeline
    forwards = [state for state, phase in timeline.phases if phase == "forward"]
    if len(forwards) <= MAX_FORWARDS:
        return Excerpt(timeline, report.peak_bytes, report.peak_index, 1)
    after = bisect_right(forwards, max(report.peak_index, forwards[0]))
    first, last = forwards[after - 1], [*forwards, len(timeline) - 1][after]
    return Excerpt(timeline.between(first, last), report.peak_bytes, report.peak_index - first, len(forwards))


class _Panel:
    """One excerpt and its axes, with the clock and the stacked layers."""

    def __init__(self, report: Excerpt, axes: "Axes", *, top: float) -> None:
        self.report = report
        self.axes = axes
        clock = _clock(report, top=top)
        self.last = clock[-1] + 1
        self.clock = [*clock, self.last]
        """The horizontal position of every state, and of the end of the last one."""
        lower = [0] * len(report.timeline)
        self.layers: list[tuple[str, list[int], list[int]]] = []
        """(category, lower edge, upper edge) in every state, from the bottom of the stack to the top."""
        by_category = report.timeline.by_category()
        for name in CATEGORIES:
            upper = [base + size for base, size in zip(lower, by_category[name])]
            self.layers.append((name, [*lower, lower[-1]], [*upper, upper[-1]]))
            lower = upper

    def thickness(self, name: str) -> int:
        """The largest number of bytes of one category in any state."""
        return max(high - low for own, lower, upper in self.layers if own == name for low, high in zip(lower, upper))


def _clock(report: Excerpt, *, top: float) -> list[int]:
    """For every state, the number of visible changes before it."""
    visible = [abs(delta) >= VISIBLE * top for delta in report.timeline.deltas]
    if sum(visible) < MIN_VISIBLE_CHANGES:
        return list(range(len(report.timeline)))
    return list(accumulate(visible, initial=0))


def plot_reports(reports: Mapping[str, Recording], path: str | PathLike[str], *, title: str | None = None) -> None:
    """Draw one panel per report, in order, all on the same memory axis, and save the picture.

    Args:
        reports: the reports by title; the others are compared with the first.
        path: the file to write; the suffix determines the format (png, pdf, svg).
        title: a line above the panels.
    """
    if not reports:
        raise ValueError("got 0 reports to draw and at least 1 is needed: pass {name: report}")
    # Without pyplot the caller's backend and open figures do not change.
    from matplotlib.figure import Figure

    top = max(report.peak_bytes for report in reports.values()) * 1.12 or 1
    width = max(6.4, 1.05 + 4.1 * len(reports))
    figure = Figure(figsize=(width, 4.4), dpi=160, facecolor="white")
    left = 0.85 / width
    grid = figure.add_gridspec(
        2,
        len(reports),
        height_ratios=[1, 0.035],
        hspace=0.03,
        wspace=0.07,
        left=left,
        right=1 - 0.2 / width,
        top=0.82 if title else 0.92,
        bottom=0.17,
    )
    panels = []
    for column, (name, report) in enumerate(reports.items()):
        excerpt = excerpt_of(report)
        panel = _Panel(excerpt, figure.add_subplot(grid[0, column]), top=top)
        panels.append(panel)
        panel.axes.set_title(name + excerpt.note, loc="left", fontsize=11, color=INK, pad=6)
        _draw_areas(panel, top=top)
        _draw_peak(panel, first=panels[0])
        _draw_phases(panel, figure.add_subplot(grid[1, column]))
    named = _name_areas(panels, top=top)
    _draw_axis(panels, top=top)
    _draw_legend(figure, panels, named=named, left=left, top=top, columns=int((width - 0.85) / 1.3))
    if title:
        figure.text(left, 0.935, title, fontsize=13, color=INK, weight="bold", ha="left")
    figure.savefig(path)


def _draw_areas(panel: _Panel, *, top: float) -> None:
    for name, lower, upper in panel.layers:
        panel.axes.fill_between(panel.clock, lower, upper, step="post", color=COLOURS[name], linewidth=0)
    panel.axes.set_xlim(0, panel.last)
    panel.axes.set_ylim(0, top)


def _draw_peak(panel: _Panel, *, first: _Panel) -> None:
    peak, reference = panel.report.peak_bytes, first.report.peak_bytes
    text = f"peak {format_bytes(peak)}"
    if panel is not first:
        panel.axes.axhline(reference, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        text += f"  ({peak / max(reference, 1):.2f}x)"
    x = panel.clock[panel.report.peak_index] + 0.5
    panel.axes.plot([x], [peak], marker="v", markersize=5, color=INK, clip_on=False, zorder=5)
    panel.axes.annotate(
        text,
        (x, peak),
        xytext=(0, 6),
        textcoords="offset points",
        ha="left" if x < 0.2 * panel.last else "right" if x > 0.8 * panel.last else "center",
        fontsize=10,
        weight="bold",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
    )


def _draw_phases(panel: _Panel, axes: "Axes") -> None:
    """The strip below a panel: the phase of each change, with labels for the long phases."""
    marks = [(panel.clock[state], phase) for state, phase in panel.report.timeline.phases]
    marks.append((panel.last, ""))
    intervals: list[tuple[int, int, str]] = []
    for (begin, phase), (end, _) in pairwise(marks):
        axes.axvspan(begin, end, color=PHASE_COLOURS[phase], linewidth=0)
        # Recomputation is labelled with the backward around it, which would otherwise be split into short intervals.
        phase = "backward" if phase == "recompute" else phase
        if intervals and intervals[-1][2] == phase:
            begin = intervals.pop()[0]
        intervals.append((begin, end, phase))
    for phase in {phase for _, _, phase in intervals}:
        same_phase = [(end - begin, begin, end) for begin, end, each in intervals if each == phase]
        _, begin, end = max(same_phase, key=lambda interval: interval[0])
        if end - begin > 0.13 * panel.last:
            axes.text((begin + end) / 2, -0.7, phase, ha="center", va="top", fontsize=9, color=FAINT)
    axes.set_xlim(0, panel.last)
    axes.set_ylim(0, 1)
    axes.axis("off")


def _name_areas(panels: list[_Panel], *, top: float) -> set[str]:
    """Label each category once, in the thickest window of a label's width over all panels; return those labelled."""
    best: dict[str, tuple[float, _Panel, float, float]] = {}
    for panel in panels:
        starts = range(0, panel.last, max(1, panel.last // 200))
        for left in starts:
            begin, end = bisect_left(panel.clock, left), bisect_right(panel.clock, left + LABEL_WIDTH * panel.last)
            if left + LABEL_WIDTH * panel.last > panel.last:
                break
            for name, lower, upper in panel.layers:
                floor, ceiling = max(lower[begin:end]), min(upper[begin:end])
                height = (ceiling - floor) / top
                if height > best.get(name, (LINE_HEIGHT,))[0]:
                    best[name] = (height, panel, left + LABEL_WIDTH * panel.last / 2, (floor + ceiling) / 2)
    for name, (_, panel, x, y) in best.items():
        colour = "white" if name in DARK else INK
        panel.axes.text(x, y, name, ha="center", va="center", fontsize=10, color=colour)
    return set(best)


def _draw_axis(panels: list[_Panel], *, top: float) -> None:
    """Draw ticks at round numbers of one unit on the left, and grid lines in every panel."""
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
    unit, size = next((pair for pair in units if top >= pair[1]), units[-1])
    rounds = (base * 10.0**power for power in range(-2, 12) for base in (1, 2, 5))
    step = next(value for value in rounds if top / size / value <= 6)
    ticks = [index * step for index in range(int(top / size / step) + 1)]
    for column, panel in enumerate(panels):
        axes = panel.axes
        axes.set_xticks([])
        axes.set_yticks([tick * size for tick in ticks])
        axes.set_yticklabels([f"{tick:g} {unit}" if tick else "0" for tick in ticks] if column == 0 else [])
        axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=FAINT)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#e6e8ea", linewidth=0.8)
        for spine in axes.spines.values():
            spine.set_visible(False)


def _draw_legend(figure: Any, panels: list[_Panel], *, named: set[str], left: float, top: float, columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=COLOURS[name], label=name)
        for name in CATEGORIES
        if name not in named and max(panel.thickness(name) for panel in panels) > VISIBLE * top
    ]
    if any(phase == "recompute" for panel in panels for _, phase in panel.report.timeline.phases):
        handles.append(Patch(color=PHASE_COLOURS["recompute"], label="recompute (strip)"))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(left, 0.005),
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handlelength=1.0,
            handleheight=1.0,
            borderaxespad=0.2,
            borderpad=0,
            columnspacing=1.5,
        )
