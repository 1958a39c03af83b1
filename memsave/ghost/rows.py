"""Which slices of a tensor belong to which example.

Most layers keep the examples in dimension 0, in their order. Others do not: tokens are folded into the batch, windows
of an image become rows, a router sends tokens to experts, or time comes first. `Rows` says for one tensor along which
dimension each slice belongs to one example, and to which. `RowFollower` finds the Rows of an operator's outputs from
those of its inputs, and `RowSplit` separates a gradient by example.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memsave.ghost.gradients import has_values, upcast


@dataclass(frozen=True)
class Rows:
    """The examples along one dimension of a tensor."""

    dim: int
    examples: tuple[int, ...] | Tensor | None = None
    """The example of each slice along `dim`; None if slice b belongs to example b. A tensor if it depends on values."""

    @property
    def standard(self) -> bool:
        """Whether slice b of dimension 0 belongs to example b."""
        return self.dim == 0 and self.examples is None

    def at(self, index: Tensor | list[int] | tuple[int, ...], *, dim: int) -> "Rows":
        """The Rows along `dim` of a tensor whose slices are the slices of this one at `index`."""
        if self.examples is None:
            return Rows(dim, index if isinstance(index, Tensor) else tuple(index))
        if isinstance(self.examples, Tensor) or isinstance(index, Tensor):
            device = index.device if isinstance(index, Tensor) else None
            examples = torch.as_tensor(self.examples, device=device)
            return Rows(dim, examples[torch.as_tensor(index, device=examples.device)])
        return Rows(dim, tuple(self.examples[i] for i in index))

    def moved_to(self, dim: int) -> "Rows":
        """The same examples along another dimension."""
        return Rows(dim, self.examples)


STANDARD = Rows(0)
"""Slice b of dimension 0 belongs to example b."""
WHOLE = Rows(-1)
"""A tensor that belongs to the only example of its batch, whatever its shape."""


@dataclass(frozen=True)
class Lost:
    """A tensor that depends on examples in a way that is not known."""

    operator: str
    """The name of the operator after which it is not known."""


Provenance = Rows | Lost


class RowSplit:
    """Separates tensors with the same Rows by example.

    Args:
        rows: the Rows of the tensors.
        examples: the example of each row, if that depends on values; it takes the place of `rows.examples`.
        batch_size: B.
    """

    def __init__(self, rows: Rows, examples: Tensor | None, batch_size: int):
        self.rows, self.batch_size = rows, batch_size
        self._given = rows.examples if examples is None else examples
        self.trivial = rows is WHOLE or self._given is None
        """Whether row b belongs to example b."""

    def rows_first(self, tensor: Tensor) -> Tensor:
        """(n, ...): the rows in dimension 0."""
        return tensor.unsqueeze(0) if self.rows is WHOLE else tensor.movedim(self.rows.dim, 0)

    def examples(self, device: torch.device) -> Tensor:
        """(n,): the example of each row."""
        if self._given is None or self.rows is WHOLE:
            return torch.arange(self.batch_size, device=device)
        return torch.as_tensor(self._given, device=device, dtype=torch.long)

    def summed(self, values: Tensor) -> Tensor:
        """(B, ...): the sums over the rows of each example, of values (n, ...)."""
        if self.trivial:
            return values
        total = values.new_zeros(self.batch_size, *values.shape[1:])
        return total.index_add_(0, self.examples(values.device), values)

    def reduced(self, grad: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape): the gradient of copies, summed over where `shape` was broadcast, for each example."""
        grad = upcast(grad)
        if self.rows is WHOLE:
            return grad.sum_to_size(shape).unsqueeze(0)
        dim, padded = self.rows.dim, (*[1] * (grad.dim() - len(shape)), *shape)
        broadcast = [d for d in range(grad.dim()) if d != dim and padded[d] == 1 and grad.shape[d] != 1]
        grad = grad.sum(broadcast, keepdim=True) if broadcast else grad
        first = grad.movedim(dim, 0)  # (n, ...)
        if padded[dim] == 1:
            return self.summed(first.reshape(len(first), *shape))
        total = grad.new_zeros(self.batch_size, *padded)  # each row has its own place in the tensor
        examples, numbers = self.examples(grad.device), torch.arange(len(first), device=grad.device)
        total.movedim(dim + 1, 1).index_put_((examples, numbers), first)
        return total.reshape(self.batch_size, *shape)

    def stacked(self, tensor: Tensor) -> Tensor:
        """(B, S, ...): the rows of each example in dimension 1; zeros for examples with fewer rows than others."""
        tensor = self.rows_first(tensor)
        if self.trivial:
            return tensor
        index, mask = self._slots(tensor.device)
        found = tensor.index_select(0, index.flatten()).unflatten(0, (self.batch_size, -1))
        if mask is None:
            return found
        return torch.where(mask.view(*mask.shape, *[1] * (found.dim() - 2)), found, found.new_zeros(()))

    def _slots(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(index (B, S) of the rows of each example, mask (B, S) of the slots that hold one, or None for all)."""
        table = self._static_slots
        if table is not None:
            index = torch.tensor(table, device=device, dtype=torch.long).view(self.batch_size, -1)
            return index.clamp(min=0), index >= 0 if any(-1 in slots for slots in table) else None
        examples = self.examples(device)
        counts = torch.bincount(examples, minlength=self.batch_size)
        starts, order = counts.cumsum(0) - counts, examples.argsort(stable=True)
        owner = examples[order]
        index = torch.full((self.batch_size, int(counts.max())), -1, device=device)
        index[owner, torch.arange(len(order), device=device) - starts[owner]] = order
        return index.clamp(min=0), None if self.batch_size * index.shape[1] == len(order) else index >= 0

    @cached_property
    def _static_slots(self) -> list[list[int]] | None:
        if isinstance(self._given, Tensor) or self._given is None:
            return None
        of_example: list[list[int]] = [[] for _ in range(self.batch_size)]
        for row, example in enumerate(self._given):
            of_example[example].append(row)
        size = max(map(len, of_example))
        return [found + [-1] * (size - len(found)) for found in of_example]


def uniform_rows(numbers: Tensor, *, first: int) -> tuple[int, list[int]] | None:
    """A dimension whose slices contain one number each, and these numbers; None if there is none.

    Negative numbers are padding and match any number. `first`: the dimension that is tried first.
    """
    if not numbers.numel():
        return first, [0] * numbers.shape[first] if first < numbers.dim() else []
    compact = numbers
    for dim, (size, stride) in enumerate(zip(numbers.shape, numbers.stride(), strict=True)):
        compact = compact.narrow(dim, 0, 1) if size > 1 and stride == 0 else compact
    for dim in sorted(range(numbers.dim()), key=lambda each: (each != first, each)):
        slices = compact.movedim(dim, 0).flatten(1) if compact.dim() > 1 else compact.unsqueeze(-1)
        if not has_values(slices):
            continue
        if len(slices) != numbers.shape[dim]:
            slices = slices.expand(numbers.shape[dim], -1)
        rows = slices.amax(1)
        if bool((rows >= 0).all()) and bool(((slices == rows[:, None]) | (slices < 0)).all()):
            return dim, rows.tolist()
    return None
