"""The memory of a training step of any model: stored, with checkpoints, and reversible, predicted on fake tensors.

print(memory_report(model, lambda model: model(images).square().mean().backward(), budget="8GiB"))
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.models.memory import Checkpointed
from memsave.profiler import MemoryRecorder, MemoryReport, format_bytes, parse_bytes
from memsave.profiler.planner import without_values
from memsave.reversible.convert import convert, find_rows

MODES = ("stored", "checkpoint", "reversible")


@dataclass
class MemoryTable:
    """The result of `memory_report`; `print` it. All bytes are predicted: exact live tensors, without an allocator."""

    reports: dict[str, MemoryReport]
    """By mode: stored, and checkpoint and reversible if the model has rows of blocks for them."""
    budget: int | None
    notes: list[str] = field(default_factory=list)
    """What the modes change, and what they cannot."""

    def fits(self, mode: str) -> bool:
        """Whether the step fits into the budget."""
        return self.budget is not None and self.reports[mode].peak_bytes <= self.budget

    def __str__(self) -> str:
        head = ["memory", "peak", "of stored", "activations"]
        lines = [head + ([] if self.budget is None else [f"fits into {format_bytes(self.budget)}"])]
        stored = self.reports["stored"].peak_bytes
        for mode, report in self.reports.items():
            held = sum(report.peak_by_category.get(name, 0) for name in ("activation", "temporary"))
            row = [mode, format_bytes(report.peak_bytes), f"{report.peak_bytes / stored:.2f}x", format_bytes(held)]
            lines.append(row + ([] if self.budget is None else ["yes" if self.fits(mode) else "no"]))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([*table, *self.notes, "predicted on fake tensors: bytes of live tensors at the peak"])


def memory_report(
    model: nn.Module,
    step: Callable[[Any], object],
    *,
    budget: str | int | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> MemoryTable:
    """Predict the peak of a training step in each memory mode. Allocates nothing of the model's size.

    Rows of blocks are found as `make_reversible` finds them: "checkpoint" keeps the input of each block and evaluates
    it again; "reversible" rebuilds the activations of residual blocks, which changes the function.

    Args:
        model: any model; it does not change.
        step: runs forward and backward of the model that it is given. Tensors that it closes over may be real.
        budget: bytes, or text such as "8GiB".
        optimizer: makes an optimizer of the parameters, whose state then counts, too.

    Raises ValueError if the step reads the value of a tensor, for fake tensors have none.
    """
    table = MemoryTable({}, None if budget is None else parse_bytes(str(budget)))
    for mode in MODES:
        faking = FakeTensorMode(allow_non_fake_inputs=True)
        with without_values(), torch.random.fork_rng(devices=[]), faking as fake:
            report = _measured(model, step, mode, fake, table.notes, optimizer)
        if report is not None:
            table.reports[mode] = report
    return table


def _measured(
    model: nn.Module, step: Any, mode: str, fake: Any, notes: list[str], optimizer: Any
) -> MemoryReport | None:
    copied = _fake_copy(model, fake)
    if mode == "checkpoint":
        rows = find_rows(copied, lambda: step(copied))
        if not rows:
            notes.append("checkpoint: the model has no row of blocks of one class that keep the shape of their input")
            return None
        for block in {call.block: None for row in rows for call in row}:
            Checkpointed(block).on = True
    elif mode == "reversible":
        conversion = convert(copied, lambda: step(copied), anchor_every=None, grid=None)
        notes += [f"reversible: {name} not converted, because {reason}" for name, reason in conversion.left]
        if not conversion.rows:
            notes.append("reversible: the model has no row of residual blocks that could be rebuilt")
            return None
        count = sum(len(row.blocks) for row in conversion.rows)
        notes.append(
            f"reversible: {count} blocks in {len(conversion.rows)} rows, by the midpoint rule, which changes the "
            f"function"
        )
    made = None if optimizer is None else optimizer(copied.parameters())
    copied.zero_grad()
    for _ in range(1 if made is None else 2):  # the first creates the state of the optimizer
        with MemoryRecorder(copied, optimizer=made) as recorder:
            step(copied)
            if made is not None:
                made.step()
                made.zero_grad()
    return recorder.report()


def _fake_copy(model: nn.Module, fake: Any) -> nn.Module:
    """A copy of the model whose parameters and buffers are fake tensors."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = fake.from_tensor(parameter.detach())
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = fake.from_tensor(buffer)
    return copy.deepcopy(model, memo)
