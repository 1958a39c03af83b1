"""What is allocated, when, by whom, and why: exact live tensor bytes of any training step.

`MemoryRecorder` watches a step on the CPU, on CUDA or on fake tensors; `MemoryReport` says what the peak consisted of;
`plot_reports` draws several side by side, and `write_html` lets one point at their blocks; `allocator_peak` measures
what the allocator took, workspaces included; `largest` finds what fits into a budget without running it, and
`calibrate` makes its answer hold for the allocator.
Imports torch alone; matplotlib is imported when something is drawn.
"""

from memsave.profiler.allocator import allocator_peak
from memsave.profiler.calibration import Calibration, TrainingStep, calibrate
from memsave.profiler.html import write_html
from memsave.profiler.planner import MemoryEstimate, SearchResult, largest, peak_on_fake
from memsave.profiler.plot import plot_reports
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import CATEGORIES, LiveBlock, MemoryReport, Timeline, format_bytes, parse_bytes

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
    "parse_bytes",
    "peak_on_fake",
    "plot_reports",
    "write_html",
]
