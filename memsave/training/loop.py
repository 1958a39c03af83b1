"""The training loop.

    for batch in batches:                                    # logical batch of n examples; private: Poisson sample
        for micro in split(batch, micro_batch_size):
            losses = task.per_example_losses(model, micro)   # (B,)
            (losses.sum() / n).backward()                    # private: adds the sum of clipped gradients
        optimizer.step()                                     # private: after noise, once per logical batch

The model decides how activations are kept (`memory=`). The micro-batch size changes memory and time, and the order in
which dropout draws random numbers; it changes nothing else. The same holds for the number of processes: each takes a
share of every logical batch, and the gradients are summed once per batch.
"""

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memsave.config.schema import MemoryConfig, OptimizerConfig, TrainerConfig
from memsave.data.loader import Index, load_ahead, numbered, shuffled
from memsave.offload import ActivationOffload, offload_optimizer
from memsave.privacy import PrivateGradients
from memsave.processes import (
    any_process,
    local_part,
    maximum,
    process_count,
    share,
    sum_gradients,
    sums,
    together,
    totals,
)
from memsave.training.ema import Ema
from memsave.training.sharding import is_sharded_model
from memsave.training.task import Batch, CountsTokens, Losses, Task, examples, pinned_batch, split


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one sentence."""


@dataclass
class State:
    """Everything that a step changes; a checkpoint stores all of it."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    step: int = 0
    """Optimizer steps taken."""
    private: PrivateGradients | None = None
    """Clipping, noise and accounting; None for training without privacy."""
    ema: Ema | None = None
    """The average of the weights, which is evaluated and released; None without an average."""
    offload: ActivationOffload | None = None
    """Keeps activations in host memory until backward; None where they stay on the device."""
    scaler: GradScaler | None = None
    """Scales losses so that float16 gradients do not vanish."""
    best: tuple[float, int] | None = None
    """(score, step) of the best evaluation so far, for early stopping."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    """The id of the run, which a continued run keeps."""
    data: str | None = None
    """The fingerprint of the raw data, which runs on the same data share."""
    frozen: str | None = None
    """The digest of the frozen parameters, which a checkpoint does not hold; None if all parameters train."""
    processes: list[int] = field(default_factory=lambda: [process_count()])
    """The number of processes; several numbers, in their order, if the run was continued with another one."""
    identity: dict[str, Any] = field(default_factory=dict)
    """The values that determine the batches, by config key; a checkpoint continues only with the same values."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, for the log."""

    step: int
    loss: float | None
    """Mean over the batch; None for an empty batch."""
    lr: float
    seconds: float
    tokens: int | None = None
    """Tokens of the batch without padding; None for a task that has no tokens."""


