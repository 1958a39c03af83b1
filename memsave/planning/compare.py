"""`profiler.compare`: what other memory modes would hold and take, measured before training where it can be afforded.

A comparison is an aside and must not cost the run. So each mode is left out, with a sentence, where
`profiler.compare_seconds` is too short for it, by the time of a forward of the run's own model, or where its peak,
predicted on fake tensors, is above the budget or more than is free. A private run compares a step without privacy, too.
"""

import time
from functools import partial

import torch

from memsave.config.schema import Config, PrivacyConfig
from memsave.planning.budget import free_bytes
from memsave.planning.fake_step import fake_step
from memsave.profiler import format_bytes, parse_bytes, peak_on_fake
from memsave.progress import Progress
from memsave.training.loop import State, first_batch
from memsave.training.measure import PLAIN, Measurement, measure_modes
from memsave.training.task import Task

ROOM = {"cpu": 2.0, "cuda": 1.2}
"""What a process takes for each live byte: malloc and CUDA's allocator keep freed blocks."""


def compare_modes(config: Config, state: State, task: Task, *, progress: Progress) -> dict[str, Measurement]:
    """One step of the run's first batch in each mode of `profiler.compare` that can be afforded."""
    modes, limit = config.profiler.compare, config.profiler.compare_seconds
    if not modes or not limit:
        return {}
    progress.say(f"measuring one step as {', '.join(modes)}, in about {limit:g} s at most (profiler.compare_seconds)")
    began = time.monotonic()
    batch = first_batch(task, config.trainer)  # of the size that is expected in a private run, too
    device = next(state.model.parameters()).device
    free = free_bytes(device)  # before the first mode: what it leaves with malloc is free for the next

    def refuse(mode: str, seconds: float) -> str | None:
        left = max(0.0, limit - (time.monotonic() - began))
        if seconds > left:
            return f"it would take about {seconds:.0f} s, and {left:.0f} s are left; mode=plan predicts its memory"
        return None if mode == config.memory.mode else _too_large(config, mode, device, free=free)

    return measure_modes(state, task, batch, config.trainer, modes=modes, refuse=refuse, say=progress.say)


def _too_large(config: Config, mode: str, device: torch.device, *, free: int) -> str | None:
    """Why a step in this mode does not fit, by its peak on fake tensors; None where it does."""
    try:
        peak = peak_on_fake(partial(fake_step, in_mode(config, mode), device=device)).peak_bytes
    except (ValueError, RuntimeError) as error:
        return f"its memory cannot be predicted on fake tensors ({str(error).splitlines()[0]})"
    if config.budget is not None and peak > parse_bytes(config.budget):
        return f"its step would hold {format_bytes(peak)}, predicted, more than budget={config.budget}"
    if peak * ROOM[device.type] > free:
        return (
            f"its step would hold {format_bytes(peak)}, predicted, for which a process may take "
            f"{ROOM[device.type]:g} times as much, and {format_bytes(free)} are free"
        )
    return None


def in_mode(config: Config, mode: str) -> Config:
    """The config in a memory mode, or `PLAIN`: without privacy."""
    if mode == PLAIN:
        return config.changed({"privacy": PrivacyConfig()})
    if mode == config.memory.mode:
        return config
    return config.changed({"memory.mode": mode, "memory.levels": None})
