"""Checks whose outcome is known to the device alone.

Reading a value of a GPU waits until it has done all work so far. The checks of a forward are therefore read together,
after the backward that gives the norms and before anything is added to `.grad`. On the CPU they are read at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memsave.ghost.gradients import has_values
from memsave.ghost.refusals import Refusal, raise_refusals

Explain = Callable[[], list[Refusal]]


class LateChecks:
    """The checks of one forward that are not read yet."""

    def __init__(self) -> None:
        self._checks: list[tuple[Tensor, Explain]] = []

    def add(self, passed: Tensor, explain: Explain) -> list[Refusal]:
        """The refusals of a failed check, `explain()`, if they are known now; `passed`: a bool without dimensions."""
        if is_slow_to_read(passed):
            self._checks.append((passed, explain))
            return []
        return [] if not has_values(passed) or bool(passed) else explain()

    def all_true(self, values: Tensor) -> bool:
        """Whether all of the bools are True; raises ValueError if a check has failed. Both by one read."""
        checks, self._checks = self._checks, []
        if not has_values(values):
            return True
        flags = torch.stack([values.all(), *(passed.to(values.device) for passed, _ in checks)])
        first, *others = flags.tolist()
        failed = [explain for passed, (_, explain) in zip(others, checks, strict=True) if not passed]
        raise_refusals([each for explain in failed for each in explain()])
        return bool(first)

    def raise_failed(self) -> None:
        """Raise ValueError if a check has failed."""
        if self._checks:
            self.all_true(self._checks[0][0])


def is_slow_to_read(tensor: Tensor) -> bool:
    """Whether reading the values waits for a device."""
    return tensor.device.type != "cpu"
