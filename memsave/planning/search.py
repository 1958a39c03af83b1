"""The search of `memory=auto`: predicted bytes and seconds of few fake steps, and the fastest plan that fits.

Two kinds of search, see `TaskDefinition.memory_choices`. Both confirm their answer by a fake step of the whole run.

- Choices by part (a U-Net): one fake step per choice, in which every part has the same mode; then all mixtures are
  estimated (`parts.py`) and confirmed in the order of their predicted time.
- Choices with a micro-batch (a language model): for each choice, the largest micro-batch that fits. The peak grows
  about linearly with the micro-batch, so the first guess is often the answer.

Then the same choices with activations, the optimizer's state or both in host memory are compared with the best plan: a
choice gets a fake step if it may fit and be faster, judged by the bytes that it moves and the rates of their copies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from memsave.config import Config
from memsave.host_bytes import TO_DEVICE, TO_HOST
from memsave.planning.budget import free_host_bytes
from memsave.planning.copies import copy_rates
from memsave.planning.fake_step import fake_step, whole_batch
from memsave.planning.parts import Trace, mixed_peak, mixed_seconds, trace_of
from memsave.planning.plan import host_folder, host_note, widest_calibration
from memsave.profiler import MemoryEstimate, parse_bytes, peak_on_fake
from memsave.profiler.seconds import TimeModel
from memsave.profiler.work import Work, WorkCounter
from memsave.progress import Progress
from memsave.tasks.definition import definition_of

NEAR = 1.05
"""A plan whose predicted time is within 5% of the best possible one ends the search: predictions err by more."""
REST = 0.02
"""A smaller part of the budget that is left is not spent."""
ABOVE = 1.03
"""Mixtures are confirmed although their estimate exceeds the budget by up to 3%, its usual error."""
CLOSE = 3
"""If nothing fits, this number of mixtures with the smallest estimates is measured for the smallest budget."""
SAFE = 0.98
"""The part of the micro-batch that a first estimate gives, and that is tried."""
GUESSES = 8
"""The most micro-batches that are tried for a choice, usually two."""
MOVED = {"activations": "activation", "optimizer": "optimizer"}
"""The category of the bytes that `memory.offload` moves."""
CONSTANT = {"parameter", "buffer", "gradient", "gathered", "optimizer"}
"""The categories whose bytes do not depend on the micro-batch."""


@dataclass(eq=False)
class Trial:
    """A config, and what its fake step predicts."""

    config: Config
    need: MemoryEstimate
    seconds: float
    """Of a logical batch."""
    work: WorkCounter


@dataclass(frozen=True)
class Outlook:
    """What is expected of a choice without micro-batches, from its trial or that of one with less in host memory."""

    choice: Config
    seconds: float
    expected: float
    """The seconds with the micro-batch that is expected to fit."""
    total: int
    """The bytes that the budget must have."""
    constant: int
    """Those of them that do not depend on the micro-batch."""
    host: int
    """The bytes in host memory."""


@dataclass(frozen=True)
class Traced:
    """A trial in which all parts have one mode, and its trace."""

    trial: Trial
    trace: Trace

    def total(self, exact: int) -> int:
        """The bytes that the budget must have for exact bytes, with the workspace of this trial's step."""
        return exact + self.trial.need.total - self.trial.need.exact


