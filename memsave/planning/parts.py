"""The peak and the time of mixed memory modes, estimated from one fake step for each mode.

A model has parts, such as the levels of a U-Net, and each part has a mode. A traced step, in which all parts have one
mode, shows for each stage (the time in which a part runs) the most live bytes, and how many of them each part holds
then. If the parts have different modes, part q in mode m(q), then

    peak of stage s  =  peak of s in m(s)  +  sum over q != s of (held by q in m(q) - held by q in m(s), both during s)

and the time is the sum of each part's time in its own mode. These are estimates: a plan is confirmed by a fake step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from memsave.profiler import MemoryReport
from memsave.profiler.seconds import TimeModel
from memsave.profiler.work import Totals

REST = ""
"""The part of everything that belongs to no other part."""


@dataclass(frozen=True)
class Stage:
    """The state with the most live bytes while one part runs."""

    peak: int
    held: dict[str, int] = field(default_factory=dict)
    """Bytes at this peak by the part whose modules created them."""


@dataclass
class Trace:
    """A step in which all parts have one mode, by part."""

    stages: dict[str, Stage]
    work: dict[str, Totals]
    _costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    _times: TimeModel | None = None

    def cost(self, part: str, times: TimeModel) -> tuple[float, float]:
        """The time of the work of a part, see `TimeModel.together`; computed once for each time model."""
        if self._times is not times:
            self._times, self._costs = times, {}
        if part not in self._costs:
            self._costs[part] = times.inside_and_outside(self.work.get(part, {}))
        return self._costs[part]


def trace_of(report: MemoryReport, work: dict[str, Totals], part_of: Callable[[str | None], str]) -> Trace:
    """The trace of a recorded step, with the work of a logical batch by part."""
    timeline = report.timeline
    part = [part_of(block.module) for block in report.history]
    held: dict[str, int] = {}
    for block, size in timeline.alive:
        held[part[block]] = held.get(part[block], 0) + size
    total, now = sum(held.values()), REST
    stages = {REST: Stage(total, dict(held))}
    for block, delta in zip(timeline.blocks, timeline.deltas, strict=True):
        held[part[block]] = held.get(part[block], 0) + delta
        total += delta
        if delta > 0:
            now = part[block]
            if now not in stages or total > stages[now].peak:
                stages[now] = Stage(total, dict(held))
    return Trace(stages, work)


def mixed_peak(traces: Sequence[Trace], modes: Mapping[str, int]) -> int:
    """The estimated peak if each part has the mode of the trace with this index; the rest has that of trace 0."""
    peaks = []
    for stage in traces[0].stages:
        own = modes.get(stage, 0)
        found = traces[own].stages.get(stage, Stage(0))
        others = 0
        for part, mode in modes.items():
            if part != stage and mode != own:
                there = traces[mode].stages.get(stage, found)
                others += there.held.get(part, 0) - found.held.get(part, 0)
        peaks.append(found.peak + others)
    return max(peaks)


def mixed_seconds(traces: Sequence[Trace], modes: Mapping[str, int], times: TimeModel) -> float:
    """The time of a step if each part has the mode of the trace with this index; the rest has that of trace 0."""
    own = ((part, mode) for part, mode in modes.items() if part in traces[mode].work)
    return times.together(traces[mode].cost(part, times) for part, mode in [(REST, 0), *own])
