"""`MemoryMonitor`: the memory of training steps, recorded and compared with the budget."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from memsave.profiler import MemoryRecorder, MemoryReport, format_bytes, parse_bytes
from memsave.training.loop import State, StepResult


class MemoryMonitor:
    """Records the first steps of a run, or all steps under a budget, and keeps the report with the highest peak.

    Args:
        state: of the run; its model and optimizer are recorded.
        steps: the number of steps to record.
        budget: the most live bytes that a step may hold, such as 16GiB; None for no limit.
    """

    def __init__(self, state: State, *, steps: int, budget: str | None):
        self.state = state
        self.until = state.step + steps
        self.budget = None if budget is None else parse_bytes(budget)
        self.first: MemoryReport | None = None
        self.last: MemoryReport | None = None
        self.worst: MemoryReport | None = None
        self.process_start: int | None = None
        """Bytes of the process before training."""
        self.process_peak: int | None = None
        """Peak bytes of the process during training."""
        self.seconds: list[float] = []  # of each step
        self.token_rates: list[float] = []  # tokens per second of each step with tokens

    def __call__(self, step: int) -> AbstractContextManager:
        """The context in which step number `step` must run."""
        return self._record() if step <= self.until or self.budget is not None else nullcontext()

    def add(self, done: StepResult) -> None:
        """Keep the time and the speed of a step."""
        self.seconds.append(done.seconds)
        if done.tokens:
            self.token_rates.append(done.tokens / done.seconds)

    def excess(self, step: int) -> str | None:
        """A sentence about the last step if its peak was above the budget, otherwise None."""
        if self.budget is None or self.last is None:
            return None
        found = over_budget(self.last, first=self.first, budget=self.budget, step=step)
        self.first = self.first or self.last
        return found

    @contextmanager
    def _record(self) -> Iterator[None]:
        with MemoryRecorder(self.state.model, optimizer=self.state.optimizer) as recorder:
            yield
        report = self.last = recorder.report()
        if self.worst is None or report.peak_bytes > self.worst.peak_bytes:
            self.worst = report


def over_budget(report: MemoryReport, *, first: MemoryReport | None, budget: int, step: int) -> str | None:
    """A sentence about a step whose peak of live memory is above the budget (bytes), otherwise None.

    It names what grew since `first`, the report of an earlier step, or without `first` what is largest.
    """
    if report.peak_bytes <= budget:
        return None
    category, module, size = report.growth(first)
    location = "outside of every module" if module is None else f"in {module or 'the model itself'}"
    amount = f"{format_bytes(size)} {location}"
    cause = f"{category} grew, by {amount}" if first else f"{category} takes the most, {amount}"
    return (
        f"step {step} held {format_bytes(report.peak_bytes)} of live memory, more than the budget of "
        f"{format_bytes(budget)}: {cause}"
    )
