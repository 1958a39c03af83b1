"""The training step of an experiment without data and trained weights, which the planner runs on fake tensors.

Model, optimizer, clipping, noise and the code of the loop are those of the run. The batches have the shapes of training
and no content.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memsave.config.schema import Config, GhostPrivacy
from memsave.planning.pretend import pretended_mesh
from memsave.privacy import Mechanism, PrivateGradients, default_delta
from memsave.processes import process_count
from memsave.profiler import TrainingStep
from memsave.profiler.work import Totals, WorkCounter, added
from memsave.tasks.definition import definition_of
from memsave.training.loop import accumulate, make_state, update
from memsave.training.sharding import shard_model, wants_sharding
from memsave.training.task import Batch

MICRO_BATCHES = 2  # enough to reach the peak: existing gradients plus new activations
EXCEEDED = 1e-3  # probability that some batch of a private run is larger than the planned one
EXPECTED_BATCHES = 10  # per epoch of the mechanism; no tensor depends on it


@dataclass(frozen=True)
class DummyTask:
    """Losses and one batch of a task, as `accumulate` needs them."""

    losses: Callable[[nn.Module, Batch], Tensor]
    batch: Batch
    started: Callable[[], None] = lambda: None
    """Called before each micro-batch."""

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses."""
        self.started()
        return self.losses(model, batch)


def fake_step(
    config: Config,
    *,
    device: torch.device,
    per_sample_gradients: bool = False,
    architecture: Mapping[str, Any] | None = None,
    work: WorkCounter | None = None,
) -> TrainingStep:
    """The training step of a config, with random weights. Call it under FakeTensorMode, or with sizes that fit.

    Args:
        config: the config of any experiment; no data are read.
        device: the device of training.
        per_sample_gradients: store one gradient per example, like the hooks of Opacus, instead of clipping.
        architecture: overrides sizes of the model, see `memsave.tasks.definition.Variation`.
        work: counts the work of the step, each micro-batch in a section of its own.
    """
    with device:  # fake parameters cannot be moved to it later
        model = config.adapter.apply(definition_of(config).make_fake_model(architecture=architecture))
    if wants_sharding(config.trainer):
        shard_model(model, device, mesh=pretended_mesh())
    task = dummy_task(config, device=device, started=(lambda: None) if work is None else work.next_section)
    private: Any = PerSampleGradBaseline(model) if per_sample_gradients else _private(config, model)
    state = make_state(model, config.trainer, memory=config.memory)
    state.scaler = None  # it reads the values of gradients, and holds only one number

    def run() -> None:
        accumulate(model, task, task.batch, config.trainer, private=private, offload=state.offload)
        if work is not None:
            work.next_section()
        update(state)

    return TrainingStep(model, run, state.optimizer, work)


def dummy_task(config: Config, *, device: torch.device, started: Callable[[], None] = lambda: None) -> DummyTask:
    """The losses of the task, and a process's share of a batch, as far as it is needed to reach the peak of memory."""
    task = definition_of(config)
    batch = task.training_batch(count=_planned_examples(config)[0], device=device)
    return DummyTask(task.training_losses, batch, started)


def _planned_examples(config: Config) -> tuple[int, int]:
    """(examples of the fake step, examples of a micro-batch), for this process."""
    own = math.ceil(largest_batch(config) / process_count())
    micro = min(own, config.trainer.micro_batch_size or own)
    return min(own, MICRO_BATCHES * micro), micro


def whole_batch(config: Config, work: WorkCounter) -> dict[str, Totals]:
    """The work by label of a logical batch of the expected size, from that of the fake step, with fewer micro-batches.

    Every further micro-batch does the work of the first one.
    """
    count, micro = _planned_examples(config)
    further = (config.trainer.batch_size / process_count() - count) / micro
    first = work.sections[1]
    return {label: added(totals, first.get(label, {}), times=further) for label, totals in work.totals.items()}


def largest_batch(config: Config) -> int:
    """The examples of the largest batch of a run; a private run exceeds it with a probability of at most `EXCEEDED`.

    The size of a private batch is random, with tails below those of a Poisson distribution (Bernstein's inequality).
    """
    privacy, expected = config.privacy, config.trainer.batch_size
    if not isinstance(privacy, GhostPrivacy):
        return expected
    if privacy.largest_batch is not None:
        return privacy.largest_batch
    nats = math.log(config.trainer.steps / EXCEEDED)
    return math.ceil(expected + nats / 3 + math.sqrt(nats**2 / 9 + 2 * expected * nats))


def _private(config: Config, model: nn.Module) -> PrivateGradients | None:
    privacy, batch_size = config.privacy, config.trainer.batch_size
    if not isinstance(privacy, GhostPrivacy):
        return None
    size = EXPECTED_BATCHES * batch_size
    correlated = privacy.noise != "independent"
    kind: dict[str, Any] = {"noise": privacy.noise, "bands": privacy.bands, "sampler": "cyclic"} if correlated else {}
    mechanism = Mechanism(size, batch_size, 1.0, privacy.max_grad_norm, delta=default_delta(size), **kind)
    private = PrivateGradients(
        model,
        mechanism,
        seed=0,
        passes=privacy.passes,
        secure_noise=privacy.secure_noise,
        clipping=privacy.clipping,
        memory_budget=privacy.kept_bytes,
    )
    private.guard.enabled = False  # every step uses one batch that was not sampled
    return private


class PerSampleGradBaseline:
    """Stands in for `PrivateGradients`: stores one gradient per example until backward ends, like the hooks of Opacus.

    It allocates the tensors that every such method needs and does not compute their values.
    """

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def backward(self, losses: Tensor) -> None:
        """Allocate the gradients of each example, then their sum in `.grad`."""
        sums = [p.grad for p in self.parameters]
        samples: list[Tensor] = []  # all are freed when backward returns

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
        """Noise needs no memory: it is added in place."""
