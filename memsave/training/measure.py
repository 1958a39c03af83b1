"""What each memory mode keeps, on one batch of the run and on the run's own model.

Live bytes come from `MemoryRecorder`, seconds from a step without it. Nothing of the run moves: parameters, gradients,
mode and random state are as before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memsave.config import TrainerConfig
from memsave.profiler import MemoryRecorder, MemoryReport, allocator_peak
from memsave.training.loop import State, accumulate
from memsave.training.memory_error import is_out_of_memory
from memsave.training.random_state import get_random_state, set_random_state
from memsave.training.task import Batch, Task

TIMED_ROUNDS = 2


@dataclass(frozen=True)
class Measurement:
    """One forward and backward of a logical batch."""

    report: MemoryReport
    seconds: float
    """The faster of the rounds, which the modes take in turn."""
    loss: float


def measure_modes(
    state: State, task: Task, batch: Batch, config: TrainerConfig, *, modes: Sequence[str]
) -> dict[str, Measurement]:
    """Forward and backward in each mode, on a model with the attribute `memory`; modes that do not fit are left out."""
    model: Any = state.model  # any network with the attribute `memory`
    before, random = model.memory, get_random_state(model)

    def step() -> float:
        set_random_state(model, random)
        try:
            return accumulate(model, task, batch, config)
        finally:
            state.optimizer.zero_grad(set_to_none=True)

    reports: dict[str, MemoryReport] = {}
    losses: dict[str, float] = {}
    seconds: dict[str, float] = {}
    try:
        for mode in modes:
            model.memory = mode
            try:
                reports[mode] = _record(state, step)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        for _ in range(TIMED_ROUNDS):
            for mode in reports:
                model.memory = mode
                started = time.perf_counter()
                losses[mode] = step()
                seconds[mode] = min(time.perf_counter() - started, seconds.get(mode, math.inf))
    finally:
        model.memory = before
        set_random_state(model, random)
    return {mode: Measurement(reports[mode], seconds[mode], losses[mode]) for mode in reports}


def _record(state: State, step: Callable[[], float]) -> MemoryReport:
    with MemoryRecorder(state.model, optimizer=state.optimizer) as recorder:
        step()
    taken = allocator_peak(step, device=next(state.model.parameters()).device)
    return recorder.report(allocator_peak_bytes=taken)
