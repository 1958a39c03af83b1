"""The ways to take one optimizer step on the logical batch: each process takes its share of the examples.

Noise is off at first, so that all processes and libraries must arrive at the same numbers, and is then switched on
for the times. The private batch is a Poisson sample of rate 1, which is the whole data set.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from experiments.distributed.problems import EXAMPLES, Language, Problem
from memsave.privacy import Mechanism, PrivateGradients
from memsave.processes import share, sum_gradients
from memsave.training.sharding import shard_model

BOUND = 1.0
NOISE = 1.0
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Training:
    """A network in training."""

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[], float]
    """Take one optimizer step; returns the sum of the losses of this process's examples, over EXAMPLES."""
    switch_noise_on: Callable[[], None] = lambda: None


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)


APART = "apart"
"""Each process trains on its share and sends nothing, which is no training of one model: the control for the times."""


def network(problem: Problem, parallel: str) -> nn.Module:
    model = problem.network()
    if parallel == "fsdp":
        shard_model(model, problem.device)
    return model


def plain(problem: Problem, parallel: str) -> Training:
    """The step of the training loop (`memsave.training.loop`) without privacy."""
    model = network(problem, parallel)
    optimizer = adamw(model)

    def step() -> float:
        loss = problem.losses(model, share(range(EXAMPLES))).sum() / EXAMPLES
        loss.backward()
        if parallel != APART:
            sum_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Training(model, optimizer, step)


def memsave(problem: Problem, parallel: str) -> Training:
    """The step of the training loop with exact per-example clipping."""
    model = network(problem, parallel)
    optimizer = adamw(model)
    private = PrivateGradients(model, Mechanism(EXAMPLES, EXAMPLES, 0.0, BOUND, delta=1e-3))
    batches = private.batches()

    def step() -> float:
        total = 0.0
        for rows in private.micro_batches(next(batches)):
            losses = problem.losses(model, rows)
            private.backward(losses)
            total += losses.sum().item()
        private.finish()
        optimizer.step()
        optimizer.zero_grad()
        return total / EXAMPLES

    def switch_noise_on() -> None:
        private.mechanism = replace(private.mechanism, noise_multiplier=NOISE)

    return Training(model, optimizer, step, switch_noise_on)


def opacus(problem: Language, parallel: str, *, mode: str) -> Training:
    """Opacus's PrivacyEngine, with its own distributed wrappers; mode: "hooks" or "ghost"."""
    from opacus import PrivacyEngine
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
    from opacus.utils.fsdp_utils import FSDP2Wrapper

    model = problem.network()
    if parallel == "ddp":
        model = DifferentiallyPrivateDistributedDataParallel(model)
    elif parallel == "fsdp":
        model = FSDP2Wrapper(model)
    inner = adamw(model)
    loader = torch.utils.data.DataLoader(range(EXAMPLES), batch_size=EXAMPLES)  # gives Opacus the numbers alone
    found = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=inner,
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        poisson_sampling=False,
        grad_sample_mode="ghost_fsdp" if parallel == "fsdp" else mode,
    )
    wrapped, optimizer = found[:2]

    def step() -> float:
        rows = share(range(EXAMPLES))
        logits, targets = problem.logits(wrapped, rows)
        loss: Any
        if mode == "ghost":
            loss = found[2](logits.flatten(0, 1), targets.flatten(), shape=logits.shape)
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() * len(rows) / EXAMPLES

    def switch_noise_on() -> None:
        optimizer.noise_multiplier = NOISE

    return Training(wrapped, inner, step, switch_noise_on)


def opacus_hooks(problem: Language, parallel: str) -> Training:
    return opacus(problem, parallel, mode="hooks")


def opacus_ghost(problem: Language, parallel: str) -> Training:
    return opacus(problem, parallel, mode="ghost")


WAYS: dict[str, Callable[[Any, str], Training]] = {
    "plain": plain,
    "memsave, private": memsave,
    "Opacus, hooks": opacus_hooks,
    "Opacus, ghost": opacus_ghost,
}


@dataclass(frozen=True)
class Variant:
    """A way of training, and how the processes share it."""

    way: str
    parallel: str
    """"" in one process, otherwise ddp, fsdp or `APART`."""
    processes: int

    @property
    def name(self) -> str:
        """Its row in the results."""
        return f"{self.way}, {self.parallel}, {self.processes}" if self.parallel else f"{self.way}, one process"

    @property
    def reference(self) -> "Variant | None":
        """The one-process variant that must arrive at the same numbers; of Opacus in one process, that of memsave."""
        if self.parallel == APART:
            return None
        if self.parallel:
            return Variant(self.way, "", 1)
        return Variant("memsave, private", "", 1) if self.way.startswith("Opacus") else None


def variants(problem: Problem, *, processes: int) -> list[Variant]:
    """Those of one process, which the others are compared with, and those of several."""
    ways = [way for way in WAYS if isinstance(problem, Language) or not way.startswith("Opacus")]
    found = [Variant(way, "", 1) for way in ways]
    found += [Variant(way, "ddp", processes) for way in ways]
    found += [Variant(way, "fsdp", processes) for way in ways if way != "Opacus, hooks"]
    return [*found, Variant("plain", APART, processes)]
