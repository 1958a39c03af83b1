"""What the loop asks of a task.

A task yields one loss per example and never a mean: the loop can then split a logical batch in any way, and weigh each
example by itself, as private training must.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from memsave.data.loader import Index

Batch = dict[str, Any]
"""Tensors with the examples along dimension 0, and lists with one entry an example."""


class Losses(Protocol):
    """All that a training step asks of a task."""

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,): example i's depends on example i alone."""


class Task(Losses, Protocol):
    """A kind of work: its data, its loss, its scores."""

    unit: str
    """What one example is, and so what privacy would protect."""

    goal: str
    """The score to go by, of those of `evaluate`; with a minus where less is better."""

    @property
    def size(self) -> int:
        """Training examples."""

    @property
    def fingerprint(self) -> str:
        """A digest of the training examples, and of whatever else batches follow from but seed and batch size."""

    @property
    def counts(self) -> dict[str, Any]:
        """Training examples, and what of the data is cut or left out, for `result.json`."""

    def describe_counts(self) -> str:
        """The same in one line."""

    def load(self, indices: Sequence[Index]) -> Batch:
        """The batch of these training examples, perhaps none, on the CPU. Called from several threads at once."""

    def place(self, batch: Batch) -> Batch:
        """The batch on the device of the model."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The scores on what was held out."""

    def show(self, folder: Path) -> list[Path]:
        """Write what a person would look at after the last evaluation; the paths of the files."""

    def release(self, model: nn.Module, folder: Path) -> None:
        """Write the model in the form in which it is handed on."""

    def summary(self, scores: dict[str, float]) -> str:
        """The scores in one line."""


def split(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Cut a logical batch into micro-batches of at most `size` examples (None: one of all)."""
    count = examples(batch)
    step = max(1, count if size is None else size)
    for first in range(0, count, step):
        yield {key: value[first : first + step] for key, value in batch.items()}


def examples(batch: Batch) -> int:
    """How many examples the batch holds."""
    return len(next(iter(batch.values())))
