"""Memory and time of each memory mode, measured on one batch and with the model of the run.

`MemoryRecorder` counts the live bytes; steps without the recorder give the time. The state of the run does not change:
parameters, gradients, memory mode and random state are restored.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from memsave.config.schema import TrainerConfig
from memsave.models.language import is_checkpointing, set_checkpointing
from memsave.models.padding import base_of
from memsave.processes import alone
from memsave.profiler import MemoryRecorder, MemoryReport, allocator_peak, format_bytes
from memsave.random_state import get_random_state, set_random_state
from memsave.training.loop import State, accumulate, autocast, evaluating, summed_loss
from memsave.training.memory_error import is_out_of_memory
from memsave.training.sharding import whole
from memsave.training.task import Batch, Task, examples, split

FORWARDS = 4  # estimated time of a step in forwards: forward, recomputation, and a backward of two
SHORT_SECONDS = 10.0  # a forward below it is timed twice
RECORDED_STEPS = 2  # one with the recorder, one for the peak of the allocator
TIMED_ROUNDS = 2
UNTIMED_STEPS = 3  # of a private run: in these the clipper checks that examples do not mix
PLAIN = "without privacy"
"""Name of the measurement of a private run's memory mode without clipping and noise."""


@dataclass(frozen=True)
class Measurement:
    """One forward and backward of a logical batch."""

    report: MemoryReport
    seconds: float
    """Of the faster round."""
    loss: float


def measure_modes(
    state: State,
    task: Task,
    batch: Batch,
    config: TrainerConfig,
    *,
    modes: Sequence[str],
    refuse: Callable[[str, float], str | None] = lambda mode, seconds: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Measurement]:
    """Measure forward and backward in each mode; the result omits modes that do not fit into memory.

    In a private run this includes clipping and noise, and measures the mode of the run also without privacy.

    Args:
        state, task, batch, config: of the run, before its first step.
        modes: memory modes.
        refuse: called with a mode and the estimated seconds; returns a reason to omit the mode, or None.
        say: called with one line of text after each mode.
    """
    reports: dict[str, MemoryReport] = {}
    with _Steps(state, task, batch, config) as steps:
        try:
            expected = steps.expected_seconds()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            say(f"  no mode is measured: the run's own step ({steps.own}) does not fit into memory here")
            return {}
        names = [*modes, *([PLAIN] if state.private is not None else [])]
        for mode in sorted(names, key=lambda mode: mode != steps.own):  # the mode of the run first
            untimed = 0 if state.private is None or mode == PLAIN or reports else UNTIMED_STEPS
            reason = refuse(mode, expected * (RECORDED_STEPS + untimed + TIMED_ROUNDS * (len(reports) + 1)))
            if reason is not None:
                say(f"  {mode} is not measured: {reason}")
                continue
            try:
                if untimed:
                    steps.take(steps.own)  # the first backward also checks that examples do not mix
                reports[mode] = _record(state, partial(steps.take, mode))
                say(f"  {mode}: {format_bytes(reports[mode].peak_bytes)} of live memory at the peak")
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                say(f"  {mode} does not fit into memory here")
        timed = steps.timed(list(reports))
        return {mode: Measurement(reports[mode], *timed[mode]) for mode in names if mode in reports}


class _Steps:
    """Forward and backward of a batch of the run in any mode; on exit, restores the model and the random state."""

    def __init__(self, state: State, task: Task, batch: Batch, config: TrainerConfig):
        self.state, self.task, self.batch, self.config = state, task, batch, config
        self.own, self.random = get_memory(state.model), get_random_state(state.model)
        self.rehearsal = nullcontext() if state.private is None else state.private.rehearsal()

    def __enter__(self) -> "_Steps":
        self.rehearsal.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        set_memory(self.state.model, self.own)
        set_random_state(self.state.model, self.random)
        self.rehearsal.__exit__(*error)

    def take(self, mode: str) -> float:
        """Take one step in this mode; returns its loss."""
        model, private = self.state.model, self.state.private
        set_random_state(model, self.random)
        set_memory(model, self.own if mode == PLAIN else mode)
        plain = private is None or mode == PLAIN
        try:
            with private.paused() if private is not None and plain else nullcontext():
                options: dict[str, Any] = {"private": None if plain else private, "offload": self.state.offload}
                loss = accumulate(model, self.task, self.batch, self.config, **options)
            mean = summed_loss(loss)
            assert mean is not None
            return mean
        finally:
            self.state.optimizer.zero_grad(set_to_none=True)

    def expected_seconds(self) -> float:
        """The estimated time of a step, from the forward of one micro-batch: a whole step could take minutes.

        A short forward is timed twice, because the first one of a process takes several times as long.
        """
        model, micro = self.state.model, next(split(self.batch, self.config.micro_batch_size))
        seconds = math.inf
        with whole(model), alone(), evaluating(model), autocast(model, self.config.precision):
            for _ in range(2):
                started = time.perf_counter()
                self.task.per_example_losses(model, micro).sum().item()
                seconds = min(seconds, time.perf_counter() - started)
                if seconds > SHORT_SECONDS:
                    break
        return FORWARDS * seconds * examples(self.batch) / examples(micro)

    def timed(self, modes: Sequence[str]) -> dict[str, tuple[float, float]]:
        """(seconds of the faster round, loss) of each mode.

        Plain steps come last: they close the clipper, which then checks again that examples do not mix.
        """
        found: dict[str, tuple[float, float]] = {}
        for group in ([mode for mode in modes if mode != PLAIN], [mode for mode in modes if mode == PLAIN]):
            for _ in range(0 if self.state.private is None or group == [PLAIN] or not group else UNTIMED_STEPS - 1):
                self.take(self.own)
            for _ in range(TIMED_ROUNDS):
                for mode in group:
                    started = time.perf_counter()
                    loss = self.take(mode)
                    found[mode] = min(time.perf_counter() - started, found.get(mode, (math.inf, loss))[0]), loss
        return {mode: found[mode] for mode in modes}


def set_memory(model: Any, mode: str) -> None:
    """Set the memory mode of a network with the attribute `memory`, or of a model of transformers."""
    model = base_of(model)  # an attribute that is set on the wrapper of PEFT would not reach the model
    if hasattr(model, "memory"):
        model.memory = mode
    else:
        set_checkpointing(model, on=mode == "checkpoint")


def get_memory(model: Any) -> str:
    """The current memory mode of the model."""
    model = base_of(model)
    return model.memory if hasattr(model, "memory") else "checkpoint" if is_checkpointing(model) else "stored"


def _record(state: State, step: Callable[[], float]) -> MemoryReport:
    with MemoryRecorder(state.model, optimizer=state.optimizer) as recorder:
        step()
    allocated = allocator_peak(step, device=next(state.model.parameters()).device)
    return recorder.report(allocator_peak_bytes=allocated)
