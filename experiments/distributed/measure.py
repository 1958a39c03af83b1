"""The processes of one group measure all variants: bytes in every process, and time in rounds of all variants."""

import gc
import json
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from experiments.distributed.problems import Problem, problems
from experiments.distributed.variants import WAYS, Training, Variant, variants
from experiments.record import median
from memsave.process_group import own_device
from memsave.processes import alone, gather, is_sharded, process_rank, wait_for_all
from memsave.profiler import MemoryRecorder, format_bytes

TIMEOUT = timedelta(minutes=5)
NOISELESS = 4  # steps of which losses are compared


def work(rank: int, processes: int, folder: str, *, rounds: int, quick: bool) -> None:
    """The work of one process; rank 0 writes the rows of all problems as JSON into the folder."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Opacus and FSDP warn of hooks and views in every process
    cuda = torch.cuda.is_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{folder}/group-{processes}",
        rank=rank,
        world_size=processes,
        timeout=TIMEOUT,
    )
    device = own_device(torch.device("cuda" if cuda else "cpu"))
    found = {
        name: {"title": str(problem), "rows": measure(problem, processes=processes, rounds=rounds)}
        for name, problem in problems(device, quick=quick).items()
    }
    if rank == 0:
        (Path(folder) / f"rows-{processes}.json").write_text(json.dumps(found))
    wait_for_all()
    distributed.destroy_process_group()


def measure(problem: Problem, *, processes: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By name of the variant, complete on rank 0: bytes of each process, seconds, and differences from one process."""
    chosen = variants(problem, processes=processes)
    rows: dict[str, dict[str, Any]] = {}
    running: dict[Variant, Training] = {}
    gradients: dict[Variant, Tensor] = {}
    for variant in chosen:
        started = Started(problem, variant)
        errors = [each for each in gather(started.error) if each is not None]
        rows[variant.name] = {"way": variant.way, "parallel": variant.parallel, "processes": variant.processes}
        if errors:
            rows[variant.name]["error"] = errors[0]
        else:
            running[variant], gradients[variant] = started.training, started.gradient
            peaks = [each for each in gather(started.peak) if each is not None]
            rows[variant.name] |= {"peaks": peaks, "losses": total(started.losses)}
        say(variant, errors[0] if errors else format_bytes(max(sum(each.values()) for each in peaks)))
        gc.collect()
    seconds: dict[Variant, list[float]] = {variant: [] for variant in running}
    for number in range(rounds):
        for variant in list(running)[number % len(running) :] + list(running)[: number % len(running)]:
            seconds[variant].append(timed(running[variant], variant))
    plain = Variant("plain", "", 1)
    for variant in running:
        row, reference = rows[variant.name], variant.reference
        row["rounds"] = seconds[variant]
        row["seconds"] = median(seconds[variant])
        row["time_over_plain"] = median([a / b for a, b in zip(seconds[variant], seconds[plain], strict=True)])
        if reference in running and process_rank() == 0:
            losses = zip(row["losses"], rows[reference.name]["losses"], strict=True)
            row["largest_relative_loss_difference"] = max(abs(a - b) / abs(b) for a, b in losses)
            right = gradients[reference]
            row["relative_gradient_difference"] = float((gradients[variant] - right).norm() / right.norm())
        say(variant, f"{row['seconds']:.2f} s, {row['time_over_plain']:.2f}x")
    return rows


class Started:
    """A variant after steps without noise: the gradient of the first, and the bytes of the second.

    The first step has no optimizer state. Noise is on afterwards.

    A variant of one process runs on rank 0 alone; the attributes of the other processes are then empty.
    """

    def __init__(self, problem: Problem, variant: Variant):
        self.training: Any = None
        self.gradient = torch.zeros(0)
        self.peak: dict[str, int] | None = None
        self.losses = [0.0] * NOISELESS
        self.error: str | None = None
        if not takes_part(variant):
            return
        try:
            with within(variant):
                self.training = WAYS[variant.way](problem, variant.parallel)
                self._take_steps()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]

    def _take_steps(self) -> None:
        model, optimizer, step = self.training.model, self.training.optimizer, self.training.step
        hook = optimizer.register_step_pre_hook(lambda *_: self._note_gradient())
        self.losses[0] = step()
        hook.remove()
        with MemoryRecorder(model, optimizer=optimizer) as recorder:
            self.losses[1] = step()
        self.peak = recorder.report().peak_by_category
        self.losses[2:] = [step() for _ in range(2, NOISELESS)]
        self.training.switch_noise_on()

    def _note_gradient(self) -> None:
        parts = []
        for parameter in self.training.model.parameters():
            gradient: Any = parameter.grad
            parts.append((gradient.full_tensor() if is_sharded(gradient) else gradient).detach().flatten().cpu())
        self.gradient = torch.cat(parts) if process_rank() == 0 else self.gradient


def takes_part(variant: Variant) -> bool:
    return bool(variant.parallel) or process_rank() == 0


def within(variant: Variant) -> Any:
    return nullcontext() if variant.parallel else alone()


def total(parts: list[float]) -> list[float]:
    """The losses of the logical batch, from each process's parts of them."""
    return [sum(each) for each in zip(*gather(parts), strict=True)]


def timed(training: Training, variant: Variant) -> float:
    """The seconds of one step until all processes have taken it."""
    gc.collect()
    wait_for_all()
    started = time.perf_counter()
    if takes_part(variant):
        with within(variant):
            training.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return max(gather(time.perf_counter() - started if takes_part(variant) else 0.0))


def say(variant: Variant, text: str) -> None:
    if process_rank() == 0:
        print(f"  {variant.name}: {text}", flush=True)
