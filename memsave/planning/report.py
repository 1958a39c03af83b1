"""A plan as text and picture: lines for the terminal, `plan.md` and `plan.png`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memsave.planning.plan import Plan, Row
from memsave.profiler import CATEGORIES, format_bytes
from memsave.profiler.plot import COLOURS, DARK, FAINT, INK

WORKSPACE_COLOUR = "#c98a86"
MIN_SHARE = 0.004  # of the width; thinner parts are not in the legend


def lines(plan: Plan) -> Iterator[str]:
    """The lines of the table for the terminal, and an explanation of its columns."""
    cells = [_heads(plan), *(_cells(plan, row) for row in plan.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"each step: {_fixed(plan)}"
    host = "; host: offloaded bytes, beside these" if _uses_host(plan) else ""
    yield (
        "exact: live tensors, predicted on fake tensors; calibrated: exact plus the workspace of operators; "
        f"calibrated plus reserve must fit{host}; time: of one batch on this machine, from the work of its operators"
    )
    yield from plan.notes


def markdown(plan: Plan) -> str:
    """The plan as a Markdown table, with the categories of the peak."""
    names = [name for name in CATEGORIES if any(row.need.report.peak_by_category[name] for row in plan.rows)]
    heads = [*_heads(plan), *names]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in plan.rows:
        peak = row.need.report.peak_by_category
        rows.append("| " + " | ".join([*_cells(plan, row), *(format_bytes(peak[name]) for name in names)]) + " |")
    budget = "" if plan.budget is None else f" in {format_bytes(plan.budget)}"
    notes = "".join(f"\n{note}.\n" for note in plan.notes)
    return f"# What fits{budget}\n\nPredicted on fake tensors; nothing was trained. Each step: {_fixed(plan)}.\n\n" + (
        "\n".join(rows) + "\n" + notes
    )


def _fixed(plan: Plan) -> str:
    """The sizes of a step, and whose bytes these are."""
    return ", ".join(filter(None, [plan.fixed, plan.processes and f"bytes of {plan.processes}"]))


def _uses_host(plan: Plan) -> bool:
    """Whether a strategy keeps bytes in host memory."""
    return any(row.need.host for row in plan.rows)


def _heads(plan: Plan) -> list[str]:
    first = (
        ["strategy"] if plan.budget is None else ["strategy", "fits" if plan.vary is None else f"largest {plan.vary}"]
    )
    last = [] if plan.vary is None else ["one step above"]
    host = ["host"] if _uses_host(plan) else []
    return [
        *first,
        "exact",
        "calibrated",
        "reserve",
        *host,
        *last,
        "time of a step, predicted",
        "one fake step",
    ]


def _cells(plan: Plan, row: Row) -> list[str]:
    cells = [row.strategy]
    if plan.vary is not None:
        cells.append(row.described or f"none: {format_bytes(row.need.total)} for the smallest")
    elif plan.budget is not None:
        cells.append("yes" if row.fits else "no")
    cells += [format_bytes(each) for each in (row.need.exact, row.need.calibrated, row.need.reserve)]
    cells += [format_bytes(row.need.host)] if _uses_host(plan) else []
    if plan.vary is not None:
        above = None if row.answer is None else row.answer.above
        cells.append(f"not tried: {row.limit}" if row.limit else "")
        if above is not None:
            cells[-1] = f"{row.next_size}: {format_bytes(above.total)}"
    step = "not calibrated" if row.step_seconds is None else f"{row.step_seconds:.3g} s"
    return [*cells, step, f"{row.seconds:.1f} s"]


def draw(plan: Plan, path: Path) -> None:
    """Draw the categories of each strategy's peak as a bar, and the budget as a line."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9.0, 1.45 + 0.62 * len(plan.rows)), dpi=160, facecolor="white")
    axes = figure.add_axes((0.19, 0.55 / figure.get_figheight(), 0.79, 1 - 1.3 / figure.get_figheight()))
    legend: dict[str, str] = {}
    for number, row in enumerate(plan.rows):
        left = 0
        for name, size, colour in _parts(row):
            if size:
                axes.barh(number, size, left=left, height=0.62, color=colour, linewidth=0)
                if size > MIN_SHARE * _right(plan):
                    legend[name] = colour
                if size > 0.11 * _right(plan):
                    ink = "white" if name in DARK else INK
                    axes.text(left + size / 2, number, name, ha="center", va="center", fontsize=9, color=ink)
                left += size
        beside = max(left, plan.budget or 0) + 0.012 * _right(plan)
        axes.text(beside, number, _note(plan, row), va="center", fontsize=9.5, color=INK)
    if plan.budget is not None:
        axes.axvline(plan.budget, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(plan.budget, -0.58, f"budget {format_bytes(plan.budget)}", ha="center", fontsize=9, color=INK)
    axes.set_xlim(0, _right(plan))
    axes.set_ylim(len(plan.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(plan.rows)), [row.strategy for row in plan.rows], fontsize=10, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
    figure.legend(handles=handles, loc="lower left", ncols=max(1, len(handles)), frameon=False, fontsize=8.5,
                  labelcolor=INK, handlelength=1.0, handleheight=1.0, bbox_to_anchor=(0.18, 0.0))  # fmt: skip
    top = 1 - 0.32 / figure.get_figheight()
    title = "Peak of one training step" if plan.vary is None else f"The largest {plan.vary} that fits"
    figure.text(0.02, top, title, fontsize=12.5, color=INK, weight="bold")
    figure.text(
        *(0.98, 1 - 0.3 / figure.get_figheight()),
        f"{_fixed(plan)}; predicted on fake tensors",
        fontsize=9,
        color=FAINT,
        ha="right",
    )
    figure.savefig(path)


def _parts(row: Row) -> Sequence[tuple[str, int, str]]:
    """(name, bytes, colour) of the parts of a bar, from left to right."""
    own: list[Any] = [(name, row.need.report.peak_by_category[name], COLOURS[name]) for name in CATEGORIES]
    workspace = row.need.calibrated - row.need.exact
    return [*own, ("workspace", workspace, WORKSPACE_COLOUR), ("reserve", row.need.reserve, "#eef0f2")]


def _right(plan: Plan) -> float:
    return max([plan.budget or 0, *(row.need.total for row in plan.rows)]) * (
        1.65 if any(row.limit for row in plan.rows) else 1.45
    )


def _note(plan: Plan, row: Row) -> str:
    total = format_bytes(row.need.total)
    if plan.vary is None:
        return total
    if not row.size:
        return f"none fits: {total} at the smallest"
    timed_out = row.answer is not None and row.answer.timed_out
    limit = "search ended by its time limit" if timed_out else row.limit
    return f"{row.described}, {total}" + (f"\n{limit}" if limit else "")
