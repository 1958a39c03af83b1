"""The one loop.

    for batch in batches:                                    # a logical batch of n examples
        for micro in split(batch, micro_batch_size):
            losses = task.per_example_losses(model, micro)   # (B,)
            (losses.sum() / n).backward()
        optimizer.step()

How activations are kept is the model's affair (`memory=`). The size of a micro-batch changes memory and time, and
nothing else, save that dropout draws its numbers micro-batch by micro-batch.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memsave.config import OptimizerConfig, TrainerConfig
from memsave.training.task import Batch, Task, examples, split


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one sentence."""


@dataclass
class State:
    """Everything that a step changes, and that a checkpoint therefore holds."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    step: int = 0
    """Optimizer steps taken."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, for the log."""

    step: int
    loss: float
    lr: float
    seconds: float


def make_state(model: nn.Module, config: TrainerConfig) -> State:
    """A fresh optimizer and schedule for the model."""
    optimizer = make_optimizer(model, config.optimizer)
    return State(model, optimizer, make_schedule(optimizer, config.optimizer, steps=config.steps))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW or SGD. Norms and biases are not decayed: they do not overfit by growing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=False)
    # foreach would hold temporaries as large as all parameters together
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), foreach=False)


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, *, steps: int) -> LambdaLR:
    """Linear warm-up, then a constant rate or a cosine that reaches zero after the last step."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


def run_steps(
    state: State,
    task: Task,
    config: TrainerConfig,
    *,
    watch: Callable[[int], AbstractContextManager] = lambda step: nullcontext(),
) -> Iterator[StepResult]:
    """Take the steps that are left, yielding after each; `watch(step)` surrounds each of them.

    Raises TrainingError when a loss is not finite or a task does not give one loss per example.
    """
    if state.step >= config.steps:
        return
    for batch in task.batches(start=state.step):
        started = time.perf_counter()
        lr = state.optimizer.param_groups[0]["lr"]
        with watch(state.step + 1):
            loss = accumulate(state.model, task, batch, config)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of step {state.step + 1} is {loss}; lower trainer.optimizer.lr (now {lr:g}) and look at "
                    f"the data of that batch"
                )
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
        state.schedule.step()
        state.step += 1
        yield StepResult(state.step, loss, lr, time.perf_counter() - started)
        if state.step == config.steps:
            return


def accumulate(model: nn.Module, task: Task, batch: Batch, config: TrainerConfig) -> float:
    """Add the gradient of the logical batch's mean loss to `.grad`, micro-batch by micro-batch; returns that loss."""
    count = examples(batch)
    total = 0.0
    for micro in split(batch, config.micro_batch_size):
        with autocast(model, config.precision):
            losses = task.per_example_losses(model, micro)  # (B,)
        if losses.shape != (examples(micro),):
            raise TrainingError(
                f"per_example_losses gave shape {tuple(losses.shape)} for {examples(micro)} examples; return one loss "
                f"per example"
            )
        total += backward(losses, count)
    return total / count


def backward(losses: Tensor, count: int) -> float:
    """Plain gradients: of sum(losses) / count, the logical batch's size. Returns sum(losses)."""
    total = losses.sum()
    (total / count).backward()
    return total.item()


def autocast(model: nn.Module, precision: str) -> AbstractContextManager:
    """bfloat16 by autocast on the model's device, or nothing."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is put back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in training:
            module.training = flag
