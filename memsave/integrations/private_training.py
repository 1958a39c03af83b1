"""What the integrations share: the privacy arguments, and Poisson batches in micro-batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from memsave.privacy import Mechanism, PrivacyError, PrivateGradients, default_delta

MicroBatch = tuple[int, Any]
"""(number of examples, what the collator made of them)."""


@dataclass(frozen=True)
class PrivacyArguments:
    """How to train privately; give `target_epsilon` or `noise_multiplier`."""

    target_epsilon: float | None = None
    """The epsilon that all steps together spend; the noise is calibrated to it."""
    noise_multiplier: float | None = None
    """sigma, in place of `target_epsilon`."""
    target_delta: float | None = None
    """None takes n^-1.1 for n examples."""
    max_grad_norm: float = 0.1
    """C: each example's gradient is clipped to this norm."""
    micro_batch_size: int | None = None
    """Examples in one forward; changes memory and time, and nothing else."""
    accountant: str = "pld"
    """pld, prv or rdp."""
    sampler: str = "poisson"
    """How batches are drawn; see `Mechanism`."""
    largest_batch: int | None = None
    """Of sampler="truncated_poisson"."""
    noise: str = "independent"
    """independent, banded or regenerated; see `Mechanism`."""
    bands: int = 4
    """Of correlated noise."""
    clipping: str = "flat"
    """flat, automatic or per_layer; see `GhostClipper`."""
    passes: str | int = "auto"
    """1, 2, auto or direct; see `GhostClipper`."""
    memory_budget: int = 0
    """Bytes that may be kept to save time; see `GhostClipper`."""
    head: str = "chunked"
    """chunked or logits; see `causal_lm_losses`."""
    secure_noise: bool = False
    """Noise that protects against attacks on floating-point numbers; see `GaussianNoise`."""
    seed: int | None = None
    """None draws secret seeds; a number is for tests and not private."""

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError("give either target_epsilon or noise_multiplier to PrivacyArguments")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise PrivacyError(f"micro_batch_size is {self.micro_batch_size}; give 1 or more")

    def start(self, model: nn.Module, *, size: int, batch_size: int, steps: int) -> PrivateGradients:
        """The private gradients of a training of `steps` steps with batches of about `batch_size` of `size` examples.

        Raises PrivacyError for numbers without a guarantee, and ValueError for a model that cannot be clipped.
        """
        mechanism = Mechanism(
            size,
            batch_size,
            1.0 if self.noise_multiplier is None else self.noise_multiplier,
            self.max_grad_norm,
            delta=default_delta(size) if self.target_delta is None else self.target_delta,
            accountant=self.accountant,
            sampler=self.sampler,
            largest_batch=self.largest_batch,
            noise=self.noise,
            bands=1 if self.noise == "independent" else self.bands,
        )
        if self.target_epsilon is not None:
            mechanism = mechanism.calibrated(self.target_epsilon, steps=steps)
        return PrivateGradients(
            model,
            mechanism,
            clipping=self.clipping,
            passes=self.passes,
            memory_budget=self.memory_budget,
            secure_noise=self.secure_noise,
            seed=self.seed,
        )


def epsilon_spent(private: PrivateGradients | None) -> float:
    """The epsilon so far; 0.0 before the training, infinity with a known seed, which is not private."""
    if private is None:
        return 0.0
    return math.inf if private.seeded else private.epsilon


class PoissonSampler:
    """The batches of one epoch: as many as the epoch's examples would fill.

    Args:
        private: draws the batches.
        steps: the number of batches.
        refetched: whether a resumed loop fetches the batches that it has used, and drops them.
    """

    def __init__(self, private: PrivateGradients, *, steps: int, refetched: bool):
        self._private, self._steps, self._refetched = private, steps, refetched
        self.done = 0
        """How many batches of the next epoch a resumed run has used already; they are not drawn again."""
        self._draws: Iterator[list[int]] | None = None

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        done, self.done = self.done, 0
        if self._draws is None:
            self._draws = self._private.batches()
        for number in range(self._steps):
            if number >= done:
                yield next(self._draws)
            elif self._refetched:
                yield []


def poisson_loader(
    dataset: Any, sampler: PoissonSampler, *, collate: Callable[[list[Any]], Any], micro_batch_size: int, **options: Any
) -> DataLoader:
    """A loader of logical batches, each a list of micro-batches; `options` are those of DataLoader."""
    split = partial(_micro_batches, collate=collate, size=micro_batch_size)
    return _Loader(_LogicalBatches(dataset), batch_sampler=sampler, collate_fn=split, **options)


class _Loader(DataLoader):
    """The state that a resumed loader would need is that of `PrivateGradients`."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _LogicalBatches(Dataset):
    """The examples of one logical batch together, also of an empty one."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self._dataset[index] for index in indices]


def _micro_batches(examples: Sequence[Any], *, collate: Callable[[list[Any]], Any], size: int) -> list[MicroBatch]:
    parts = [list(examples[first : first + size]) for first in range(0, len(examples), size)]
    return [(len(part), collate(part)) for part in parts]
