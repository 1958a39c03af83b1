"""Calibration: the ratio of allocator bytes to live bytes, measured in one small real step and applied to any size.

`MemoryRecorder` counts tensors. Operators also allocate memory internally: copies in another memory format, workspaces
of convolutions. At the peak this memory is proportional to the largest tensor of the step, independent of the depth,
the volume and the memory mode (`experiments/planning` measures how closely). Therefore

    allocator bytes = exact bytes + workspace_ratio * bytes of the largest activation or temporary

The ratio depends on machine, device, dtype and family of models, and is measured for each of them. The same small step
gives the rates of `memsave.profiler.seconds`, which predict the time of a step.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from memsave.files import write_json
from memsave.profiler.allocator import allocator_peak
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import MemoryReport
from memsave.profiler.seconds import TimeModel, measure_times
from memsave.profiler.work import WorkCounter


class TrainingStep(NamedTuple):
    """A training step that can be run: forward, backward, optimizer."""

    model: nn.Module
    run: Callable[[], object]
    """Runs one step and releases the gradients."""
    optimizer: torch.optim.Optimizer | None = None
    work: WorkCounter | None = None
    """Counts the work of a step on fake tensors, if given."""


@dataclass(frozen=True)
class Calibration:
    """Computes allocator bytes from exact bytes, and seconds from work."""

    workspace_ratio: float = 0.0
    """Bytes that operators allocate internally at the peak, per byte of the largest activation or temporary."""
    times: TimeModel | None = None
    """None if no time was measured."""

    def allocator_bytes(self, report: MemoryReport) -> int:
        """The predicted peak of the allocator for the step of this report."""
        return report.peak_bytes + round(self.workspace_ratio * report.largest_block_bytes)


def calibrate(
    step: Callable[[], TrainingStep], *, device: torch.device | str = "cpu", timed: bool = True
) -> Calibration | None:
    """Run a small real step and compare the peak of the allocator with that of the recorder.

    The step runs once with `MemoryRecorder` and once with `allocator_peak`, after the optimizer has created its state,
    and then, if `timed`, a few times for `measure_times`. Returns None if `allocator_peak` does.
    """
    small = step()
    if not create_state(small.optimizer):
        small.run()
    with MemoryRecorder(small.model, optimizer=small.optimizer) as recorder:
        small.run()
    report = recorder.report()
    peak = allocator_peak(small.run, device=device)
    if peak is None:
        return None
    excess = report.start_bytes + peak - report.peak_bytes
    times = measure_times(small.run, device=torch.device(device)) if timed else None
    return Calibration(max(0.0, excess / max(1, report.largest_block_bytes)), times)


def create_state(optimizer: torch.optim.Optimizer | None) -> bool:
    """Create the optimizer's state by a step with zero gradients; False without one, or if it needs a closure."""
    if optimizer is None:
        return False
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except TypeError:  # it needs a closure
        return False
    finally:
        optimizer.zero_grad()
    return True


def calibration_from(content: Mapping[str, Any]) -> Calibration:
    """The calibration in an entry of the file, without the times of an earlier version, which have other rates."""
    times = content.get("times") or {}
    return Calibration(content["workspace_ratio"], TimeModel.from_dict(times) if "largest" in times else None)


def read_calibrations(path: Path) -> dict[str, Any]:
    """The contents of the file that `write_calibration` writes, by key; empty if it does not exist."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_calibration(path: Path, key: str, calibration: Calibration, *, notes: Mapping[str, Any]) -> None:
    """Add or replace the calibration of `key` in the file, with notes for readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in asdict(calibration).items() if value is not None}
    content = {**read_calibrations(path), key: {**own, **notes}}
    write_json(path, content, sort_keys=True)
