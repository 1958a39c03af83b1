"""Many small trainings with and without one canary, by the same mechanism, and what their scores show.

The canary is a record that goes through the model and the clipper like any other. The adversary knows all records, the
model before each step, and each noisy sum g, but not the noise nor which records were drawn. With plain autograd on a
copy of the model it computes the clipped gradient c of the canary and the clipped sum s of the other records, and
scores the training by the likelihood ratio of "the canary was there":

    sum over steps of  log(1 - q + q exp((2 <g - q s, c> - |c|^2) / (2 sigma^2 C^2)))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memsave.privacy.audit.canaries import CanaryAudit
from memsave.privacy.audit.repeated import CHOOSING, ErrorRates, error_rates
from memsave.privacy.audit.report import LEAST_RUNS, epsilon_of_refuted_noise
from memsave.privacy.gradients import Mechanism, PrivateGradients

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Problem:
    """A small training: its model, its records, and the canary as the last of them."""

    make_model: Callable[[], nn.Module]
    records: Tensor
    """(n + 1, ...)."""
    losses: Callable[[nn.Module, Tensor], Tensor]
    """(B,) losses of some records."""


@dataclass(frozen=True)
class Trials:
    """The scores of many trainings."""

    mechanism: Mechanism
    steps: int
    present: np.ndarray
    """The scores of the trainings with the canary."""
    absent: np.ndarray
    """The scores of the trainings without it."""

    def bounds(self, *, confidence: float) -> dict[str, float]:
        """Lower bounds of epsilon, which hold together: by the error rates alone, and with Gaussian noise assumed."""
        return self._bounds(self.present, self.absent, confidence=confidence)

    def most(self, *, confidence: float) -> dict[str, float]:
        """The bounds if every guess were right."""
        return self._bounds(np.ones(len(self.present)), np.zeros(len(self.absent)), confidence=confidence)

    def _bounds(self, present: np.ndarray, absent: np.ndarray, *, confidence: float) -> dict[str, float]:
        if min(len(present), len(absent)) < LEAST_RUNS:
            return {"error rates": 0.0, "Gaussian": 0.0}
        rates = error_rates(present, absent, delta=self.mechanism.delta, significance=1 - confidence)
        return {"error rates": rates.epsilon(self.mechanism.delta), "Gaussian": self._gaussian(rates)}

    def _gaussian(self, rates: ErrorRates) -> float:
        if not self.mechanism.noise_multiplier:
            return rates.epsilon(self.mechanism.delta)
        return epsilon_of_refuted_noise(rates.refute, self.mechanism, steps=self.steps)


def run_trials(problem: Problem, mechanism: Mechanism, *, runs: int, steps: int, clipping: str = "flat") -> Trials:
    """Train `runs` times, each with the canary with probability 1/2. Raises PrivacyError if a step is not private."""
    scores: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(runs):
        included, score = _trial(problem, mechanism, steps=steps, clipping=clipping)
        scores[included].append(score)
    return Trials(mechanism, steps, np.array(scores[True]), np.array(scores[False]))


def counted_runs(runs: int) -> int:
    """The runs that are left to count after the choice of the thresholds."""
    return runs - runs // CHOOSING


def _trial(problem: Problem, mechanism: Mechanism, *, steps: int, clipping: str) -> tuple[bool, float]:
    records, audit = problem.records, CanaryAudit(examples=len(problem.records) - 1, gradient=0, inputs=1)
    model, twin = problem.make_model(), problem.make_model()
    private = PrivateGradients(model, mechanism, clipping=clipping, audit=audit)
    optimizer, score = torch.optim.SGD(model.parameters(), LEARNING_RATE), 0.0
    try:
        for _, indices in zip(range(steps), private.batches(), strict=False):
            twin.load_state_dict(model.state_dict())
            clipped = _clipped_gradients(twin, problem, bound=mechanism.max_grad_norm)
            if indices:
                private.backward(problem.losses(model, records[indices]))
            private.finish()
            noisy = torch.cat([_gradient(p).flatten() for p in model.parameters()]).double() * mechanism.batch_size
            score += _log_ratio(noisy, clipped, mechanism)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        private.close()
    return bool(audit.included[0]), score


def _log_ratio(noisy: Tensor, clipped: Tensor, mechanism: Mechanism) -> float:
    canary, q = clipped[-1], mechanism.sample_rate
    product = float((noisy - q * clipped[:-1].sum(0)) @ canary)
    variance = (mechanism.noise_multiplier * mechanism.max_grad_norm) ** 2
    ratio = (2 * product - float(canary @ canary)) / (2 * variance or 1.0)
    return ratio if q == 1 else float(np.logaddexp(math.log(q) + ratio, math.log1p(-q)))


def _clipped_gradients(model: nn.Module, problem: Problem, *, bound: float) -> Tensor:
    """(n + 1, P): the clipped gradient of each record alone, by plain autograd, in float64."""
    rows = []
    for record in problem.records:
        loss = problem.losses(model, record[None])[0]
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradient = torch.cat([part.flatten() for part in parts]).double()
        rows.append(gradient * min(1.0, bound / float(gradient.norm())))
    return torch.stack(rows)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