@dataclass
class Search:
    """The search for one config: its budget, the fake steps so far, and the rates of this machine."""

    config: Config
    device: torch.device
    budget: int
    folder: Path | None = None
    """Of the run."""
    trials: list[Trial] = field(default_factory=list)
    """All fake steps, in order."""
    times: TimeModel | None = None
    """The rates of all calibrations together, so that all trials are compared by the same ones."""
    traced: list[Traced] = field(default_factory=list)
    """The choices by part that keep everything on the device, or what was given."""
    refused_host_bytes: list[int] = field(default_factory=list)
    """Of plans by part that would fit, if the host had more free memory."""

    def fastest(self) -> Trial | None:
        """The fastest plan that fits; None if there is none."""
        task = definition_of(self.config)
        rounds = task.memory_choices(self.device)
        if task.plans_micro_batch:
            return self.by_micro_batch([choice for choices in rounds for choice in choices])
        return self.by_parts(rounds)

    def trial(self, config: Config) -> Trial:
        """Take a fake step of a config, unless there was one."""
        known = next((trial for trial in self.trials if trial.config == config), None)
        if known is not None:
            return known
        calibration = widest_calibration(config, self.device, folder=self.folder, progress=Progress())
        if calibration.times is not None:
            self._learn(calibration.times)
        work = WorkCounter(definition_of(config).memory_part)
        report = peak_on_fake(lambda: fake_step(config, device=self.device, work=work))
        need = MemoryEstimate(report, calibration.allocator_bytes(report), parse_bytes(config.reserve))
        self.trials.append(Trial(config, need, self._seconds(config, work), work))
        return self.trials[-1]

    def fits(self, trial: Trial) -> bool:
        """Whether it fits into the budget, and what it offloads into host memory."""
        return self._share(trial.need.total, trial.need.host) <= 1

    def _share(self, total: int, host: int) -> float:
        """The part of the budget that a plan needs, or that of the free host memory if it is larger."""
        return max(total / self.budget, host / max(1, self._free_host_bytes))

    def smallest(self) -> int:
        """The smallest sufficient budget of all trials, of those with room in host memory if there are any."""
        fitting = [trial for trial in self.trials if trial.need.host <= self._free_host_bytes]
        return min(trial.need.total for trial in fitting or self.trials)

    def notes(self) -> list[str]:
        """The sentence about a plan that fits into the budget and not into host memory, if there is one."""
        found = [trial.need.host for trial in self.trials if trial.need.total <= self.budget and not self.fits(trial)]
        found += self.refused_host_bytes
        where = host_folder(self.config, self.folder)
        return [host_note(min(found), self._free_host_bytes, self.device, folder=where)] if found else []

    @cached_property
    def _free_host_bytes(self) -> int:
        return free_host_bytes(self.device, folder=host_folder(self.config, self.folder))

    def _learn(self, times: TimeModel) -> None:
        """Predict all trials by the rates of this calibration, too."""
        self.times = times if self.times is None else self.times.with_kinds_of(times)
        for trial in self.trials:
            trial.seconds = self._seconds(trial.config, trial.work)

    def _seconds(self, config: Config, work: WorkCounter) -> float:
        return self._rates.seconds_of(whole_batch(config, work).values())

    @property
    def _rates(self) -> TimeModel:
        return self.times or TimeModel(host=1.0)  # without a calibration, the number of operators

    # Choices by part

    def by_parts(self, rounds: Sequence[Sequence[Config]]) -> Trial | None:
        """The fastest mixture that fits; a round of choices is traced only if the earlier ones give no answer."""
        best = None
        for choices in rounds:
            for choice in choices:
                self.traced.append(self._trace(choice))
                if len(self.traced) == 1 and self.fits(self.traced[0].trial):
                    return self.traced[0].trial  # nothing is recomputed
            best = self._confirmed(self._mixtures(self.traced))
            if best is not None:
                break
        for number in range(len(definition_of(self.config).offloaded_choices(self.config))):
            moved = [each.choice for each in self._hopeful([each.trial for each in self.traced], number, best)]
            if moved:
                best = self._confirmed(self._mixtures([self._trace(choice) for choice in moved]), best)
        return best

    def _trace(self, choice: Config) -> Traced:
        trial = self.trial(choice)
        work = whole_batch(trial.config, trial.work)
        return Traced(trial, trace_of(trial.need.report, work, definition_of(choice).memory_part))

    def _mixtures(self, traced: Sequence[Traced]) -> list[tuple[float, int, Config]]:
        """(predicted seconds, estimated bytes with workspace and reserve, config) of all mixtures, fastest first."""
        traces, choices = [each.trace for each in traced], [each.trial.config for each in traced]
        found = []
        for config, modes in definition_of(self.config).memory_mixtures(choices, list(traces[0].stages)):
            used = set(modes.values())
            if len(used) == 1:  # a choice itself, which has had its fake step
                trial = traced[used.pop()].trial
                found.append((trial.seconds, trial.need.total, config))
                continue
            most = max(traced[mode].total(mixed_peak(traces, modes)) for mode in {0, *used})
            found.append((mixed_seconds(traces, modes, self._rates), most, config))
        return sorted(found, key=lambda each: each[:2])

    def _confirmed(self, mixtures: list[tuple[float, int, Config]], best: Trial | None = None) -> Trial | None:
        """The first mixture that fits by its fake step, or `best` if none is faster.

        Mixtures whose estimates cannot fit are left out. Each fake step corrects the estimates that follow: they are
        raised by its error.
        """
        error = 1 / ABOVE
        for seconds, estimated, config in mixtures:
            if best is not None and seconds >= best.seconds:
                break
            if estimated * error <= self.budget:
                trial = self.trial(config)
                if self.fits(trial) and (best is None or trial.seconds < best.seconds):
                    return trial
                error = max(error, trial.need.total / estimated)
        return best

    def measure_smallest(self) -> None:
        """Take fake steps of the mixtures that may need the least, so that `smallest` names a budget that is enough."""
        for _, estimated, config in sorted(self._mixtures(self.traced), key=lambda each: each[1])[:CLOSE]:
            if estimated < self.smallest():
                self.trial(config)
        least = min((each.trial for each in self.traced), key=lambda trial: trial.need.total)
        for choice in definition_of(self.config).offloaded_choices(least.config)[-1:]:
            self.trial(choice)

    # Choices with a micro-batch

    def by_micro_batch(self, choices: Sequence[Config]) -> Trial | None:
        """The fastest choice with its largest micro-batch that fits; choices do more and more work."""
        best: Trial | None = None
        wholes = []  # without micro-batches
        for choice in choices:
            wholes.append(self.trial(_at(choice, self._most)))
            best = self._faster(self._outlook(wholes[-1].config, wholes[-1]), best)
            if best is not None and best.seconds <= NEAR * wholes[0].seconds:
                break
        numbers = range(len(definition_of(self.config).offloaded_choices(self.config)))
        moved = [outlook for number in numbers for outlook in self._hopeful(wholes, number, best)]
        for outlook in sorted(moved, key=lambda each: each.expected):
            if best is None or NEAR * outlook.expected < best.seconds:
                best = self._faster(outlook, best)
        return None if best is None else self._with_more(best)

    @property
    def _most(self) -> int:
        return 1 if self.config.privacy.option == "direct" else self.config.trainer.batch_size

    def _faster(self, outlook: Outlook, best: Trial | None) -> Trial | None:
        """The largest micro-batch of a choice that fits, or `best` if that is as fast."""
        if best is not None and outlook.seconds >= best.seconds:
            return best  # smaller micro-batches take longer
        found = self._largest(outlook)
        return found if found is not None and (best is None or found.seconds < best.seconds) else best

    def _largest(self, outlook: Outlook) -> Trial | None:
        """The trial with the largest micro-batch that fits, or one that takes about as long as is expected at least.

        Each size is where the line through the last two shares of the budget reaches all of it; the search ends when
        this line excludes the next larger size. Returns None if not even one example fits.
        """
        found, low, high = None, 0, self._most + 1
        points = [(0, outlook.constant / self.budget), (self._most, self._share(outlook.total, outlook.host))]
        for number in range(GUESSES):
            (size, share), (last, its) = points[-2:]
            slope = max((its - share) / (last - size), 1e-12)
            guess = int((last + (1 - its) / slope) * (1.0 if number or its <= 1 else SAFE))
            if low + 1 == high or (found is not None and guess <= low):
                break
            guess = min(max(guess, low + 1), high - 1)
            trial = self.trial(_at(outlook.choice, guess))
            share = self._share(trial.need.total, trial.need.host)
            points = [*(point for point in points if point[0] != guess), (guess, share)]
            if not self.fits(trial):
                high = guess
                continue
            found, low = trial, guess
            if trial.seconds <= NEAR * outlook.seconds:
                break
        return found

    def _with_more(self, best: Trial) -> Trial:
        """The trial, or one that spends the rest of the budget on less work, if that is faster and fits."""
        left = self.budget - best.need.total
        if left < REST * self.budget:
            return best
        for config in definition_of(best.config).memory_spent(best.config, left):
            trial = self.trial(config)
            if self.fits(trial) and trial.seconds < best.seconds:
                best = trial
        return best

    # Choices with host memory

    def _hopeful(self, trials: Sequence[Trial], number: int, best: Trial | None) -> Iterator[Outlook]:
        """Yield the choices of these trials with more in host memory that may fit, and be clearly faster than `best`.

        number: which of `TaskDefinition.offloaded_choices`.
        """
        for plain in trials:
            choices = definition_of(plain.config).offloaded_choices(plain.config)
            choice, less = choices[number], [plain.config, *choices[:number]]
            known = [trial for trial in self.trials if trial.config in less and _moves_less(trial.config, choice)]
            if any(map(self.fits, known)):
                continue  # it is faster than this choice
            outlook = self._outlook(choice, known[-1])
            if best is not None and NEAR * outlook.expected >= best.seconds:
                continue
            by_micro_batch = definition_of(choice).plans_micro_batch
            if (outlook.constant if by_micro_batch else outlook.total) > self.budget:
                continue
            if by_micro_batch or outlook.host <= self._free_host_bytes:
                yield outlook
            else:
                self.refused_host_bytes.append(outlook.host)

    def _outlook(self, choice: Config, trial: Trial) -> Outlook:
        """What is expected of a choice, from its trial or that of one with less in host memory."""
        names = {MOVED[name] for name in choice.memory.offload if name not in trial.config.memory.offload}
        moved, peak = _bytes_of(trial, names), trial.need.report.peak_by_category
        constant = trial.need.reserve + sum(peak.get(name, 0) for name in CONSTANT - names)
        seconds = trial.seconds + (self._copy_seconds(moved) if moved else 0.0)
        expected = seconds + self._seconds_of_splitting(trial, names)
        return Outlook(choice, seconds, expected, trial.need.total - moved, constant, trial.need.host + moved)

    def _seconds_of_splitting(self, whole: Trial, names: set[str]) -> float:
        """The time that the micro-batch takes in addition which fits without these categories, as far as is known.

        By the line of bytes through the whole batch and another micro-batch m, and the time c / m.
        """
        sizes = (trial for trial in self.trials if trial.config.trainer.micro_batch_size != self._most)
        others = [each for each in sizes if _at(each.config, self._most) == whole.config]
        if not others or not definition_of(whole.config).plans_micro_batch:
            return 0.0
        size = others[-1].config.trainer.micro_batch_size or self._most
        total, its = (each.need.total - _bytes_of(each, names) for each in (whole, others[-1]))
        per_example = max(1.0, (total - its) / (self._most - size))
        fitting = min(max(1.0, size + (self.budget - its) / per_example), self._most)
        per_pass = (others[-1].seconds - whole.seconds) / (1 / size - 1 / self._most)
        return per_pass * (1 / fitting - 1 / self._most)

    def _copy_seconds(self, moved: int) -> float:
        """The time to copy bytes to the host and back, as a few large copies."""
        rates = copy_rates(self.device, folder=host_folder(self.config, self.folder))
        return TimeModel(rates).seconds({direction: Work(bytes=moved) for direction in (TO_HOST, TO_DEVICE)})


def _at(config: Config, size: int) -> Config:
    return config.changed({"trainer.micro_batch_size": size})


def _bytes_of(trial: Trial, categories: set[str]) -> int:
    return sum(trial.need.report.peak_by_category.get(name, 0) for name in categories)


def _moves_less(config: Config, other: Config) -> bool:
    return set(config.memory.offload) < set(other.memory.offload)