def make_state(
    model: nn.Module,
    config: TrainerConfig,
    *,
    private: PrivateGradients | None = None,
    memory: MemoryConfig | None = None,
    folder: Path | None = None,
) -> State:
    """The state before the first step: a new optimizer and learning rate schedule for the model.

    `memory` says what is kept in host memory (None: nothing), on the CPU in files of its folder, or of `folder`.
    """
    optimizer = make_optimizer(model, config.optimizer)
    offloaded = () if memory is None else memory.offload
    if memory is not None and memory.offload_folder is not None:
        folder = Path(memory.offload_folder).expanduser()
    if "optimizer" in offloaded:
        offload_optimizer(optimizer, folder=folder)
    offload = ActivationOffload(model, folder=folder) if "activations" in offloaded else None
    schedule = make_schedule(optimizer, config.optimizer, steps=config.steps)
    ema = Ema(model, decay=config.ema) if config.ema else None
    scaler = GradScaler(next(model.parameters()).device.type) if config.precision == "float16" else None
    return State(model, optimizer, schedule, private=private, ema=ema, offload=offload, scaler=scaler)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW or SGD, without weight decay of norms and biases, whose size does not cause overfitting."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=False)
    # foreach=True would allocate temporaries of the size of all parameters
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), foreach=False)


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, *, steps: int) -> LambdaLR:
    """Linear warm-up, then a constant learning rate, or a cosine or a line that reaches zero after the last step.

    The last step itself still changes the weights: a private step without effect would spend epsilon for nothing.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def run_steps(
    state: State,
    task: Task,
    config: TrainerConfig,
    *,
    workers: int = 0,
    monitor: Callable[[int], AbstractContextManager] = lambda step: nullcontext(),
) -> Iterator[StepResult]:
    """Take the remaining steps and yield the result of each.

    Each step runs in the context `monitor(step)`. `workers` threads load batches in advance.

    Raises TrainingError if a loss is not finite, the task does not return one loss per example, or the batches end
    before the last step.
    """
    if state.step >= config.steps:
        return
    batches = batches_of(state, task, config, workers=workers)
    while True:
        with together():
            found = next(batches, None)
        if found is None:
            raise TrainingError(f"the batches ended after step {state.step}, but the run has {config.steps} steps")
        batch, own, tokens = found
        started = time.perf_counter()
        lr = state.optimizer.param_groups[0]["lr"]
        with monitor(state.step + 1):
            options: dict[str, Any] = {"private": state.private, "scaler": state.scaler, "offload": state.offload}
            loss = summed_loss(accumulate(state.model, task, batch, config, own=own, **options))
            if loss is not None and not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {state.step + 1} is {loss}; lower trainer.optimizer.lr (now {lr:g}) and look at "
                    f"the data of that batch"
                )
            update(state)
            if state.private is not None and not _are_finite(state.model):
                raise TrainingError(
                    f"parameters are not finite after step {state.step}; lower trainer.optimizer.lr (now {lr:g})"
                )
        tokens = None if tokens is None else totals([tokens])[0]
        yield StepResult(state.step, loss, lr, time.perf_counter() - started, tokens)
        if state.step == config.steps:
            return


def _are_finite(model: nn.Module) -> bool:
    """Whether all parameters are finite, in all processes. One read of the device."""
    flags = [local_part(p.detach()).isfinite().all() for p in model.parameters()]
    return not any_process(bool(flags) and not bool(torch.stack([each.to(flags[0].device) for each in flags]).all()))


def update(state: State) -> None:
    """Update the parameters from `.grad`, then the learning rate, the number of steps, and the average."""
    if state.scaler is None:
        state.optimizer.step()
    else:  # skips the step and lowers the scale if a gradient overflowed
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.schedule.step()
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.model, step=state.step)


def batches_of(
    state: State, task: Task, config: TrainerConfig, *, workers: int = 0
) -> Iterator[tuple[Batch, int, int | None]]:
    """This process's share of the remaining logical batches: (batch on the device, its examples, their tokens).

    They are shuffled epochs, or the Poisson samples of a private run. `workers` threads load batches in advance. Tokens
    are counted before the batch is moved, so that counting never waits for the device; a task without tokens has None.
    For a sharded model, an empty share is loaded as one example that does not count (see `accumulate`).
    """
    if state.private is None:
        whole = shuffled(task.size, batch_size=config.batch_size, seed=config.seed, start=state.step)
        batches: Iterator[list[Index]] = map(share, whole)
    else:
        batches = numbered(state.private.batches(), size=task.size, start=state.step)
    remaining = islice(batches, config.steps - state.step)  # must not draw a batch for which there is no step
    sizes: deque[int] = deque()

    def noted() -> Iterator[list[Index]]:
        for indices in remaining:
            sizes.append(len(indices))
            yield indices or ([Index(0, 0)] if is_sharded_model(state.model) else [])

    load = partial(pinned_batch, task.load) if next(state.model.parameters()).device.type == "cuda" else task.load
    for batch in load_ahead(load, noted(), workers=workers):
        own = sizes.popleft()
        tokens = task.count_tokens(batch) if isinstance(task, CountsTokens) else None
        yield task.place(batch), own, tokens if own or tokens is None else 0


def first_batch(task: Task, config: TrainerConfig) -> Batch:
    """This process's share of the first logical batch of the shuffled epochs, on the device."""
    return task.place(task.load(share(next(shuffled(task.size, batch_size=config.batch_size, seed=config.seed)))))


