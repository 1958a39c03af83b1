"""The timeline as a page: every block of a step under the mouse, with its module, shape and life.

The page needs nothing but itself: data, style and script stand in one file, and nothing is fetched.
"""

import json
from collections.abc import Mapping
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from memsave.profiler.plot import COLOURS, PHASE_COLOURS, around_the_peak
from memsave.profiler.report import CATEGORIES, LiveBlock, MemoryReport

PAGE = Path(__file__).with_name("page.html")


def write_html(reports: Mapping[str, MemoryReport], path: str | PathLike[str], *, title: str = "Live memory") -> None:
    """Write one page with a chart for each report, all on the same memory axis.

    Args:
        reports: what to call each recording, and its report.
        path: where to save.
        title: of the page.
    """
    if not reports:
        raise ValueError("got 0 reports to show and at least 1 is needed: pass {name: report}")
    data = {
        "charts": [_chart(name, report) for name, report in reports.items()],
        "categories": list(CATEGORIES),
        "colours": [COLOURS[name] for name in CATEGORIES],
        "phases": PHASE_COLOURS,
    }
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")  # no string ends the script
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("TITLE", escape(title)).replace('"DATA"', text)
    Path(path).write_text(page, encoding="utf-8")


def _chart(name: str, report: MemoryReport) -> dict[str, Any]:
    """What the script draws a report from: the blocks alive at first, then one change an event."""
    shown, forwards = around_the_peak(report)
    timeline = shown.timeline
    used = sorted({*(block for block, _ in timeline.alive), *timeline.blocks})
    places = {block: place for place, block in enumerate(used)}
    return {
        "name": name if forwards == 1 else f"{name} (one of {forwards} micro-batches)",
        "peak": report.peak_bytes,
        "start": [[places[block], size] for block, size in timeline.alive],
        "events": [[places[block], delta] for block, delta in zip(timeline.blocks, timeline.deltas, strict=True)],
        "phases": timeline.phases,
        "blocks": [_block(report.history[block]) for block in used],
    }


def _block(block: LiveBlock) -> list[Any]:
    """[category, module, shape, dtype, phase, device]"""
    module = "outside of every module" if block.module is None else block.module or "the model itself"
    shape = "x".join(map(str, block.shape)) or "scalar"
    return [CATEGORIES.index(block.category), module, shape, block.dtype, block.phase, block.device]
