"""What each memory mode keeps, on one batch of the run and on the run's own model.

Live bytes come from `MemoryRecorder`, seconds from a step without it. Nothing of the run moves: parameters, gradients,
mode and random state are as before.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memsave.config import TrainerConfig
from memsave.profiler import MemoryRecorder, MemoryReport, allocator_peak
from memsave.training.loop import State, accumulate
from memsave.training.memory_error import is_out_of_memory
from memsave.training.random_state import get_random_state, set_random_state
from memsave.training.task import Batch, Task


@dataclass(frozen=True)
class Measurement:
    """One forward and backward of a logical batch."""

    report: MemoryReport
    seconds: float
    loss: float


def measure_modes(
    state: State, task: Task, batch: Batch, config: TrainerConfig, *, modes: Sequence[str]
) -> dict[str, Measurement]:
    """Forward and backward in each mode, on a model with the attribute `memory`; modes that do not fit are left out."""
    model: Any = state.model  # any network with the attribute `memory`
    before = model.memory
    random = get_random_state(model)
    results = {}
    try:
        for mode in modes:
            model.memory = mode
            try:
                results[mode] = _measure(state, task, batch, config)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                state.optimizer.zero_grad(set_to_none=True)
    finally:
        model.memory = before
        set_random_state(model, random)
    return results


def _measure(state: State, task: Task, batch: Batch, config: TrainerConfig) -> Measurement:
    random = get_random_state(state.model)

    def step() -> float:
        set_random_state(state.model, random)
        state.optimizer.zero_grad(set_to_none=True)
        loss = accumulate(state.model, task, batch, config)
        state.optimizer.zero_grad(set_to_none=True)
        return loss

    with MemoryRecorder(state.model, optimizer=state.optimizer) as recorder:
        step()
    taken = allocator_peak(step, device=next(state.model.parameters()).device)
    started = time.perf_counter()
    loss = step()
    return Measurement(recorder.report(allocator_peak_bytes=taken), time.perf_counter() - started, loss)
