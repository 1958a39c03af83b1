"""Memory profiler: the exact live tensor bytes of a training step, by time, module and category.

`MemoryRecorder` records a step on the CPU, on CUDA or on fake tensors. `MemoryReport` lists the contents of the peak.
`plot_reports` draws several reports side by side, and `write_html` writes an interactive page of them; `memory_page`
records what runs within it and writes the page.
`allocator_peak` measures the bytes that the allocator took, workspaces included. `largest` searches for the largest
size that fits into a budget without running it, and `calibrate` corrects its answer for the allocator.

Imports only torch; matplotlib is imported when a picture is drawn.
"""

from memsave.profiler.allocator import allocator_peak
from memsave.profiler.calibration import Calibration, TrainingStep, calibrate
from memsave.profiler.html import memory_page, write_html
from memsave.profiler.planner import MemoryEstimate, SearchResult, largest, peak_on_fake
from memsave.profiler.plot import plot_reports
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import MemoryReport
from memsave.profiler.sizes import format_bytes, parse_bytes
from memsave.profiler.timeline import CATEGORIES, LiveBlock, Timeline

__all__ = [
    "CATEGORIES",
    "Calibration",
    "LiveBlock",
    "MemoryEstimate",
    "MemoryRecorder",
    "MemoryReport",
    "SearchResult",
    "Timeline",
    "TrainingStep",
    "allocator_peak",
    "calibrate",
    "format_bytes",
    "largest",
    "memory_page",
    "parse_bytes",
    "peak_on_fake",
    "plot_reports",
    "write_html",
]
