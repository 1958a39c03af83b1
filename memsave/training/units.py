"""`UnitTask`: a task whose examples are units, such as persons with several records. One implementation for all tasks.

The task of the records stays as it is: it loads records and returns one loss for each. `UnitTask` draws units instead
of records, and folds the losses of a unit's records into one:

    loss of a unit = mean (or sum) of the losses of its records in this step
    with example_rows(unit of each record, examples=B): losses = task.per_example_losses(model, records)

The clipper therefore measures the norm of the unit's whole gradient (`memsave.ghost.example_rows`). A batch has the
records of a unit along dimension 1, padded to the unit with the most: (B, R, ...). Padding never reaches the model.

A step takes at most `most` records of a unit. Which ones, and what augments them, depends on (seed, name of the unit,
step) alone, in training without privacy on the epoch instead of the step. It must not depend on the other units: then a
unit more or less would change the gradients of all others, and not only add or remove one.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from memsave.data.loader import Index
from memsave.data.units import UnitKeys
from memsave.ghost import example_rows
from memsave.ghost.gradients import has_values
from memsave.training.task import Batch, CountsTokens, HasDataFingerprint, Task

EXISTS = "record_exists"
"""The key of the mask (B, R) of a batch: which records of the units exist."""
RecordLosses = Callable[[nn.Module, Batch], Tensor]


@runtime_checkable
class NamesUnits(Protocol):
    """A task whose records belong to units; needed for data.unit."""

    record_units: Sequence[str | None]
    """The unit of each training record, in the order of their numbers."""


class UnitTask:
    """The units of a task as its examples; implements `memsave.training.task.Task`. See `with_units`.

    Args:
        task: the task of the records.
        names: the unit of each training record.
        keys: how records become one example.
        seed: of the choice of records, as trainer.seed.
    """

    def __init__(self, task: Task, names: Sequence[str], *, keys: UnitKeys, seed: int):
        self.task, self.keys, self.seed = task, keys, seed
        self.unit, self.goal = keys.describe_unit(), task.goal
        groups: dict[str, list[int]] = {}
        for record, name in enumerate(names):
            groups.setdefault(name, []).append(record)
        self.names, self.groups = list(groups), list(groups.values())

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.groups)

    @property
    def fingerprint(self) -> str:
        """A digest of the records, of the unit of each, and of the settings that determine batches and losses."""
        drawn = (self.keys.unit_loss, self.keys.records_per_unit)
        content = repr((self.task.fingerprint, self.names, self.groups, drawn))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def data_fingerprint(self) -> str:
        """That of the task of the records: the data are the same, whatever the unit."""
        task = self.task
        return task.data_fingerprint if isinstance(task, HasDataFingerprint) else task.fingerprint

    @property
    def counts(self) -> dict[str, Any]:
        """The counts of the records, and those of the units; `examples` is the number of units."""
        sizes, most = [len(group) for group in self.groups], self.keys.records_per_unit
        own = {"records": sum(sizes), "smallest": min(sizes), "largest": max(sizes)}
        own |= {"larger_than_records_per_unit": sum(most is not None and size > most for size in sizes)}
        return {**self.task.counts, "examples": self.size, "units": own}

    def describe_counts(self) -> str:
        """The counts in one line."""
        found, most = self.counts["units"], self.keys.records_per_unit
        beyond = found["larger_than_records_per_unit"]
        cap = "" if most is None else f", {beyond} with more than {most} (data.records_per_unit)"
        return (
            f"{self.task.describe_counts()}; data.unit makes {self.size} examples of the training records, with "
            f"{found['smallest']} to {found['largest']} records each{cap}"
        )

    def records(self, index: Index) -> list[Index]:
        """The records of a unit in this draw: all, or a random choice of `records_per_unit`."""
        name, own, most = self.names[index.example], self.groups[index.example], self.keys.records_per_unit
        occasion = index.draw // self.size  # the step of a private run, otherwise the epoch
        places: Sequence[int] = range(len(own))
        if most is not None and len(own) > most:
            generator = np.random.default_rng(_number(self.seed, occasion, name))
            places = sorted(generator.choice(len(own), most, replace=False).tolist())
        size = self.task.size
        return [Index(own[place], _number(occasion, place, name) * size + own[place]) for place in places]

    def load(self, indices: Sequence[Index]) -> Batch:
        """The records of these units on the CPU, (B, R, ...), and the mask of those that exist. Thread-safe."""
        chosen = [self.records(index) for index in indices]
        batch = self.task.load([record for records in chosen for record in records])
        counts = torch.tensor([len(records) for records in chosen], dtype=torch.long)
        exists = torch.arange(max(map(len, chosen), default=1)) < counts[:, None]  # (B, R)
        return {EXISTS: exists, **{key: _stacked(value, exists) for key, value in batch.items()}}

    def place(self, batch: Batch) -> Batch:
        """The batch on the device of the model."""
        return self.task.place(batch)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses, one per unit over its records."""
        return unit_losses(self.task.per_example_losses, model, batch, reduction=self.keys.unit_loss)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The scores on the held-out records."""
        return self.task.evaluate(model)

    def show(self, folder: Path) -> list[Path]:
        """As the task of the records."""
        return self.task.show(folder)

    def release(self, model: nn.Module, folder: Path) -> None:
        """As the task of the records."""
        self.task.release(model, folder)

    def summary(self, scores: dict[str, float]) -> str:
        """As the task of the records."""
        return self.task.summary(scores)


class _CountingUnitTask(UnitTask):
    """The units of a task that counts tokens."""

    task: Any

    def count_tokens(self, batch: Batch) -> int:
        """The tokens of a batch on the CPU, without padding."""
        records, _ = records_of(batch)
        return int(self.task.count_tokens(records))


def with_units(task: Task, *, keys: UnitKeys, seed: int) -> UnitTask:
    """The task whose examples are the units of another task. Raises TypeError for a task that does not know them."""
    if not isinstance(task, NamesUnits):
        raise TypeError(f"{type(task).__name__} has no record_units, the unit of each training record, for data.unit")
    names = [str(name) for name in task.record_units]
    kind = _CountingUnitTask if isinstance(task, CountsTokens) else UnitTask
    return kind(task, names, keys=keys, seed=seed)


def unit_losses(losses_of: RecordLosses, model: nn.Module, batch: Batch, *, reduction: str) -> Tensor:
    """(B,): the mean or sum of the losses of each unit's records; zero for a unit without records.

    `losses_of(model, records)` returns one loss for each record of a batch (R', ...).
    """
    exists = batch[EXISTS]
    records, unit_of_record = records_of(batch)
    with example_rows(unit_of_record, examples=len(exists)):
        losses = losses_of(model, records)  # (R',)
    units = torch.tensor(unit_of_record, device=losses.device, dtype=torch.long)
    total = losses.new_zeros(len(exists)).index_add(0, units, losses)
    return total if reduction == "sum" else total / exists.sum(1).clamp(min=1)


def unit_batch(records: Batch, *, count: int) -> Batch:
    """A batch of `count` units with equally many records each, from a batch of all these records."""
    most = len(next(iter(records.values()))) // count
    device = next((each.device for each in records.values() if isinstance(each, Tensor)), None)
    exists = torch.ones(count, most, dtype=torch.bool, device=device)
    return {EXISTS: exists, **{key: value.unflatten(0, (count, most)) for key, value in records.items()}}


def records_of(batch: Batch) -> tuple[Batch, list[int]]:
    """(the batch of the records that exist (R', ...), the unit of each) of a batch of units."""
    exists = batch[EXISTS]
    count, most = exists.shape
    known = has_values(exists)  # on fake tensors, all records exist
    slots = exists.flatten().nonzero()[:, 0] if known else torch.arange(count * most, device=exists.device)
    places = slots.tolist() if known else range(count * most)

    def flat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.flatten(0, 1)[slots]
        return [value[place // most][place % most] for place in places]

    records = {key: flat(value) for key, value in batch.items() if key != EXISTS}
    return records, [place // most for place in places]


def _stacked(value: Any, exists: Tensor) -> Any:
    """(R', ...) of records as (B, R, ...) of units, zero where no record exists; a list as a list of lists."""
    if isinstance(value, Tensor):
        found = value.new_zeros(exists.numel(), *value.shape[1:])
        found[exists.flatten()] = value
        return found.unflatten(0, tuple(exists.shape))
    records = iter(value)
    return [[next(records) for _ in range(count)] for count in exists.sum(1).tolist()]


def _number(*parts: object) -> int:
    """A number below 2^63 that depends on the parts alone."""
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
