"""Predict the time of a step from its work, with rates that a small real step measures on this machine.

    seconds = sum over kinds of operators of (calls x a + FLOPs x b + bytes x c)  +  calls x host  +  fresh bytes x f

a, b, c >= 0 are fitted for each kind of operator (see `memsave.profiler.work`) to the times of its calls in the small
step, host is the time of a step between its operators (Python, autograd), per call, and f is the time in which the
system maps a byte of new memory: blocks too large for malloc to keep. On a GPU the operators run beside the host, and
the longer of the two times counts. Copies to host memory and back (`memsave.offload`) are kinds of their own, whose
rates the caller measures; on a GPU they are predicted without overlap with the operators.

`experiments/planning` states the error of such predictions.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch

from memsave.profiler._torch_internals import TorchDispatchMode, is_wrapper
from memsave.profiler.work import COPIES, FRESH_BYTES, Totals, Work, work_of

Rate = tuple[float, float, float]
"""Seconds per call, per FLOP and per byte."""
TIMED_STEPS = 3
CLEARLY = 0.8  # the error with a further rate, as a part of the error without
SMALL_BYTES = 64 << 10
"""A call that moves fewer bytes takes the time of the call itself, which says nothing about the rate per byte."""
OTHER = "any other"
"""The kind whose rates are those of all operators together, for kinds that the small step does not have."""


@dataclass(frozen=True)
class TimeModel:
    """Rates of this machine, see the module's docstring."""

    rates: dict[str, Rate] = field(default_factory=dict)
    """By kind of operator."""
    host: float = 0.0
    """Seconds per call outside of operators."""
    fresh: float = 0.0
    """Seconds per byte of new memory."""
    concurrent: bool = False
    """Whether operators run beside the host, as on a GPU."""
    largest: dict[str, float] = field(default_factory=dict)
    """By kind, the bytes of the largest call in the small step: the larger, the better are the rates."""
    calls: int = 0
    """Operators of the small step, from which `host` is known."""

    def seconds(self, work: Totals) -> float:
        """The predicted time of this work."""
        return self.seconds_of([work])

    def seconds_of(self, works: Iterable[Totals]) -> float:
        """The predicted time of several works."""
        return self.together(map(self.inside_and_outside, works))

    def inside_and_outside(self, work: Totals) -> tuple[float, float]:
        """(seconds in operators, seconds of the host between them)."""
        inside = sum(self._inside(kind, each) for kind, each in work.items())
        outside = self.host * sum(each.calls for kind, each in work.items() if kind not in COPIES)
        if self.concurrent:  # no overlap is predicted for copies, whichever of the two sums is the longer
            outside += sum(self._inside(kind, each) for kind, each in work.items() if kind in COPIES)
        return inside, outside

    def together(self, parts: Iterable[tuple[float, float]]) -> float:
        """The predicted time of several works, each given by `inside_and_outside`."""
        pairs = list(parts)
        inside, outside = (sum(pair[index] for pair in pairs) for index in (0, 1))
        return max(inside, outside) if self.concurrent else inside + outside

    def _inside(self, kind: str, work: Work) -> float:
        per_call, per_flop, per_byte = self._rate(kind)
        return per_call * work.calls + per_flop * work.flops + per_byte * work.bytes + self.fresh * work.fresh_bytes

    def _rate(self, kind: str) -> Rate:
        """The rates of a kind; else those of the same operator with another dtype, which fake tensors may have."""
        if kind in self.rates:
            return self.rates[kind]
        operator = kind.rpartition(" ")[0]
        alike = (rate for known, rate in self.rates.items() if known.rpartition(" ")[0] == operator)
        return next(alike, self.rates.get(OTHER, (0.0, 0.0, 0.0)))

    def with_kinds_of(self, other: "TimeModel") -> "TimeModel":
        """The rates of both; of a kind that both know, those of the model whose small step had the larger calls."""
        better = {kind for kind in other.rates if other._known(kind) > self._known(kind)}
        return replace(
            self if self.calls >= other.calls else other,
            rates={**self.rates, **{kind: other.rates[kind] for kind in better}},
            largest={**self.largest, **{kind: other._known(kind) for kind in better}},
        )

    def with_rates(self, rates: Mapping[str, Rate]) -> "TimeModel":
        """This model with the rates of further kinds."""
        return replace(self, rates={**self.rates, **rates})

    def _known(self, kind: str) -> float:
        return self.largest.get(kind, 0.0) if kind in self.rates else -1.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TimeModel":
        """The inverse of `dataclasses.asdict`, also after JSON has turned tuples into lists."""
        rates = {kind: (float(a), float(b), float(c)) for kind, (a, b, c) in content["rates"].items()}
        return cls(**{**content, "rates": rates})


def measure_times(run: Callable[[], object], *, device: torch.device) -> TimeModel:
    """The rates of this machine, from a few steps `run()`, all of which must call the same operators."""
    clock = step_clock(device)
    plain, timed = [], []
    for _ in range(TIMED_STEPS):
        plain.append(_step_seconds(run, clock, device))
        with _OperatorTimer(device, clock) as timer:
            run()
        timed.append(timer.samples())
    samples = _fastest(timed)
    by_kind: dict[str, list[tuple[Work, float]]] = defaultdict(list)
    for kind, work, seconds in samples:
        by_kind[kind].append((work, seconds))
    by_kind[OTHER] = [(work, seconds) for kind, work, seconds in samples if work.bytes]
    per_byte = kind_rate(by_kind[OTHER])[2]
    concurrent = device.type == "cuda"
    outside = min(plain) - (0.0 if concurrent else sum(seconds for *_, seconds in samples))
    return TimeModel(
        rates={kind: kind_rate(found, per_byte=per_byte) for kind, found in by_kind.items()},
        host=max(0.0, outside / max(1, len(samples))),
        fresh=_fresh_seconds(device, clock),
        concurrent=concurrent,
        largest={kind: max((work.bytes for work, _ in found), default=0.0) for kind, found in by_kind.items()},
        calls=len(samples),
    )


