"""`profiler.compare`: memory and time of other memory modes, measured before training.

The comparison must not make the run fail. A mode is omitted, with a message, if its estimated time exceeds what is left
of `profiler.compare_seconds`, or if its peak, predicted on fake tensors, exceeds the budget or the free memory. A
private run also measures a step without privacy.
"""

import time
from functools import partial

import torch

from memsave.config.schema import Config, PrivacyConfig
from memsave.planning.budget import free_bytes
from memsave.planning.fake_step import fake_step
from memsave.planning.pretend import plan_alone
from memsave.processes import on_main, process_count
from memsave.profiler import format_bytes, parse_bytes, peak_on_fake
from memsave.progress import Progress
from memsave.training.loop import State, first_batch
from memsave.training.measure import PLAIN, Measurement, measure_modes
from memsave.training.task import Task

BYTES_PER_LIVE_BYTE = {"cpu": 2.0, "cuda": 1.2}
"""Bytes that a process may allocate per live byte: malloc and CUDA's allocator keep freed blocks."""


def compare_modes(config: Config, state: State, task: Task, *, progress: Progress) -> dict[str, Measurement]:
    """Measure a step of the first batch in each mode of `profiler.compare` that time and memory allow."""
    modes, limit = config.profiler.compare, config.profiler.compare_seconds
    if not modes or not limit:
        return {}
    progress.say(f"measuring one step as {', '.join(modes)}, in about {limit:g} s at most (profiler.compare_seconds)")
    start = time.monotonic()
    if config.trainer.batch_size < process_count():
        progress.say("  not measured: there are fewer examples in a batch than processes")
        return {}
    batch = first_batch(task, config.trainer)  # in a private run it has the expected size
    device = next(state.model.parameters()).device
    free = free_bytes(device)  # before the first mode: the next mode can use memory that malloc keeps

    def refuse(mode: str, seconds: float) -> str | None:
        return on_main(why_not, mode, seconds)

    def why_not(mode: str, seconds: float) -> str | None:
        left = max(0.0, limit - (time.monotonic() - start))
        if seconds > left:
            return f"it would take about {seconds:.0f} s, and {left:.0f} s are left; mode=plan predicts its memory"
        return None if mode == config.memory.mode else _too_large(config, mode, device, free=free)

    return measure_modes(state, task, batch, config.trainer, modes=modes, refuse=refuse, say=progress.say)


def _too_large(config: Config, mode: str, device: torch.device, *, free: int) -> str | None:
    """The reason why a step in this mode does not fit, by its peak on fake tensors; None if it fits."""
    try:
        peak = plan_alone(_peak, in_mode(config, mode), device)
    except (ValueError, RuntimeError) as error:
        return f"its memory cannot be predicted on fake tensors ({str(error).splitlines()[0]})"
    if config.budget is not None and peak > parse_bytes(config.budget):
        return f"its step would hold {format_bytes(peak)}, predicted, more than budget={config.budget}"
    ratio = BYTES_PER_LIVE_BYTE[device.type]
    if peak * ratio > free:
        return (
            f"its step would hold {format_bytes(peak)}, predicted, for which a process may allocate "
            f"{ratio:g} times as much, and {format_bytes(free)} are free"
        )
    return None


def _peak(config: Config, device: torch.device) -> int:
    return peak_on_fake(partial(fake_step, config, device=device)).peak_bytes


def in_mode(config: Config, mode: str) -> Config:
    """The config in a memory mode, or without privacy for `PLAIN`."""
    if mode == PLAIN:
        return config.changed({"privacy": PrivacyConfig()})
    if mode == config.memory.mode:
        return config
    return config.changed({"memory.mode": mode, "memory.levels": None})
