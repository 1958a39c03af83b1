"""The epsilon spent so far, for the logs of a training."""

import math

from memsave.privacy.gradients import PrivateGradients

LOOKAHEAD = 1.2  # epsilon grows with the root of the steps, so the logged bound is at most about 10% too high


class EpsilonMonitor:
    """An upper bound of the epsilon spent so far: the epsilon of up to `LOOKAHEAD` times the steps taken.

    PRV accounting takes up to a second, so epsilon is computed only when the steps exceed those of the last bound.
    """

    def __init__(self, private: PrivateGradients, *, steps: int):
        self.private = private
        self.steps = steps
        """All steps of the training, beyond which the bound does not look ahead."""
        self._bound_steps, self._bound = 0, 0.0

    def bound(self) -> float:
        """Infinity for a run with a known seed, which is not private."""
        if self.private.seeded:
            return math.inf
        taken = self.private.steps
        if taken > self._bound_steps:
            self._bound_steps = max(taken, min(int(LOOKAHEAD * taken), self.steps))
            self._bound = self.private.mechanism.epsilon(self._bound_steps)
        return self._bound

    def metrics(self) -> dict[str, float]:
        """`epsilon` for a line of the log; empty if the run has no guarantee."""
        bound = self.bound()
        return {"epsilon": bound} if bound < math.inf else {}