def kind_rate(samples: Sequence[tuple[Work, float]], *, per_byte: float = 0.0) -> Rate:
    """The rates of one kind. Calls below `SMALL_BYTES` give the seconds per call, and the others the other two rates.

    Of a kind with FLOPs, the fastest small call gives the seconds per call, and all calls the other two rates.
    per_byte: the rate for a kind without FLOPs that has no larger calls.
    """
    small = [seconds for work, seconds in samples if work.bytes < SMALL_BYTES]
    if not small:
        return fit(samples)
    if any(work.flops for work, _ in samples):
        per_call, large = min(small), samples
    else:
        per_call, large = sum(small) / len(small), [each for each in samples if each[0].bytes >= SMALL_BYTES]
        if not large:
            return per_call, 0.0, per_byte
    rest = [(work._replace(calls=0), max(0.0, seconds - per_call)) for work, seconds in large]
    return per_call, *fit(rest)[1:]


def fit(samples: Sequence[tuple[Work, float]]) -> Rate:
    """Rates >= 0 that give the seconds of the calls: the same sum, and least squares over the three rates.

    Another rate is used only if it makes the error clearly smaller, because few samples fit any rate; a rate per call,
    which does not grow with the size of a step, comes last.
    """
    if not samples:
        return 0.0, 0.0, 0.0
    seconds = torch.tensor([each for _, each in samples], dtype=torch.float64)
    columns = torch.tensor([[work.flops, work.bytes, work.calls] for work, _ in samples], dtype=torch.float64)
    scale = columns.abs().amax(0)
    best, least = torch.zeros(3, dtype=torch.float64), float("inf")
    for picked in (list(chosen) for count in (1, 2, 3) for chosen in combinations(range(3), count)):
        if not bool((scale[picked] > 0).all()):
            continue
        matrix = columns[:, picked] / scale[picked]
        found = torch.linalg.lstsq(matrix, seconds[:, None], driver="gelsd").solution[:, 0]
        error = float((matrix @ found - seconds).square().sum())
        if bool((found >= 0).all()) and error < CLEARLY * least:
            best, least = torch.zeros(3, dtype=torch.float64), error
            best[picked] = found / scale[picked]
    total = float((columns @ best).sum())
    per_flop, per_byte, per_call = (best * (float(seconds.sum()) / total if total else 0.0)).tolist()
    return per_call, per_flop, per_byte


def _fastest(runs: list[list[tuple[str, Work, float]]]) -> list[tuple[str, Work, float]]:
    """The samples of a step, each with the shortest time that a run took for it."""
    first = runs[0]
    alike = [run for run in runs if [each[:2] for each in run] == [each[:2] for each in first]]
    return [(kind, work, min(run[n][2] for run in alike)) for n, (kind, work, _) in enumerate(first)]


def step_clock(device: torch.device) -> Callable[[], float]:
    """Time of this machine; with one thread that of the process, which other programs do not lengthen."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _step_seconds(run: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    """Seconds of a step; on a GPU, those in which the host starts its kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    run()
    return clock() - started


def _fresh_seconds(device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds per byte by which mapping, writing and returning new memory takes longer than writing memory again."""
    if device.type != "cpu":
        return 0.0
    new, again = [], []
    for _ in range(TIMED_STEPS + 1):
        started = clock()
        block = torch.empty(2 * FRESH_BYTES, dtype=torch.uint8).zero_()
        written = clock()
        block.zero_()
        rewritten = clock()
        del block
        new.append(written - started + clock() - rewritten)
        again.append(rewritten - written)
    return max(0.0, min(new) - min(again)) / (2 * FRESH_BYTES)


class _OperatorTimer(TorchDispatchMode):
    """Times each operator of a step on its own."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        super().__init__()
        self._device, self._clock = device, clock
        self._taken: list[tuple[str, Work, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(map(is_wrapper, types)):
            return NotImplemented
        result, taken = self._timed(lambda: func(*args, **(kwargs or {})))
        self._taken.append((*work_of(func, args, kwargs or {}, result), taken))
        return result

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """(result, seconds, or the pair of events around it)."""
        if self._device.type != "cuda":
            started = self._clock()
            return call(), self._clock() - started
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        result = call()
        events[1].record()
        return result, events

    def samples(self) -> list[tuple[str, Work, float]]:
        """(kind, work, seconds) of each call, on a GPU without the time of a call that starts no kernel."""
        if self._device.type != "cuda":
            return self._taken
        torch.cuda.synchronize(self._device)
        found = [(kind, work, one.elapsed_time(two) / 1e3) for kind, work, (one, two) in self._taken]
        least = min(_seconds_of(found), default=0.0)
        return [(kind, work, seconds - least) for kind, work, seconds in found]


def _seconds_of(samples: Iterable[tuple[str, Work, float]]) -> Iterable[float]:
    return (seconds for *_, seconds in samples)
