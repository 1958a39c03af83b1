"""The training step of any experiment without its data and its weights: what the planner runs on fake tensors.

Model, optimizer, clipping and noise are those of the run, and so is the loop's own code; batches have the shapes of
training and nothing in them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsave.config.schema import Config, GhostPrivacy
from memsave.privacy import Mechanism, PrivateGradients, default_delta
from memsave.profiler import TrainingStep, parse_bytes
from memsave.tasks.definition import definition_of
from memsave.training.loop import accumulate, make_state, update
from memsave.training.task import Batch

MICRO_BATCHES = 2  # enough to reach the peak: existing gradients plus new activations
EXPECTED_BATCHES = 10  # in an epoch of the mechanism: no tensor depends on it


@dataclass(frozen=True)
class DummyTask:
    """Losses and one batch of a task, for `accumulate`."""

    losses: Callable[[nn.Module, Batch], Tensor]
    batch: Batch

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses."""
        return self.losses(model, batch)


def fake_step(
    config: Config,
    *,
    device: torch.device,
    per_sample_gradients: bool = False,
    architecture: Mapping[str, Any] | None = None,
) -> TrainingStep:
    """The step of this config, with random weights; call it under fake tensors, or with sizes that fit.

    Args:
        config: of any experiment; no data are read.
        device: where it would be trained.
        per_sample_gradients: hold one gradient an example, as Opacus's hooks do, in the place of any clipping.
        architecture: overrides sizes of the model, see `memsave.tasks.definition.Variation`.
    """
    with device:  # made there, since fake parameters cannot be moved
        model = definition_of(config).make_fake_model(architecture=architecture)
    task = dummy_task(config, device=device)
    private: Any = PerSampleGradBaseline(model) if per_sample_gradients else _private(config, model)
    state = make_state(model, config.trainer)
    state.scaler = None  # it reads values of gradients, and holds one number

    def run() -> None:
        accumulate(model, task, task.batch, config.trainer, private=private)
        update(state)

    return TrainingStep(model, run, state.optimizer)


def dummy_task(config: Config, *, device: torch.device) -> DummyTask:
    """The task's losses, and a logical batch of as many micro-batches as peak memory depends on."""
    trainer, task = config.trainer, definition_of(config)
    micro = trainer.micro_batch_size or trainer.batch_size
    count = min(trainer.batch_size, MICRO_BATCHES * micro)
    return DummyTask(task.per_example_losses, task.dummy_batch(count=count, device=device))


def _private(config: Config, model: nn.Module) -> PrivateGradients | None:
    privacy, batch_size = config.privacy, config.trainer.batch_size
    if not isinstance(privacy, GhostPrivacy):
        return None
    size = EXPECTED_BATCHES * batch_size
    mechanism = Mechanism(size, batch_size, 1.0, privacy.max_grad_norm, delta=default_delta(size))
    known: dict[str, Any] = {"passes": privacy.passes, "secure_noise": privacy.secure_noise}
    known |= {"clipping": privacy.clipping, "memory_budget": parse_bytes(privacy.memory_budget)}
    private = PrivateGradients(model, mechanism, seed=0, **known)
    private.guard.enabled = False  # the step is taken again and again on one batch, which nobody drew
    return private


class PerSampleGradBaseline:
    """One gradient an example, held until all are there, as Opacus's hooks do; in the place of `PrivateGradients`.

    What it holds is what any such method must; the values are left out.
    """

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def backward(self, losses: Tensor) -> None:
        """Gradients of each example, then the sum of the clipped ones into `.grad`."""
        sums = [p.grad for p in self.parameters]
        samples: list[Tensor] = []  # freed together, when this returns

        def hold(parameter: Tensor) -> None:
            samples.append(parameter.new_empty(len(losses), *parameter.shape))
            parameter.grad = None

        for parameter in self.parameters:
            parameter.grad = None
        handles = [p.register_post_accumulate_grad_hook(hold) for p in self.parameters]
        losses.sum().backward()
        for handle in handles:
            handle.remove()
        for parameter, total in zip(self.parameters, sums, strict=True):
            parameter.grad = torch.zeros_like(parameter) if total is None else total

    def finish(self) -> None:
        """Noise would be added in place."""
