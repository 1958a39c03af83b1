"""What fits into a budget: the largest size at which a training step stays inside it, found on fake tensors.

A fake tensor has a shape, and a storage of the true size without memory behind it. So the real step, optimizer
included, runs in a second or less at any size, and `MemoryRecorder` counts what it would hold.

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

Three numbers are kept apart: the *exact* bytes of live tensors, the *calibrated* bytes of the allocator, which adds
what operators take inside themselves (see `calibration`), and the *reserve* that is left free for everything else: the
process, its libraries, a GPU's context. A size fits when calibrated and reserve together stay within the budget.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from memsave.profiler.calibration import Calibration, TrainingStep, has_state
from memsave.profiler.recorder import MemoryRecorder
from memsave.profiler.report import MemoryReport, format_bytes, parse_bytes

ENDLESS = 2**62  # the end of sizes that have none
GROWTH = 8  # at most so many times the size is tried next: what parameters take hides the growth of small sizes


def peak_on_fake(step: Callable[[], TrainingStep]) -> MemoryReport:
    """What a training step would hold, with the optimizer's state there from its start, as in every step but the first.

    `step` makes model, optimizer and inputs; it is called under fake tensors, as is what it returns. The state is made
    by a step of the optimizer alone; of one that cannot take it, and without one, the larger of two whole steps counts.

    Raises ValueError where the step looks at values, which fake tensors have none of.
    """
    state = torch.get_rng_state()
    try:
        with FakeTensorMode():
            made = step()
            reports = []
            for _ in range(1 if has_state(made.optimizer) else 2):
                with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
                    made.run()
                reports.append(recorder.report())
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the step looks at the values of a tensor ({error.func}), and fake tensors have none; keep .item(), if "
            f"tensor, and boolean masks as indices out of it"
        ) from error
    finally:
        torch.set_rng_state(state)
    return max(reversed(reports), key=lambda report: report.peak_bytes)


@dataclass(frozen=True)
class MemoryEstimate:
    """What one size would take: three numbers, in bytes."""

    report: MemoryReport
    """Of the step on fake tensors."""
    calibrated: int
    """What the allocator would take: the exact bytes, and what operators take inside themselves."""
    reserve: int
    """To be left free."""

    @property
    def exact(self) -> int:
        """Live tensors at the peak."""
        return self.report.peak_bytes

    @property
    def total(self) -> int:
        """What a budget must have for it."""
        return self.calibrated + self.reserve


@dataclass(frozen=True)
class SearchResult:
    """The largest size that fits, and what was tried to find it."""

    budget: int
    size: int | None
    """None where not even the lowest size fits."""
    need: MemoryEstimate
    """At `size`; at the lowest size where nothing fits, whose `total` is then the smallest budget that would do."""
    above: MemoryEstimate | None
    """One step above `size`, more than the budget has; None where no larger size was tried."""
    monotone: bool
    """Whether larger sizes took more at all sizes that were tried; where not, every size was tried."""
    timed_out: bool = False
    """Whether the search ended by its time: larger sizes may fit, too."""
    tried: dict[int, int] = field(default_factory=dict)
    """Total bytes by size."""

    @property
    def smallest_budget(self) -> int | None:
        """What the lowest size would need, where nothing fits."""
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
        beyond = "the highest that was allowed"
        if self.timed_out:
            beyond = "the search ended by its time, so larger ones may fit"
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

    Sizes are tried by interpolation, four or five of them as a rule. The answer and the size one step above are always
    among them, and so it is verified, not computed. Should a larger size take less than a smaller one at any two that
    were tried, all are tried, from the highest down (without `high`: from the highest that was tried).

    Args:
        step_at: makes the step of a size; called under fake tensors.
        budget, reserve: bytes, or a text such as "16GiB"; the reserve is left free.
        low, high, multiple: the sizes; the lowest is `low`, and they end at `high`, or nowhere (None).
        calibration: what the allocator takes over the exact bytes; None: nothing.
        start: the size that is tried first; None: the middle, as powers go; without `high` the lowest.
        power: of the size that bytes are about proportional to, such as 3 for the side of a volume: for the second try.
        seconds: of the process's CPU time. After so many no size is tried that is larger than all that are known to
            fit, nor one whose step alone might take as long; the answer then says that it timed out.

    Raises ValueError where there is no size, or the budget cannot be read.
    """
    if not (0 < low <= (low if high is None else high) and multiple > 0):
        raise ValueError(
            f"sizes go from {low} to {high} in steps of {multiple}; give 0 < low <= high and a positive step"
        )
    limit, kept_free = (parse_bytes(each) if isinstance(each, str) else each for each in (budget, reserve))
    sizes = range(low, ENDLESS if high is None else high + 1, multiple)
    known: dict[int, MemoryEstimate] = {}
    began = last = time.process_time()  # of the search, of the last trial

    def need(size: int) -> MemoryEstimate:
        nonlocal last
        if size not in known:
            last = time.process_time()
            report = peak_on_fake(lambda: step_at(size))
            known[size] = MemoryEstimate(report, (calibration or Calibration()).allocator_bytes(report), kept_free)
        return known[size]

    def growth() -> float:
        """How many times as large the next size may be: its trial takes at most as many times as long as the last."""
        now = time.process_time()
        return 1.0 if now - began > seconds else seconds / max(now - last, 1e-9)

    first = round(math.sqrt(low * (low if high is None else high))) if start is None else start
    found = search(sizes, lambda size: need(size).total, limit=limit, start=first, power=power, growth=growth)
    totals = [known[size].total for size in sorted(known)]
    monotone = totals == sorted(totals)
    timed_out = found is not None and max(totals) <= limit and found != sizes[-1]
    if not monotone:
        found = None
        for size in reversed(range(low, (max(known) if high is None else high) + 1, multiple)):
            if size not in known and time.process_time() - began > seconds:
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
        tried={size: known[size].total for size in sorted(known)},
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
    """The largest of the sizes with total(size) <= limit, if totals grow with sizes; None for none.

    Totals grow about as a power of the size, so the next one to try follows from the last two. A guess that is off by
    less than a step ends the search with its neighbour. Every fifth time what is left is halved instead. While all that
    was tried fits, the next size is at most `growth()` times as large; where that leaves none, the search ends.
    """
    fits, fails = -1, len(sizes)  # numbers of sizes; what lies beyond the ends needs no trial
    points: list[tuple[int, int]] = []
    while fails - fits > 1:
        if not points:
            wanted = start
        elif len(points) == 1:
            wanted = int(points[0][0] * min(GROWTH, (limit / max(1, points[0][1])) ** (1 / power)))
        elif len(points) % 5 == 0 and fails < len(sizes):
            wanted = sizes.start + (fits + fails) // 2 * sizes.step
        else:
            wanted = _foreseen(*points[-2:], limit=limit)
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


def _foreseen(one: tuple[int, int], other: tuple[int, int], *, limit: int) -> int:
    """The size whose total would be the limit if totals were a power of the size through two (size, total)."""
    (s0, t0), (s1, t1) = one, other
    power = math.log(max(t1, 1) / max(t0, 1)) / math.log(s1 / s0)
    grown = math.log(max(limit, 1) / max(t1, 1)) / power if power > 0 else math.inf
    return int(s1 * math.exp(min(grown, math.log(GROWTH))))
