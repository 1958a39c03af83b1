"""The timeline as an HTML page: the mouse shows each block of a step with its module, shape and lifetime.

The page is one file with data, style and script, and loads nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memsave.profiler.plot import COLOURS, PHASE_COLOURS, excerpt_of
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import MemoryReport
from memsave.profiler.timeline import CATEGORIES, LiveBlock

PAGE = Path(__file__).with_name("page.html")


@contextmanager
def memory_page(
    model: nn.Module, path: str | PathLike[str] = "memory.html", *, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[MemoryRecorder]:
    """Context manager that records what runs within, such as one training step, and writes the page.

    with memory_page(model, "memory.html", optimizer=optimizer):
        step()
    """
    with MemoryRecorder(model, optimizer=optimizer) as recorder:
        yield recorder
    write_html({"step": recorder.report()}, path)


def write_html(reports: Mapping[str, MemoryReport], path: str | PathLike[str], *, title: str = "Live memory") -> None:
    """Write one page with a chart for each report, all on the same memory axis.

    Args:
        reports: the reports by title.
        path: the file to write.
        title: the title of the page.
    """
    if not reports:
        raise ValueError("got 0 reports to show and at least 1 is needed: pass {name: report}")
    data = {
        "charts": [_chart(name, report) for name, report in reports.items()],
        "categories": list(CATEGORIES),
        "colours": [COLOURS[name] for name in CATEGORIES],
        "phases": PHASE_COLOURS,
    }
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")  # no string may close the script element
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("TITLE", escape(title)).replace('"DATA"', text)
    Path(path).write_text(page, encoding="utf-8")


def _chart(name: str, report: MemoryReport) -> dict[str, Any]:
    """The data that the script draws: the blocks alive in the first state, then one change per event."""
    excerpt = excerpt_of(report)
    timeline = excerpt.timeline
    used = sorted({*(block for block, _ in timeline.alive), *timeline.blocks})
    indices = {block: index for index, block in enumerate(used)}
    return {
        "name": name + excerpt.note,
        "peak": report.peak_bytes,
        "start": [[indices[block], size] for block, size in timeline.alive],
        "events": [[indices[block], delta] for block, delta in zip(timeline.blocks, timeline.deltas, strict=True)],
        "phases": timeline.phases,
        "blocks": [_block(report.history[block]) for block in used],
    }


def _block(block: LiveBlock) -> list[Any]:
    """[category, module, shape, dtype, phase, device]"""
    module = "outside of every module" if block.module is None else block.module or "the model itself"
    shape = "x".join(map(str, block.shape)) or "scalar"
    return [CATEGORIES.index(block.category), module, shape, block.dtype, block.phase, block.device]
