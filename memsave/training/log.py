"""The log of a run: `metrics.jsonl`, one JSON object a line, and optionally TensorBoard events."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsave.processes import process_rank
from memsave.training.result import append_line


class RunLog:
    """Writes the measurements of each step.

    Args:
        folder: the run's folder.
        tensorboard: also write TensorBoard events.
        step: the number of steps taken so far; lines of later steps, which will be taken again, are removed.

    Of several processes, only rank 0 writes.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, step: int = 0):
        self.path = folder / "metrics.jsonl"
        self.writes = process_rank() == 0
        self.events: Any = None
        if not self.writes:
            return
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if step and _step_of(line) <= step]
            self.path.write_text("".join(kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"))

    def write(self, content: Mapping[str, Any]) -> None:
        """Append one line; its key `step` is the horizontal axis of the TensorBoard events."""
        if not self.writes:
            return
        append_line(self.path, content)
        if self.events is not None:
            for name, value in content.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, content["step"])
            self.events.flush()


def _step_of(line: str) -> float:
    """The step of a line; infinity for an incomplete line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
