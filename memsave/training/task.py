"""The protocol of a task, as used by the training loop.

A task returns one loss per example and never a mean. The loop can then split a logical batch into micro-batches of any
size, and private training can clip each example.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from memsave.data.loader import Index

Batch = dict[str, Any]
"""Tensors with the examples along dimension 0, and lists with one entry per example."""


class Losses(Protocol):
    """The part of a task that a training step needs."""

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,): loss i depends only on example i."""


class Task(Losses, Protocol):
    """Data, loss and scores of a task."""

    unit: str
    """The meaning of one example, which is the unit that privacy protects."""

    goal: str
    """The score of `evaluate` that early stopping compares; with a leading minus if smaller is better."""

    @property
    def size(self) -> int:
        """Number of training examples."""

    @property
    def fingerprint(self) -> str:
        """A digest of the training examples and of the settings that determine batches, except seed and batch size."""

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of training examples and of examples that are cut or left out, for `result.json`."""

    def describe_counts(self) -> str:
        """The counts in one line."""

    def load(self, indices: Sequence[Index]) -> Batch:
        """The batch of these training examples on the CPU; `indices` may be empty. Must be thread-safe."""

    def place(self, batch: Batch) -> Batch:
        """The batch on the device of the model."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The scores on the held-out data."""

    def show(self, folder: Path) -> list[Path]:
        """Write pictures and tables of the last evaluation; returns the paths of the files."""

    def release(self, model: nn.Module, folder: Path) -> None:
        """Write the model for release, without data and optimizer state."""

    def summary(self, scores: dict[str, float]) -> str:
        """The scores in one line."""


@runtime_checkable
class CountsTokens(Protocol):
    """A task whose progress is also given in tokens; optional."""

    def count_tokens(self, batch: Batch) -> int:
        """The tokens of a batch on the CPU, without padding."""


@runtime_checkable
class HasDataFingerprint(Protocol):
    """A task that can tell its data apart from their use; optional."""

    @property
    def data_fingerprint(self) -> str:
        """A digest of the raw training data alone: the same for any tokenizer, length, crop or batch.

        Private runs with the same digest spend the privacy of the same persons.
        """


@runtime_checkable
class AcceptsCanaries(Protocol):
    """A task that can make records for an audit (`audit.canary=input`); optional."""

    def add_canaries(self, count: int, *, seed: int) -> None:
        """Append records that no real example resembles, such as random targets, to the training examples.

        They get the indices from `size` on, and `size` grows. The same seed gives the same records.
        """


def data_fingerprint(task: Task) -> str:
    """Sixteen hexadecimal digits that identify the task's training data, for file names."""
    found = task.data_fingerprint if isinstance(task, HasDataFingerprint) else task.fingerprint
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def pinned_batch(load: Callable[[Sequence[Index]], Batch], indices: Sequence[Index]) -> Batch:
    """A loaded batch in pinned memory, from which a copy to a GPU need not be waited for."""
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in load(indices).items()}


def placed(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; nothing waits for the copy of pinned memory."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def split(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Split a logical batch into micro-batches of at most `size` examples; None yields the whole batch."""
    count = examples(batch)
    step = max(1, count if size is None else size)
    for first in range(0, count, step):
        yield {key: value[first : first + step] for key, value in batch.items()}


def examples(batch: Batch) -> int:
    """The number of examples in a batch."""
    return len(next(iter(batch.values())))