def accumulate(
    model: nn.Module,
    task: Losses,
    batch: Batch,
    config: TrainerConfig,
    *,
    own: int | None = None,
    private: PrivateGradients | None = None,
    scaler: GradScaler | None = None,
    offload: ActivationOffload | None = None,
) -> Tensor | None:
    """Accumulate the gradient of a logical batch in `.grad` over its micro-batches; returns the mean loss, a scalar.

    In several processes, `batch` is the share of this one: its first `own` examples, by default all. The gradient is
    that of the whole logical batch, and the returned loss this process's part of the mean over it (see `summed_loss`).
    Processes that share a sharded model take equally many micro-batches; one with too few repeats an example that does
    not count. Returns None if the logical batch is empty. In a private run, an example with a loss that is not finite
    counts as zero in the mean, like its gradient in the sum. Never calls `.item()`: this function must run under
    FakeTensorMode.
    """
    own = examples(batch) if own is None else own
    count, sharded = totals([own])[0], is_sharded_model(model)
    micros = list(split({key: value[:own] for key, value in batch.items()}, config.micro_batch_size))
    fillers = maximum(len(micros)) - len(micros) if sharded else 0
    found = []
    with nullcontext() if sharded else together():  # a sharded model communicates within
        for micro in micros:
            losses = micro_batch_losses(model, task, micro, config, offload=offload)
            if private is None:
                found.append(backward(losses, count, scaler=scaler))
            else:
                private.backward(losses)
                found.append(losses.detach().nan_to_num(0, 0, 0).sum())
        for _ in range(fillers):
            losses = micro_batch_losses(model, task, next(split(batch, 1)), config, offload=offload)
            if private is None:
                backward(losses * 0, count)
            else:
                private.backward(losses, counted=torch.zeros_like(losses, dtype=torch.bool))
    if private is None:
        sum_gradients(model.parameters())
    else:
        private.finish()
    if not count:
        return None
    return torch.stack(found).double().sum() / count if found else torch.zeros((), dtype=torch.float64)


def summed_loss(part: Tensor | None) -> float | None:
    """The mean loss of a logical batch, from each process's part of it; None for an empty batch."""
    return None if part is None else sums([part.item()])[0]


def micro_batch_losses(
    model: nn.Module, task: Losses, micro: Batch, config: TrainerConfig, *, offload: ActivationOffload | None = None
) -> Tensor:
    """The losses (B,) of a micro-batch; TrainingError if the task returns another shape."""
    with nullcontext() if offload is None else offload(keep=micro.values()), autocast(model, config.precision):
        losses = task.per_example_losses(model, micro)
    if losses.shape != (examples(micro),):
        raise TrainingError(
            f"per_example_losses returned shape {tuple(losses.shape)} for {examples(micro)} examples; return "
            f"one loss per example"
        )
    return losses


def backward(losses: Tensor, count: int, *, scaler: GradScaler | None = None) -> Tensor:
    """Backward of sum(losses) / count, with the size of the logical batch as count. Returns sum(losses), a scalar."""
    total = losses.sum()
    mean = total / count
    (mean if scaler is None else scaler.scale(mean)).backward()
    return total.detach()


def autocast(model: nn.Module, precision: str) -> AbstractContextManager:
    """Autocast to bfloat16 or float16 on the model's device; no autocast for float32."""
    kind = next(model.parameters()).device.type
    return nullcontext() if precision == "float32" else torch.autocast(kind, dtype=getattr(torch, precision))


def averaged(state: State) -> AbstractContextManager:
    """Context in which the model has the averaged weights, if there is an average."""
    return nullcontext() if state.ema is None else state.ema.applied(state.model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context with evaluation mode and without gradients; restores the mode of each module."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in training:
            module.training = flag
