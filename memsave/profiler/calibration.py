"""What the allocator takes over the live tensors: found in one small real step, applied to any size.

`MemoryRecorder` counts tensors. Operators take memory inside themselves, too: copies in another layout, workspaces of
convolutions. What is taken so at the peak is in proportion to the largest tensor of the step, whatever the depth, the
volume or the way in which activations are kept (`experiments/planning` shows how closely), and so

    allocator bytes = exact bytes + workspace_ratio * bytes of the largest activation or temporary .

The ratio depends on machine, device, dtype and family of models, and is measured for each.
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


class TrainingStep(NamedTuple):
    """A training step that can be taken: forward, backward, optimizer."""

    model: nn.Module
    run: Callable[[], object]
    """Takes one step, and leaves no gradient behind."""
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Calibration:
    """How allocator bytes follow from exact ones."""

    workspace_ratio: float = 0.0
    """Bytes taken inside operators at the peak, for each byte of the largest activation or temporary."""

    def allocator_bytes(self, report: MemoryReport) -> int:
        """What the allocator takes for such a step."""
        return report.peak_bytes + round(self.workspace_ratio * report.largest_block_bytes)


def calibrate(step: Callable[[], TrainingStep], *, device: torch.device | str = "cpu") -> Calibration | None:
    """Take a small real step and compare what the allocator took with what the recorder counted.

    The step runs under the recorder and under the allocator's measurement, once the optimizer has its state.
    None where no allocator answers (see `allocator_peak`).
    """
    made = step()
    if not has_state(made.optimizer):
        made.run()
    with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
        made.run()
    report = recorder.report()
    taken = allocator_peak(made.run, device=device)
    if taken is None:
        return None
    excess = report.start_bytes + taken - report.peak_bytes
    return Calibration(workspace_ratio=max(0.0, excess / max(1, report.largest_block_bytes)))


def has_state(optimizer: torch.optim.Optimizer | None) -> bool:
    """Have the optimizer make its state, from gradients that are all there; False where that takes more."""
    if optimizer is None:
        return False
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except TypeError:  # it wants a closure
        return False
    finally:
        optimizer.zero_grad()
    return True


def read_calibrations(path: Path) -> dict[str, Any]:
    """What `write_calibration` wrote, by key; empty where there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_calibration(path: Path, key: str, calibration: Calibration, *, notes: Mapping[str, Any]) -> None:
    """Keep a calibration under its key, with notes for people, beside those that are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**read_calibrations(path), key: {**asdict(calibration), **notes}}
    write_json(path, content, sort_keys=True)
