"""Search on fake tensors for the largest size whose training step fits into a budget.

A fake tensor has a shape and a storage of the true size, but no memory. Therefore the real step, including the
optimizer, runs in a second or less at any size, and `MemoryRecorder` counts the bytes that it would hold.

    def step_at(side):
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        volume = torch.empty(1, 4, side, side, side)

        def run():
            model(volume).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return TrainingStep(model, run, optimizer)

    print(largest(step_at, budget="16GiB", low=32, high=512, multiple=16))

Three numbers are reported separately: the *exact* bytes of live tensors; the *calibrated* bytes of the allocator, which
include the memory that operators allocate internally (see `calibration.py`); and the *reserve*, which stays free for
the process, its libraries and a GPU's context. A size fits if calibrated plus reserve is within the budget.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from memsave.profiler._torch_internals import NEEDS_VALUES, FakeTensorMode
from memsave.profiler.calibration import Calibration, TrainingStep, create_state
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import MemoryReport
from memsave.profiler.sizes import format_bytes, parse_bytes

UNBOUNDED = 2**62  # the upper end of sizes without `high`
MAX_GROWTH = 8  # the largest ratio of one trial size to the last: parameter bytes hide the growth at small sizes


@contextmanager
def without_values() -> Iterator[None]:
    """Raise ValueError, which says what to avoid, if a step within reads the value of a fake tensor."""
    try:
        yield
    except NEEDS_VALUES as error:
        raise ValueError(
            f"the step reads the values of a tensor ({error.func}), and fake tensors have none; avoid .item(), "
            f"`if tensor`, and boolean masks as indices in it"
        ) from error


def peak_on_fake(step: Callable[[], TrainingStep]) -> MemoryReport:
    """The memory of a training step after the first one, in which the optimizer's state already exists.

    `step` creates model, optimizer and inputs. It and the step that it returns run under FakeTensorMode. A step of the
    optimizer alone creates its state. Without an optimizer, or with one that needs a closure, two whole steps run, and
    the report with the higher peak is returned.

    Raises ValueError if the step reads the value of a tensor.
    """
    with without_values(), torch.random.fork_rng(devices=[]), FakeTensorMode():
        fake = step()
        reports = []
        for _ in range(1 if create_state(fake.optimizer) else 2):
            if fake.work is not None:
                fake.work.reset()
            with MemoryRecorder(fake.model, optimizer=fake.optimizer, observe=fake.work) as recorder:
                fake.run()
            reports.append(recorder.report())
    return max(reversed(reports), key=lambda report: report.peak_bytes)


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that one size would take: three numbers, in bytes."""

    report: MemoryReport
    """The report of the step on fake tensors."""
    calibrated: int
    """Predicted peak of the allocator: the exact bytes plus the internal memory of operators."""
    reserve: int
    """Bytes that stay free."""

    @property
    def exact(self) -> int:
        """Bytes of live tensors at the peak."""
        return self.report.peak_bytes

    @property
    def host(self) -> int:
        """The most bytes that are in host memory at one time (`memsave.offload`); no part of the other numbers."""
        return self.report.offloaded_bytes

    @property
    def total(self) -> int:
        """The smallest budget for this size."""
        return self.calibrated + self.reserve


@dataclass(frozen=True)
class SearchResult:
    """The largest size that fits, and the sizes that were tried."""

    budget: int
    size: int | None
    """None if not even the lowest size fits."""
    need: MemoryEstimate
    """The estimate at `size`; at the lowest size if nothing fits."""
    above: MemoryEstimate | None
    """The estimate one step above `size`, which exceeds the budget; None if no larger size was tried."""
    monotone: bool
    """Whether the totals grow with the size, over all sizes tried; if not, every size was tried."""
    timed_out: bool = False
    """Whether the time limit ended the search, so that larger sizes may fit, too."""
    tried: dict[int, int] = field(default_factory=dict)
    """Total bytes by size, for all sizes tried."""

    @property
    def smallest_budget(self) -> int | None:
        """The total of the lowest size if nothing fits, otherwise None."""
        return self.need.total if self.size is None else None

    def __str__(self) -> str:
        parts = (
            f"exact {format_bytes(self.need.exact)}, calibrated {format_bytes(self.need.calibrated)}, "
            f"reserve {format_bytes(self.need.reserve)}, predicted on fake tensors"
        )
        if self.size is None:
            return (
                f"nothing fits into {format_bytes(self.budget)}: the lowest size, {min(self.tried)}, needs "
                f"{format_bytes(self.need.total)} ({parts})"
            )
        beyond = "the highest allowed"
        if self.timed_out:
            beyond = "the time limit ended the search, so larger ones may fit"
        elif self.above is not None:
            beyond = f"next {format_bytes(self.above.total)}"
        return f"{self.size} fits into {format_bytes(self.budget)} ({parts}; {beyond})"


