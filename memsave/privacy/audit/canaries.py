"""Canaries in a private training: examples that an audit inserts, each with probability 1/2, to find them again.

The mechanism samples n examples and m canaries alike. Indices from n on are canaries, and a drawn canary that is not
included adds nothing. The sample rate is therefore that of n + m examples, whatever was included, and the canaries
audit the sampler, too.

A gradient-space canary has a gradient of norm C in a known direction u: random signs at some elements of the
parameters, which no other canary has. It is added to the clipped sum before the noise. The adversary sees each noisy
sum g, as the threat model of DP-SGD allows, and scores a canary by the likelihood ratio of "included" and "excluded":

    sum over steps of  log(1 - q + q exp((2 x - 1) / (2 sigma^2))),    x = <g, u> / C

An input-space canary is a record that goes through the model like any other. The caller loads it under its index, and
scores it by the trained model.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memsave.privacy.errors import PrivacyError
from memsave.privacy.mechanism import Mechanism
from memsave.processes import broadcast, is_sharded, process_rank

ELEMENTS = 64  # of a canary's direction; their random signs average the gradients of examples out
MOST_ELEMENTS = 2**20  # of all canaries together
DIRECTIONS = 20230515  # the seed of the directions, which are public


class CanaryAudit:
    """Inserts canaries into the steps of one `PrivateGradients`, and scores them.

        audit = CanaryAudit(examples=n, gradient=1000)
        mechanism = Mechanism(audit.size, ...)
        private = PrivateGradients(model, mechanism, audit=audit)
        ...                                               # train as usual
        report = audit_report(private)

    Args:
        examples: n; `PrivateGradients.batches` yields indices below n, and those of included input-space canaries.
        gradient: the number of gradient-space canaries.
        inputs: the number of input-space canaries; they have the indices n, n + 1, ...
        seed: of the inclusion; None draws it from the operating system. A number is for tests.
    """

    def __init__(self, *, examples: int, gradient: int = 1000, inputs: int = 0, seed: int | None = None):
        if min(gradient, inputs) < 0 or gradient + inputs < 1:
            raise PrivacyError(f"an audit has {gradient} + {inputs} canaries; give at least one")
        self.examples, self.gradient, self.inputs = examples, gradient, inputs
        chance = random.SystemRandom() if seed is None else random.Random(seed)
        drawn = [chance.random() < 0.5 for _ in range(inputs + gradient)]
        self.included: Tensor = broadcast(torch.tensor(drawn, device="cpu"))
        """(inputs + gradient,): whether each canary is a part of the training data. Secret until the end."""
        self.evidence = torch.zeros(gradient, dtype=torch.float64, device="cpu")
        """(gradient,): the score of each gradient-space canary so far."""
        self.initial_losses: Tensor | None = None
        """(inputs,): the losses of the input-space canaries before training, if the caller has set them."""
        self.draws = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        """(size,): how often each example and each canary was in a batch."""
        self.batch_sizes: list[int] = []
        """The number of examples and canaries, included or not, in the batch of each step."""
        self._waiting: deque[list[int]] = deque()
        self._entries: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = []

    @property
    def size(self) -> int:
        """Examples and canaries; the size of the mechanism."""
        return self.examples + self.inputs + self.gradient

    def start(self, parameters: Sequence[nn.Parameter], mechanism: Mechanism) -> None:
        """Choose the directions; `PrivateGradients` calls it. Raises PrivacyError for what cannot be audited."""
        if mechanism.size != self.size:
            raise PrivacyError(
                f"the mechanism has {mechanism.size} examples, but the audit samples {self.size} with its canaries; "
                f"give the mechanism the size of the audit"
            )
        if mechanism.sampler != "poisson" or mechanism.noise != "independent":
            raise PrivacyError(
                f"an audit scores canaries of Poisson batches with independent noise, and this run has "
                f"sampler={mechanism.sampler} and noise={mechanism.noise}; audit one with sampler=poisson and "
                f"noise=independent"
            )
        if any(map(is_sharded, parameters)):
            raise PrivacyError("canaries cannot be added to a sharded model; audit it on one process")
        self._mechanism = mechanism
        self._entries = _directions(parameters, count=self.gradient) if self.gradient else []

    def without_canaries(self, batch: Sequence[int]) -> list[int]:
        """The indices of a drawn batch that go through the model: examples, and included input-space canaries."""
        first, last = self.examples, self.examples + self.inputs
        return [each for each in batch if each < first or (each < last and bool(self.included[each - first]))]

    def draw(self, batch: Sequence[int]) -> None:
        """Record a batch, which `add_gradients` and `observe` will use; batches are used in their order."""
        self._waiting.append(list(batch))

    def add_gradients(self) -> None:
        """Add the gradients of the included canaries of the batch to `.grad`, before the noise; in rank 0."""
        batch = torch.tensor(self._waiting[0], dtype=torch.long, device="cpu")
        drawn = torch.zeros(self.size, dtype=torch.bool, device="cpu")
        drawn[batch] = True
        present = (drawn[self.examples :] & self.included)[self.inputs :].double() * self._mechanism.max_grad_norm
        if process_rank() > 0:
            return
        for parameter, places, canaries, signs in self._entries:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.contiguous()
            values = signs * present.to(places.device)[canaries]
            parameter.grad.view(-1).index_add_(0, places, values.to(parameter.grad.dtype))

    def observe(self) -> None:
        """Score the noisy sum in `.grad`, and count the batch."""
        mechanism, batch = self._mechanism, self._waiting.popleft()
        products = torch.zeros(self.gradient, dtype=torch.float64, device="cpu")
        for parameter, places, canaries, signs in self._entries:
            assert parameter.grad is not None
            values = parameter.grad.reshape(-1)[places].double() * signs
            products.index_add_(0, canaries.cpu(), values.cpu())
        x, q, sigma = products / mechanism.max_grad_norm, mechanism.sample_rate, mechanism.noise_multiplier
        if not sigma:
            self.evidence += x
        elif q == 1:
            self.evidence += (2 * x - 1) / (2 * sigma**2)
        else:
            ratio = math.log(q) + (2 * x - 1) / (2 * sigma**2)
            self.evidence += torch.logaddexp(ratio, torch.full_like(ratio, math.log1p(-q)))
        self.draws[torch.tensor(batch, dtype=torch.long, device="cpu")] += 1
        self.batch_sizes.append(len(batch))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what was included, and the scores so far. Secret."""
        state = {
            "audit_included": self.included,
            "audit_evidence": self.evidence,
            "audit_draws": self.draws,
            "audit_batch_sizes": torch.tensor(self.batch_sizes, dtype=torch.int64, device="cpu"),
        }
        return state if self.initial_losses is None else {**state, "audit_initial_losses": self.initial_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the canaries of a checkpoint. Raises PrivacyError if it has none, or others."""
        self.check_state(state)
        self._waiting.clear()
        self.included, self.evidence = state["audit_included"].clone(), state["audit_evidence"].clone()
        self.draws, self.batch_sizes = state["audit_draws"].clone(), state["audit_batch_sizes"].tolist()
        self.initial_losses = state.get("audit_initial_losses")

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise PrivacyError if a checkpoint has no canaries, or others."""
        sizes = [len(state.get(f"audit_{key}", ())) for key in ("included", "evidence")]
        if sizes != [len(self.included), self.gradient]:
            raise PrivacyError(
                "the checkpoint is of a run without these canaries, and an audit that starts late shows nothing; "
                "continue with the audit it was made with"
            )


def _directions(parameters: Sequence[nn.Parameter], *, count: int) -> list[tuple[nn.Parameter, Tensor, Tensor, Tensor]]:
    """For each parameter with elements of a direction: (parameter, their places, their canaries, their values).

    The directions have norm 1 and no element in common.
    """
    total = sum(p.numel() for p in parameters)
    each = min(ELEMENTS, total // count, max(1, MOST_ELEMENTS // count))
    if not each:
        raise PrivacyError(
            f"{count} gradient-space canaries need as many trainable parameters, and the model has {total}; give fewer"
        )
    chance = random.Random(DIRECTIONS)
    places = torch.tensor(chance.sample(range(total), each * count), device="cpu")
    canaries = torch.arange(count, device="cpu").repeat_interleave(each)
    signs = torch.tensor(chance.choices((-1.0, 1.0), k=each * count), dtype=torch.float64, device="cpu")
    entries, start = [], 0
    for parameter in parameters:
        own = (places >= start) & (places < start + parameter.numel())
        if own.any():
            found = (places[own] - start, canaries[own], signs[own] / math.sqrt(each))
            moved = [part.to(parameter.device) for part in found]
            entries.append((parameter, moved[0], moved[1], moved[2]))
        start += parameter.numel()
    return entries
