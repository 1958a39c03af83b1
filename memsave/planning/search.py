"""The search of `memory=auto`: predicted bytes and seconds of few fake steps, and the fastest plan that fits.

Two kinds of search, see `TaskDefinition.memory_choices`. Both confirm their answer by a fake step of the whole run.

- Choices by part (a U-Net): one fake step per choice, in which every part has the same mode; then all mixtures are
  estimated (`parts.py`) and confirmed in the order of their predicted time.
- Choices with a micro-batch (a language model): for each choice, the largest micro-batch that fits. The peak is a
  maximum of linear functions of the micro-batch, so the line between two sizes lies above it and gives a safe size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from memsave.config import Config
from memsave.planning.fake_step import fake_step, whole_batch
from memsave.planning.parts import Trace, mixed_peak, mixed_seconds, trace_of
from memsave.planning.plan import widest_calibration
from memsave.profiler import MemoryEstimate, parse_bytes, peak_on_fake
from memsave.profiler.planner import search
from memsave.profiler.seconds import TimeModel
from memsave.profiler.work import WorkCounter
from memsave.progress import Progress
from memsave.tasks.definition import definition_of

NEAR = 1.02
"""A plan whose predicted time is within 2% of the best possible one ends the search."""
ABOVE = 1.03
"""Mixtures are confirmed although their estimate exceeds the budget by up to 3%, its usual error."""
CLOSE = 3
"""If nothing fits, this number of mixtures with the smallest estimates is measured for the smallest budget."""


@dataclass(frozen=True)
class Trial:
    """A config, and what its fake step predicts."""

    config: Config
    need: MemoryEstimate
    seconds: float
    """Of a logical batch."""
    work: WorkCounter


@dataclass
class Search:
    """The search for one config: its budget, the fake steps so far, and the rates of this machine."""

    config: Config
    device: torch.device
    budget: int
    trials: list[Trial] = field(default_factory=list)
    """All fake steps, in order."""
    times: TimeModel | None = None
    """The rates of all calibrations together, so that all trials are compared by the same ones."""

    def trial(self, config: Config) -> Trial:
        """Take a fake step of a config."""
        calibration = widest_calibration(config, self.device, progress=Progress())
        if calibration.times is not None:
            self.times = calibration.times if self.times is None else self.times.with_kinds_of(calibration.times)
        work = WorkCounter(definition_of(config).memory_part)
        report = peak_on_fake(lambda: fake_step(config, device=self.device, work=work))
        need = MemoryEstimate(report, calibration.allocator_bytes(report), parse_bytes(config.reserve))
        self.trials.append(Trial(config, need, self._seconds(config, work), work))
        return self.trials[-1]

    def fits(self, trial: Trial) -> bool:
        """Whether it fits into the budget."""
        return trial.need.total <= self.budget

    def smallest(self) -> int:
        """The smallest sufficient budget of all trials."""
        return min(trial.need.total for trial in self.trials)

    def _seconds(self, config: Config, work: WorkCounter) -> float:
        total = whole_batch(config, work)
        return (self.times or TimeModel(host=1.0)).seconds(total)  # without a calibration, the number of operators

    # Choices by part

    def by_parts(self, rounds: Sequence[Sequence[Config]]) -> Trial | None:
        """The fastest mixture that fits; a round of choices is traced only if the earlier ones give no answer."""
        traced: list[Config] = []
        traces: list[Trace] = []
        totals: list[Callable[[int], int]] = []
        for choices in rounds:
            for choice in choices:
                trial = self.trial(choice)
                if not traced and self.fits(trial):
                    return trial  # nothing is recomputed
                traced.append(choice)
                traces.append(trace_of(trial.need.report, trial.work, definition_of(choice).memory_part))
                totals.append(_scaled(trial))
            found = self._confirmed(self._mixtures(traced, traces, totals))
            if found is not None:
                return found
        return None

    def _mixtures(
        self, traced: Sequence[Config], traces: Sequence[Trace], totals: Sequence[Callable[[int], int]]
    ) -> list[tuple[float, int, Config]]:
        """(predicted seconds, estimated bytes with workspace and reserve, config) of all mixtures, fastest first."""
        times = self.times or TimeModel(host=1.0)
        found = []
        for config, modes in definition_of(self.config).memory_mixtures(traced, list(traces[0].stages)):
            most = max(totals[mode](mixed_peak(traces, modes)) for mode in {0, *modes.values()})
            found.append((mixed_seconds(traces, modes, times), most, config))
        return sorted(found, key=lambda each: each[:2])

    def _confirmed(self, mixtures: list[tuple[float, int, Config]]) -> Trial | None:
        """The first mixture that fits by its fake step; those whose estimates cannot fit are left out.

        Each fake step corrects the estimates that follow: they are raised by its error.
        """
        seen = {id(trial.config): trial for trial in self.trials}
        error = 1 / ABOVE
        for _, estimated, config in mixtures:
            if estimated * error <= self.budget:
                trial = seen.get(id(config)) or self.trial(config)
                if self.fits(trial):
                    return trial
                error = max(error, trial.need.total / estimated)
        return None

    def measure_smallest(self, rounds: Sequence[Sequence[Config]]) -> None:
        """Take fake steps of the mixtures that may need the least, so that `smallest` names a budget that is enough."""
        traced = [choice for choices in rounds for choice in choices]
        first = {id(trial.config): trial for trial in self.trials}
        traces = [
            trace_of(first[id(each)].need.report, first[id(each)].work, definition_of(each).memory_part)
            for each in traced
        ]
        mixtures = self._mixtures(traced, traces, [_scaled(first[id(each)]) for each in traced])
        for _, estimated, config in sorted(mixtures, key=lambda each: each[1])[:CLOSE]:
            if estimated < self.smallest() and id(config) not in first:
                self.trial(config)

    # Choices with a micro-batch

    def by_micro_batch(self, choices: Sequence[Config]) -> Trial | None:
        """The fastest choice with its largest micro-batch that fits; choices do more and more work."""
        most = 1 if self.config.privacy.option == "direct" else self.config.trainer.batch_size
        best: Trial | None = None
        least = 0.0
        for choice in choices:
            whole = self.trial(_at(choice, most))
            least = least or whole.seconds
            if best is not None and whole.seconds >= best.seconds:
                continue  # smaller micro-batches take longer
            found = whole if self.fits(whole) else self._largest(choice, whole, most)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
            if best is not None and best.seconds <= NEAR * least:
                break
        return None if best is None else self._with_more(best)

    def _largest(self, choice: Config, whole: Trial, most: int) -> Trial | None:
        """The trial with the largest micro-batch below `most` that fits; None if not even one example fits."""
        if most == 1:
            return None
        one = self.trial(_at(choice, 1))
        if not self.fits(one):
            return None
        tried = {1: one, most: whole}

        def total(size: int) -> int:
            if size not in tried:
                tried[size] = self.trial(_at(choice, size))
            return tried[size].need.total

        share = (self.budget - one.need.total) / (whole.need.total - one.need.total)
        start = max(1, int(1 + share * (most - 1)))
        size = search(range(1, most), total, limit=self.budget, start=start)
        return None if size is None else tried[size]

    def _with_more(self, best: Trial) -> Trial:
        """The trial, or one that spends the rest of the budget on less work, if that is faster and fits."""
        for config in definition_of(best.config).memory_spent(best.config, self.budget - best.need.total):
            trial = self.trial(config)
            if self.fits(trial) and trial.seconds < best.seconds:
                best = trial
        return best

    # Choices of the last resort

    def first_that_fits(self, choices: Sequence[Config]) -> Trial | None:
        """The first choice that fits, with its largest micro-batch. Their copies to the host have no predicted time."""
        for choice in choices:
            if definition_of(choice).plans_micro_batch:
                found = self.by_micro_batch([choice])
            else:
                trial = self.trial(choice)
                found = trial if self.fits(trial) else None
            if found is not None:
                return found
        return None


def _at(config: Config, size: int) -> Config:
    return config.changed({"trainer.micro_batch_size": size})


def _scaled(trial: Trial) -> Callable[[int], int]:
    """A function from exact bytes to those that the budget must have, with the workspace of this trial's step."""
    more = trial.need.total - trial.need.exact
    return lambda exact: exact + more
