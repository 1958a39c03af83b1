"""The picture of a training step: live bytes by category, several ways to train side by side on one axis.

The horizontal axis counts allocations and releases, the only clock that a recording has (fake tensors take no time).
Changes too small to be seen take no width, for otherwise an optimizer's thousand scalars would fill half of the picture
with a flat line. Each panel runs from the first change to the last, with a strip underneath that tells the phases. What
persists lies at the bottom in greys and blues, what a training method can change lies on top in warm colours: the eye
compares the warm mountains, and a dashed line carries the first panel's peak to the others. A category is named inside
its own area, once, where it is thickest; what is too thin to be named stands in a legend below, and what would be
invisible is left out. Of a step in many micro-batches the one with the peak is drawn, for all of them would be a comb.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

from memsave.profiler.report import CATEGORIES, MemoryReport, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "parameter": "#5b6770",
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
SEEN = 0.003  # below this share of the axis a change or an area is thinner than a line
FEW = 16  # with fewer visible changes than this a panel counts them all
LINE = 0.055  # the height of a line of text, as a share of the axis
MANY = 4  # forwards with their backwards in one step: above it, one of them is drawn
WORD = 0.20  # the width of a category's name, as a share of a panel


class _Panel:
    """One report on its axes: the clock and the stacked layers, computed once."""

    def __init__(self, report: MemoryReport, axes: "Axes", *, top: float) -> None:
        self.report = report
        self.axes = axes
        clock = _clock(report, top=top)
        self.last = clock[-1] + 1
        self.clock = [*clock, self.last]
        """The horizontal place of every state, and of the end of the last one."""
        lower = [0] * len(report.timeline)
        self.layers: list[tuple[str, list[int], list[int]]] = []
        """(category, lower edge, upper edge) in every state, from the bottom of the stack to its top."""
        by_category = report.timeline.by_category()
        for name in CATEGORIES:
            upper = [base + size for base, size in zip(lower, by_category[name])]
            self.layers.append((name, [*lower, lower[-1]], [*upper, upper[-1]]))
            lower = upper

    def thickness(self, name: str) -> int:
        """The most bytes of one category at any time."""
        return max(high - low for own, lower, upper in self.layers if own == name for low, high in zip(lower, upper))


def _clock(report: MemoryReport, *, top: float) -> list[int]:
    """Count for every state the visible changes before it."""
    visible = [abs(delta) >= SEEN * top for delta in report.timeline.deltas]
    if sum(visible) < FEW:
        return list(range(len(report.timeline)))
    return list(accumulate(visible, initial=0))


def plot_reports(reports: Mapping[str, MemoryReport], path: str | PathLike[str], *, title: str | None = None) -> None:
    """Draw one panel per report, in order, all on the same memory axis, and save the picture.

    Args:
        reports: what to call each recording, and its report; the first is what the others are compared with.
        path: where to save; the suffix chooses the format (png, pdf, svg).
        title: a line above the panels.
    """
    if not reports:
        raise ValueError("got 0 reports to draw and at least 1 is needed: pass {name: report}")
    # A figure of its own, without pyplot, leaves the caller's backend and open figures alone.
    from matplotlib.figure import Figure

    shown = {name: around_the_peak(report) for name, report in reports.items()}
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
    for column, (name, (report, micro_batches)) in enumerate(shown.items()):
        panel = _Panel(report, figure.add_subplot(grid[0, column]), top=top)
        panels.append(panel)
        note = f" (one of {micro_batches} micro-batches)" if micro_batches > 1 else ""
        panel.axes.set_title(name + note, loc="left", fontsize=11, color=INK, pad=6)
        _draw_areas(panel, top=top)
        _draw_peak(panel, first=panels[0])
        _draw_phases(panel, figure.add_subplot(grid[1, column]))
    named = _name_areas(panels, top=top)
    _draw_axis(panels, top=top)
    _draw_legend(figure, panels, named=named, left=left, top=top, columns=int((width - 0.85) / 1.3))
    if title:
        figure.text(left, 0.935, title, fontsize=13, color=INK, weight="bold", ha="left")
    figure.savefig(path)


def around_the_peak(report: MemoryReport) -> tuple[MemoryReport, int]:
    """(the report with the forward and backward that hold the peak alone, how many there are); all of a few: 1."""
    timeline = report.timeline
    forwards = [state for state, phase in timeline.phases if phase == "forward"]
    if len(forwards) <= MANY:
        return report, 1
    after = bisect_right(forwards, max(report.peak_index, forwards[0]))
    first, last = forwards[after - 1], [*forwards, len(timeline) - 1][after]
    part = timeline.between(first, last)
    return replace(report, timeline=part, peak_index=report.peak_index - first), len(forwards)


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
    """The strip under a panel: which phase each change belongs to, with the names of the long ones."""
    marks = [(panel.clock[state], phase) for state, phase in panel.report.timeline.phases]
    marks.append((panel.last, ""))
    spells: list[tuple[int, int, str]] = []
    for (begin, phase), (end, _) in pairwise(marks):
        axes.axvspan(begin, end, color=PHASE_COLOURS[phase], linewidth=0)
        # Recomputation belongs to the backward around it, which would else fall apart into spells too short to name.
        phase = "backward" if phase == "recompute" else phase
        if spells and spells[-1][2] == phase:
            begin = spells.pop()[0]
        spells.append((begin, end, phase))
    for phase in {phase for _, _, phase in spells}:
        begin, end, _ = max((spell for spell in spells if spell[2] == phase), key=lambda spell: spell[1] - spell[0])
        if end - begin > 0.13 * panel.last:
            axes.text((begin + end) / 2, -0.7, phase, ha="center", va="top", fontsize=9, color=FAINT)
    axes.set_xlim(0, panel.last)
    axes.set_ylim(0, 1)
    axes.axis("off")


def _name_areas(panels: list[_Panel], *, top: float) -> set[str]:
    """Write a category's name once, where a window as wide as a word is thickest over all panels; return the named."""
    best: dict[str, tuple[float, _Panel, float, float]] = {}
    for panel in panels:
        starts = range(0, panel.last, max(1, panel.last // 200))
        for left in starts:
            begin, end = bisect_left(panel.clock, left), bisect_right(panel.clock, left + WORD * panel.last)
            if left + WORD * panel.last > panel.last:
                break
            for name, lower, upper in panel.layers:
                floor, ceiling = max(lower[begin:end]), min(upper[begin:end])
                height = (ceiling - floor) / top
                if height > best.get(name, (LINE,))[0]:
                    best[name] = (height, panel, left + WORD * panel.last / 2, (floor + ceiling) / 2)
    for name, (_, panel, x, y) in best.items():
        colour = "white" if name in DARK else INK
        panel.axes.text(x, y, name, ha="center", va="center", fontsize=10, color=colour)
    return set(best)


def _draw_axis(panels: list[_Panel], *, top: float) -> None:
    """Round numbers of one unit on the left; faint lines across every panel."""
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
        if name not in named and max(panel.thickness(name) for panel in panels) > SEEN * top
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
