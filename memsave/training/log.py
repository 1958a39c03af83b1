"""The log of a run: `metrics.jsonl`, one JSON object a line, and optionally TensorBoard events."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memsave.files import flush, parse_json, replacing
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
        self.scores_before: dict[str, float] = {}
        """The scores before the first step, of a run that is continued in its folder."""
        self.scores: dict[str, float] = {}
        """The scores after step `step`, of such a run; empty if it ended before it wrote them."""
        self.events: Any = None
        if not self.writes:
            return
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)  # a power cut leaves any bytes
            kept = [line for line in lines if step and _step_of(line) <= step]
            with replacing(self.path) as draft:
                draft.write_text("".join(kept))
            self.scores_before = _scores_before(kept)
            self.scores = _scores_of(kept, step)
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

    def flush(self) -> None:
        """Flush the lines to the disk. A power cut then loses no line of a step that a later checkpoint contains."""
        if self.writes and self.path.exists():
            flush(self.path)


def _step_of(line: str) -> float:
    """The step of a line; infinity for an incomplete line."""
    try:
        return parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _scores_before(lines: Sequence[str]) -> dict[str, float]:
    """The entries of step 0 whose names end in _before."""
    found = [parse_json(line) for line in lines if _step_of(line) == 0]
    return {name: value for each in found for name, value in each.items() if name.endswith("_before")}


def _scores_of(lines: Sequence[str], step: int) -> dict[str, float]:
    """The scores after a step, whose line has no learning rate."""
    found = [parse_json(line) for line in lines if _step_of(line) == step]
    return {key: value for each in found if "lr" not in each for key, value in each.items() if key != "step"}
