"""What is allocated, when, by whom, and why: exact live tensor bytes of any training step.

`MemoryRecorder` watches a step on the CPU, on CUDA or on fake tensors; `MemoryReport` says what the peak consisted of;
`plot_reports` draws several side by side; `allocator_peak` measures what the allocator took, workspaces included.
Imports torch alone; matplotlib is imported when something is drawn.
"""

from memsave.profiler.allocator import allocator_peak
from memsave.profiler.plot import plot_reports
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import CATEGORIES, LiveBlock, MemoryReport, Timeline, format_bytes, parse_bytes

__all__ = [
    "CATEGORIES",
    "LiveBlock",
    "MemoryRecorder",
    "MemoryReport",
    "Timeline",
    "allocator_peak",
    "format_bytes",
    "parse_bytes",
    "plot_reports",
]