def largest(
    step_at: Callable[[int], TrainingStep],
    *,
    budget: str | int,
    low: int,
    high: int | None = None,
    multiple: int = 1,
    reserve: str | int = 0,
    calibration: Calibration | None = None,
    start: int | None = None,
    power: float = 1.0,
    seconds: float = math.inf,
) -> SearchResult:
    """The largest size from `low` on, in steps of `multiple`, whose training step fits into the budget.

    Sizes are tried by interpolation, usually four or five. The answer and the size one step above it are always among
    the sizes tried, so the answer is verified, not extrapolated. If of two sizes tried the larger takes less, all sizes
    are tried, from the highest down (without `high`: from the highest one tried).

    Args:
        step_at: creates the step of a size; called under FakeTensorMode.
        budget, reserve: bytes, or a string such as "16GiB"; the reserve stays free.
        low, high, multiple: the sizes are low, low + multiple, ... up to `high`, or without end (None).
        calibration: computes allocator bytes from exact bytes; None adds nothing.
        start: the first size to try; None is the geometric mean of low and high, or `low` without `high`.
        power: bytes are about proportional to size ** power (3 for the side of a volume); used for the second trial.
        seconds: limit of the process's CPU time. After it no size is tried that is larger than all sizes known to fit,
            nor one whose step alone may take as long. The result then has `timed_out` set.

    Raises ValueError if there is no size, or if the budget cannot be parsed.
    """
    if not (0 < low <= (low if high is None else high) and multiple > 0):
        raise ValueError(
            f"sizes go from {low} to {high} in steps of {multiple}; give 0 < low <= high and a positive step"
        )
    limit, kept_free = (parse_bytes(each) if isinstance(each, str) else each for each in (budget, reserve))
    sizes = range(low, UNBOUNDED if high is None else high + 1, multiple)
    estimates: dict[int, MemoryEstimate] = {}
    began = last = time.process_time()  # of the search, and of the last trial

    def need(size: int) -> MemoryEstimate:
        nonlocal last
        if size not in estimates:
            last = time.process_time()
            report = peak_on_fake(lambda: step_at(size))
            estimates[size] = MemoryEstimate(report, (calibration or Calibration()).allocator_bytes(report), kept_free)
        return estimates[size]

    def growth() -> float:
        """The largest allowed ratio of the next size to the last one; the time of a trial grows by at most as much."""
        now = time.process_time()
        return 1.0 if now - began > seconds else seconds / max(now - last, 1e-9)

    first = round(math.sqrt(low * (low if high is None else high))) if start is None else start
    found = search(sizes, lambda size: need(size).total, limit=limit, start=first, power=power, growth=growth)
    totals = [estimates[size].total for size in sorted(estimates)]
    monotone = totals == sorted(totals)
    timed_out = found is not None and max(totals) <= limit and found != sizes[-1]
    if not monotone:
        found = None
        for size in reversed(range(low, (max(estimates) if high is None else high) + 1, multiple)):
            if size not in estimates and time.process_time() - began > seconds:
                timed_out = True
            elif need(size).total <= limit:
                found = size
                break
    return SearchResult(
        budget=limit,
        size=found,
        need=need(low if found is None else found),
        above=None if found is None or found == sizes[-1] or timed_out else need(found + multiple),
        monotone=monotone,
        timed_out=timed_out and found is not None,
        tried={size: estimates[size].total for size in sorted(estimates)},
    )


def search(
    sizes: range,
    total: Callable[[int], int],
    *,
    limit: int,
    start: int,
    power: float = 1.0,
    growth: Callable[[], float] = lambda: math.inf,
) -> int | None:
    """The largest size with total(size) <= limit, if totals grow with the size; None if no size fits.

    Totals grow approximately as a power of the size, so the next trial is extrapolated from the last two. If the guess
    is wrong by less than a step, the neighbour is tried next and ends the search. Every fifth trial bisects instead.
    While all trials fit, the next size is at most `growth()` times as large; if there is no such size, the search ends.
    """
    fits, fails = -1, len(sizes)  # indices into sizes, initially beyond both ends
    points: list[tuple[int, int]] = []
    while fails - fits > 1:
        if not points:
            wanted = start
        elif len(points) == 1:
            wanted = int(points[0][0] * min(MAX_GROWTH, (limit / max(1, points[0][1])) ** (1 / power)))
        elif len(points) % 5 == 0 and fails < len(sizes):
            wanted = sizes.start + (fits + fails) // 2 * sizes.step
        else:
            wanted = _extrapolated(*points[-2:], limit=limit)
        if fits >= 0 and fails == len(sizes):
            reach = sizes[fits] * growth()
            if reach < sizes[fits + 1]:
                break
            wanted = int(min(wanted, reach))
        number = min(max((wanted - sizes.start) // sizes.step, fits + 1), fails - 1)
        points.append((sizes[number], total(sizes[number])))
        if points[-1][1] <= limit:
            fits = number
        else:
            fails = number
    return None if fits < 0 else sizes[fits]


def _extrapolated(one: tuple[int, int], other: tuple[int, int], *, limit: int) -> int:
    """The size whose total equals the limit on the power law through two points (size, total)."""
    (s0, t0), (s1, t1) = one, other
    power = math.log(max(t1, 1) / max(t0, 1)) / math.log(s1 / s0)
    grown = math.log(max(limit, 1) / max(t1, 1)) / power if power > 0 else math.inf
    return int(s1 * math.exp(min(grown, math.log(MAX_GROWTH))))
