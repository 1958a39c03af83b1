"""Whether examples are independent in the model: this is tested, not assumed.

The losses of some examples alone are differentiated. In every layer's output, the rows of the other examples must then
have no gradient. A complete check separates any two examples at least once, in both directions, which takes 2 log2(B)
backwards without weight gradients. A quick check takes one random half of the examples and its complement.

A layer counts as checked when the rows of every example had a gradient in a check: a gradient of zero, as below a head
that is initialised to zero, proves nothing. While some layers are not checked, complete checks are made. Since a model
may mix examples later (in another mode, or in batches of another order), quick checks are made at random steps, too.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memsave.ghost.refusals import refuse_dependent_examples
from memsave.ghost.rows import RowSplit
from memsave.processes import any_process, maximum

MAX_COMPLETE_CHECKS = 8  # in a row without a newly checked layer; after that, quick checks
MAX_INTERVAL = 256  # the largest number of backwards between two quick checks


class IndependenceCheck:
    """The output gradients of all layers while the losses of a subset of the examples are differentiated."""

    def __init__(self) -> None:
        self.subset: Tensor = torch.ones(0, dtype=torch.bool)
        """(B,): the examples whose losses are differentiated now."""
        self.mixed: dict[str, Tensor] = {}
        """By layer, in the order of the backward: whether the row of an example outside the subset had a gradient."""
        self.reached: dict[str, Tensor] = {}
        """By layer, (B,): the examples whose row had a gradient from their own loss."""

    def record(self, layer: str, grad: Tensor, split: RowSplit) -> None:
        """Record the gradient of a layer's output."""
        rows = split.rows_first(grad)
        rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
        found = ((rows != 0) & ~rows.isnan()).any(1)  # 0 x inf is NaN, which does not show a dependence
        rows = found if split.trivial else split.summed(found.double()) > 0
        mixed, reached = (rows & ~self.subset).any(), rows & self.subset
        self.mixed[layer] = self.mixed.get(layer, mixed) | mixed
        self.reached[layer] = self.reached.get(layer, reached) | reached


class IndependenceSchedule:
    """Which layers were checked, and when the next check is due."""

    def __init__(self) -> None:
        self._random = random.Random()  # separate, because a check must not change the random numbers of the run
        self.reset()

    def reset(self) -> None:
        """Start again, because the model has changed."""
        self.checked: set[str] = set()
        self._modes: tuple[bool, ...] | None = None
        self._complete_checks = 0
        self._interval, self._steps_left = 1, 1

    def begin_forward(self, modules: Iterable[nn.Module]) -> bool:
        """Start again if a module changed between train and eval mode: a check holds for one mode only.

        Returns whether that was the case.
        """
        modes = tuple(module.training for module in modules)
        changed = modes != self._modes
        if changed:
            self.reset()
            self._modes = modes
        return changed

    def next_check(self, *, unchecked: bool) -> str:
        """The check before this backward, "complete", "quick" or ""; `unchecked`: whether some layer is not checked."""
        if unchecked:
            self._complete_checks += 1
            return "complete" if self._complete_checks <= MAX_COMPLETE_CHECKS else "quick"
        self._steps_left -= 1
        if self._steps_left > 0:
            return ""
        self._interval = min(4 * self._interval, MAX_INTERVAL)
        self._steps_left = self._random.randint(1, self._interval)
        return "quick"

    def subsets(self, check: str, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """(B,) masks of the examples to differentiate, one for each backward of the check."""
        number = torch.arange(batch_size, device=device)
        if check == "complete":
            for bit in range((batch_size - 1).bit_length()):  # any two examples differ in one bit
                for value in (0, 1):
                    yield (number >> bit) % 2 == value
        else:
            half = set(self._random.sample(range(batch_size), batch_size // 2))
            subset = torch.tensor([each in half for each in range(batch_size)], device=device)
            yield subset
            yield ~subset

    def evaluate(self, check: IndependenceCheck) -> None:
        """Raise ValueError if examples are not independent; remember the layers that were checked."""
        refuse_dependent_examples({name: bool(found) for name, found in check.mixed.items()})
        rows = torch.stack(list(check.reached.values())).tolist() if check.reached else []
        present = [any(row[b] for row in rows) for b in range(len(check.subset))]  # False for one without targets
        if sum(present) < 2:
            return
        checked = {name for name, row in zip(check.reached, rows, strict=True) if row == present}
        if checked - self.checked:
            self._complete_checks = 0
        self.checked |= checked


def same_number(subsets: list[Tensor], batch_size: int, device: torch.device) -> list[Tensor]:
    """The subsets, and as many empty ones as make their number that of every process."""
    missing = maximum(len(subsets)) - len(subsets)
    return subsets + [torch.zeros(batch_size, dtype=torch.bool, device=device)] * missing


@contextmanager
def raised_together() -> Iterator[None]:
    """Raise in all processes if one raises ValueError inside: otherwise the others would wait for it."""
    error: ValueError | None = None
    try:
        yield
    except ValueError as raised:
        error = raised
    if any_process(error is not None):
        raise error or ValueError("examples are not independent in another process, whose error names the layer")


def layers_reached(losses: Tensor) -> set[str]:
    """The names of the norm hooks that a backward of the losses passes."""
    waiting: list[Any] = [losses.grad_fn]
    found, names = set(waiting), set()
    while waiting:
        node = waiting.pop()
        spec = getattr(node, "hook_spec", None)
        if spec is not None:
            names.add(spec.name)
        for following, _ in () if node is None else node.next_functions:
            if following is not None and following not in found:
                found.add(following)
                waiting.append(following)
    return names
