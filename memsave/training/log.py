"""The log of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard's events beside it when asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsave.training.result import append_line


class RunLog:
    """Writes what is measured by the step that it was measured at."""

    def __init__(self, folder: Path, *, tensorboard: bool = False, anew: bool = False):
        self.path = folder / "metrics.jsonl"
        if anew:  # another run may have been there
            self.path.unlink(missing_ok=True)
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"))

    def write(self, content: Mapping[str, Any]) -> None:
        """One line; its entry `step` is the horizontal axis of the events."""
        append_line(self.path, content)
        if self.events is not None:
            for name, value in content.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, content["step"])
            self.events.flush()
