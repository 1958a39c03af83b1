"""Bytes and seconds of a step on the GPU."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from experiments.record import median
from memsave.profiler import allocator_peak

DEVICE = torch.device("cuda")
Step = Callable[[], object]


WARM_UP = 2
SECONDS = 4.0  # in which steps are timed


def measure(steps: Mapping[str, Step], *, repeats: int) -> dict[str, dict[str, Any]]:
    """By name: the peak of the allocator above the start of the step, and the median time of steps in turn.

    Every step is timed `repeats` times, or less often if that would take longer than `SECONDS`. A step that does not
    fit into the memory of the card, or that fails otherwise, has an "error" instead.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        try:
            for _ in range(WARM_UP):
                step()
            torch.cuda.synchronize()
            rows[name] = {"peak_bytes": allocator_peak(step, device=DEVICE)}
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            rows[name] = {"error": type(error).__name__, "message": str(error).splitlines()[0][:200]}
        free()
        print(f"  {name}: {rows[name]}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name, row in rows.items() if "error" not in row}
    started = time.perf_counter()
    for done in range(repeats):
        if done and (time.perf_counter() - started) * (done + 1) / done > SECONDS:
            break
        for name in seconds:
            seconds[name].append(timed(steps[name]))
    for name, taken in seconds.items():
        rows[name] |= {"seconds": median(taken), "rounds": taken}
        print(f"  {name}: {rows[name]['seconds'] * 1000:.1f} ms", flush=True)
    return rows


def timed(step: Step) -> float:
    """Seconds of one step, by the events of the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def free() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    torch.cuda.empty_cache()
