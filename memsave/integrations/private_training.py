"""What the integrations share: the privacy arguments, and Poisson batches in micro-batches."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from memsave.privacy import Mechanism, PrivacyError, PrivateGradients

MicroBatch = tuple[int, Any, list[int] | None]
"""(number of examples, what the collator made of their rows, the example of each row, or None for one row each)."""


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
    unit: str | None = None
    """The column of the data that names the person. All rows of a person are then one example with the mean of their
    losses; sizes of batches count persons. None: each row is an example."""

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError("give either target_epsilon or noise_multiplier to PrivacyArguments")
        if not isinstance(self.memory_budget, int) or self.memory_budget < 0:
            raise PrivacyError(
                f"memory_budget is {self.memory_budget!r}; give a number of bytes, such as 2**28 (auto is for runs of "
                f"memsave, which plan a step first: privacy.memory_budget=auto)"
            )
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise PrivacyError(f"micro_batch_size is {self.micro_batch_size}; give 1 or more")

    def start(self, model: nn.Module, *, size: int, batch_size: int, steps: int) -> PrivateGradients:
        """The private gradients of a training of `steps` steps with batches of about `batch_size` of `size` examples.

        Raises PrivacyError for numbers without a guarantee, and ValueError for a model that cannot be clipped.
        """
        mechanism = Mechanism.of_options(self, size=size, batch_size=batch_size)
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


def rows_of_units(dataset: Any, column: str) -> list[list[int]]:
    """The numbers of the rows of each person, by a column of the data. Raises PrivacyError without it."""
    of_person: dict[Any, list[int]] = {}
    for number in range(len(dataset)):
        row = dataset[number]
        name = row.get(column) if isinstance(row, Mapping) else None
        if name is None or name == "":
            raise PrivacyError(
                f"row {number} of train_dataset has no {column}, which PrivacyArguments(unit=) names; give each row "
                f"the name of its person"
            )
        of_person.setdefault(name, []).append(number)
    return list(of_person.values())


def losses_of_units(losses: Tensor, rows: Sequence[int], *, count: int) -> Tensor:
    """(count,): the mean loss of the rows of each example."""
    examples = torch.tensor(rows, device=losses.device, dtype=torch.long)
    sizes = torch.bincount(examples, minlength=count)
    return losses.new_zeros(count).index_add(0, examples, losses) / sizes.clamp(min=1)


def poisson_loader(
    dataset: Any,
    sampler: PoissonSampler,
    *,
    collate: Callable[[list[Any]], Any],
    micro_batch_size: int,
    units: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> DataLoader:
    """A loader of logical batches, each a list of micro-batches.

    `units`: the numbers of the rows of each example, see `rows_of_units`; None for one row each. `options` are those of
    DataLoader.
    """
    split = partial(_micro_batches, collate=collate, size=micro_batch_size, grouped=units is not None)
    return _Loader(_LogicalBatches(dataset, units), batch_sampler=sampler, collate_fn=split, **options)


class _Loader(DataLoader):
    """The state that a resumed loader would need is that of `PrivateGradients`."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _LogicalBatches(Dataset):
    """The rows of the examples of one logical batch together, a list for each example; also of an empty one."""

    def __init__(self, dataset: Any, units: Sequence[Sequence[int]] | None):
        self._dataset, self._units = dataset, units

    def __len__(self) -> int:
        return len(self._dataset if self._units is None else self._units)

    def __getitems__(self, indices: Sequence[int]) -> list[list[Any]]:
        rows = [[index] if self._units is None else self._units[index] for index in indices]
        return [[self._dataset[row] for row in of_example] for of_example in rows]


def _micro_batches(
    examples: Sequence[list[Any]], *, collate: Callable[[list[Any]], Any], size: int, grouped: bool
) -> list[MicroBatch]:
    found: list[MicroBatch] = []
    for first in range(0, len(examples), size):
        part = examples[first : first + size]
        of_row = [number for number, rows in enumerate(part) for _ in rows]
        found.append((len(part), collate([row for rows in part for row in rows]), of_row if grouped else None))
    return found
