"""Breaches of privacy, planted by replacing parts of memsave within a context; memsave itself has no such switch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.ghost import ledger
from memsave.privacy import gradients
from memsave.privacy.noise import GaussianNoise
from memsave.privacy.noise_check import NoiseCheck
from memsave.privacy.sampling import Sampler

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Breach:
    """One breach."""

    name: str
    planted: Context = nullcontext
    """Plants the breach within the context."""
    losses: str = "own"
    """own, or mixed: each loss is divided by the number of words of its batch."""
    batches: str = "own"
    """own, or shuffled: the caller draws shuffled batches and does not use those of PrivateGradients."""
    resumed: bool = False
    """Whether the run is resumed half-way."""
    statistics: str | None = None
    """one run, trials, or None: the audit that may find it without the checks."""
    off: Context = field(default=nullcontext)
    """Turns off the checks that would end the run before the audit."""


def next_word_losses(model: nn.Module, words: Tensor) -> Tensor:
    """(B,): the mean cross-entropy of the next words of each sentence."""
    return F.cross_entropy(model(words[:, :-1]).transpose(1, 2), words[:, 1:], reduction="none").mean(1)


def mixed_losses(model: nn.Module, words: Tensor) -> Tensor:
    """The same, divided by the number of words of the batch that are above the median: a number of batch-mates."""
    found = next_word_losses(model, words)
    return found / (words > words.float().median()).sum().clamp(min=1)


@contextmanager
def noise_times(factor: float) -> Iterator[None]:
    """Noise of another size than the mechanism's."""
    original = GaussianNoise.add_

    def add(self: GaussianNoise, *, std: float) -> None:
        original(self, std=factor * std)

    with patch.object(GaussianNoise, "add_", add):
        yield


@contextmanager
def layer_without_noise() -> Iterator[None]:
    """The last parameter gets no noise."""
    original = GaussianNoise.add_

    def add(self: GaussianNoise, *, std: float) -> None:
        everything, self.parameters = self.parameters, self.parameters[:-1]
        original(self, std=std)
        self.parameters = everything

    with patch.object(GaussianNoise, "add_", add):
        yield


@contextmanager
def same_noise_twice() -> Iterator[None]:
    """Every second step draws the noise of the step before."""
    original, states = GaussianNoise.add_, {}

    def add(self: GaussianNoise, *, std: float) -> None:
        before = states.pop(id(self), None)
        if before is None:
            states[id(self)] = self.stream.get_state()
        else:
            self.stream.set_state(before)
        original(self, std=std)

    with patch.object(GaussianNoise, "add_", add):
        yield


@contextmanager
def noise_again_after_resume() -> Iterator[None]:
    """A resumed run draws its noise from the first state of the generator instead of the saved one."""
    original, first = gradients.PrivateGradients.load_state_dict, []
    add = GaussianNoise.add_

    def remember(self: GaussianNoise, *, std: float) -> None:
        first.append(self.stream.get_state())
        add(self, std=std)

    def load(self: gradients.PrivateGradients, state: dict[str, Any]) -> None:
        original(self, state)
        self._noise.stream.set_state(first[0])

    with (
        patch.object(GaussianNoise, "add_", remember),
        patch.object(gradients.PrivateGradients, "load_state_dict", load),
    ):
        yield


@contextmanager
def bound_doubled() -> Iterator[None]:
    """Examples are clipped to 2 C, and the noise is that of C."""
    original = gradients.GhostClipper

    def clipper(model: nn.Module, *, max_grad_norm: float, **options: Any) -> Any:
        return original(model, max_grad_norm=2 * max_grad_norm, **options)

    with patch.object(gradients, "GhostClipper", clipper):
        yield


@contextmanager
def cross_term_dropped() -> Iterator[None]:
    """The norm of a tied weight lacks the inner product of its two gradients."""
    original = ledger.inner_products

    def products(one: Any, other: Any, **options: Any) -> Tensor:
        found = original(one, other, **options)
        return found if one is other else torch.zeros_like(found)

    with patch.object(ledger, "inner_products", products):
        yield


@contextmanager
def shuffled_sampler() -> Iterator[None]:
    """PrivateGradients draws shuffled batches of equal size, and the accountant assumes Poisson samples."""

    waiting: dict[int, list[list[int]]] = {}

    def draw(self: Sampler) -> list[int]:
        size, count = self.mechanism.size, self.mechanism.batch_size
        rest = waiting.setdefault(id(self), [])
        if not rest:
            order = np.argsort(self._stream.uniforms(size)).tolist()
            rest.extend(order[first : first + count] for first in range(0, size // count * count, count))
        return rest.pop(0)

    with patch.object(Sampler, "draw", draw):
        yield


@contextmanager
def sample_rate_doubled() -> Iterator[None]:
    """Batches are twice as large as the accountant assumes."""
    original = Sampler._poisson

    def poisson(self: Sampler, members: np.ndarray, rate: float) -> list[int]:
        return original(self, members, min(1.0, 2 * rate))

    with patch.object(Sampler, "_poisson", poisson):
        yield


@contextmanager
def no_noise_check() -> Iterator[None]:
    """Steps do not compare gradients before and after the noise."""
    with patch.object(NoiseCheck, "after", lambda self, std: None):
        yield


HONEST = Breach("none: an honest run", statistics="both")
BREACHES = (
    Breach("noise off", lambda: noise_times(0.0), statistics="one run", off=no_noise_check),
    Breach("noise halved", lambda: noise_times(0.5), statistics="one run", off=no_noise_check),
    Breach("noise 10% too small", lambda: noise_times(0.9), statistics="one run", off=no_noise_check),
    Breach("one layer without noise", layer_without_noise),
    Breach("the same noise twice", same_noise_twice),
    Breach("a resumed run repeats noise", noise_again_after_resume, resumed=True),
    Breach("C doubled", bound_doubled, statistics="trials"),
    Breach("cross term dropped in a tied layer", cross_term_dropped),
    Breach("a loss that mixes examples", losses="mixed"),
    Breach("own shuffled batches", batches="shuffled"),
    Breach("shuffled batches in the sampler", shuffled_sampler),
    Breach("sample rate doubled", sample_rate_doubled),
)
