"""What each memory mode keeps, on one batch of the run and on the run's own model.

Live bytes come from `MemoryRecorder`, seconds from a step without it. Nothing of the run moves: parameters, gradients,
mode and random state are as before.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from memsave.config import TrainerConfig
from memsave.models.language import is_checkpointing, set_checkpointing
from memsave.profiler import MemoryRecorder, MemoryReport, allocator_peak
from memsave.training.loop import State, accumulate
from memsave.training.memory_error import is_out_of_memory
from memsave.training.random_state import get_random_state, set_random_state
from memsave.training.task import Batch, Task

TIMED_ROUNDS = 2
UNTIMED_STEPS = 2  # of a private run: in these the clipper tests whether examples are apart
PLAIN = "without privacy"


@dataclass(frozen=True)
class Measurement:
    """One forward and backward of a logical batch."""

    report: MemoryReport
    seconds: float
    """The faster of the rounds."""
    loss: float


def measure_modes(
    state: State, task: Task, batch: Batch, config: TrainerConfig, *, modes: Sequence[str]
) -> dict[str, Measurement]:
    """Forward and backward in each mode; modes that do not fit are left out.

    Of a private run, clipping and noise included, and once more in the run's own mode "without privacy".
    """
    with nullcontext() if state.private is None else state.private.rehearsal():
        return _measure(state, task, batch, config, modes=modes)


def _measure(
    state: State, task: Task, batch: Batch, config: TrainerConfig, *, modes: Sequence[str]
) -> dict[str, Measurement]:
    model, private = state.model, state.private
    before, random = get_memory(model), get_random_state(model)

    def step(mode: str) -> float:
        set_random_state(model, random)
        set_memory(model, before if mode == PLAIN else mode)
        try:
            if private is None or mode != PLAIN:
                loss = accumulate(model, task, batch, config, private=private)
            else:
                with private.paused():
                    loss = accumulate(model, task, batch, config)
            assert loss is not None
            return loss.item()
        finally:
            state.optimizer.zero_grad(set_to_none=True)

    reports: dict[str, MemoryReport] = {}
    losses: dict[str, float] = {}
    seconds: dict[str, float] = {}
    try:
        if private is not None:
            step(before)  # the first backward also looks whether examples are apart
        for mode in [*modes, *([PLAIN] if private is not None else [])]:
            try:
                reports[mode] = _record(state, partial(step, mode))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        # Plain steps come last: the clipper is closed for them, and after that tests again whether examples are apart.
        for timed in ([mode for mode in reports if mode != PLAIN], [mode for mode in reports if mode == PLAIN]):
            for _ in range(0 if private is None or timed == [PLAIN] else UNTIMED_STEPS):
                step(before)
            for _ in range(TIMED_ROUNDS):
                for mode in timed:
                    started = time.perf_counter()
                    losses[mode] = step(mode)
                    seconds[mode] = min(time.perf_counter() - started, seconds.get(mode, math.inf))
    finally:
        set_memory(model, before)
        set_random_state(model, random)
    return {mode: Measurement(reports[mode], seconds[mode], losses[mode]) for mode in reports}


def set_memory(model: Any, mode: str) -> None:
    """Put a network with the attribute `memory`, or a model of transformers, into a memory mode."""
    if hasattr(model, "memory"):
        model.memory = mode
    else:
        set_checkpointing(model, on=mode == "checkpoint")


def get_memory(model: Any) -> str:
    """The memory mode that the model is in."""
    return model.memory if hasattr(model, "memory") else "checkpoint" if is_checkpointing(model) else "stored"


def _record(state: State, step: Callable[[], float]) -> MemoryReport:
    with MemoryRecorder(state.model, optimizer=state.optimizer) as recorder:
        step()
    taken = allocator_peak(step, device=next(state.model.parameters()).device)
    return recorder.report(allocator_peak_bytes=taken)
