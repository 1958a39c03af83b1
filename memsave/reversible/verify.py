"""Does a network with reversible sequences do what its stored twin does? In plain words."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import Stream
from memsave.reversible.frame import Frame
from memsave.reversible.randomness import sources_of
from memsave.reversible.sequence import ReversibleSequence

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW = 1e-2  # of narrower ones, and under autocast
FLOOR = 1e-3  # a parameter whose gradient is a smaller share of the whole is held to that share


@dataclass
class Verification:
    """What was found; `print` it. All errors are relative, in the Euclidean norm."""

    findings: list[str] = field(default_factory=list)
    """One sentence for each thing that is wrong."""
    drift: dict[str, list[float]] = field(default_factory=dict)
    """By sequence: the error of the rebuilt input of each block, first to last; the first one is the largest."""
    gradient: float = float("nan")
    """The error of the gradient, of all parameters and the input together."""
    worst: tuple[str, float] = ("", float("nan"))
    """The parameter whose own gradient has the largest error, and that error."""
    tolerance: float = 0.0
    """What both were compared with."""
    anchor_every: int | None = None
    """Where they are above it: the largest power of two, as blocks between anchors, with which they are not."""

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return not self.findings

    def __str__(self) -> str:
        if not self.ok:
            return "\n".join(self.findings)
        name, drift = max(self.drift.items(), key=lambda each: max(each[1]))
        place = f"the input of {name or 'the sequence'}"
        return (
            f"as stored: output, random state and buffers are the same, and the gradient is off by "
            f"{self.gradient:.1e}, of no parameter by more than {self.worst[1]:.1e}; {place} is rebuilt within "
            f"{max(drift):.1e} through {len(drift)} blocks"
        )


def verify(module: nn.Module, x: Tensor, *, tolerance: float | None = None) -> Verification:
    """Compare one step of `module(x)` with its activations rebuilt and with all of them stored.

    Looks at the output, the gradient, the random state and the buffers after the step, at tensors that are changed in
    place where they are still needed, and at the drift of the rebuilt stream from block to block. `tolerance` is the
    largest relative error of the gradient, as a whole and of each parameter: 1e-9 in float64, 1e-3 in float32, 1e-2
    below and under autocast, if not given. Leaves the module, its gradients and the random state as they were; takes
    the memory of a stored step, on copies.

    Raises ValueError for a module that has, or reaches, no `ReversibleSequence`.
    """
    names = [name for name, each in module.named_modules() if isinstance(each, ReversibleSequence) and each.blocks]
    if not names:
        raise ValueError(f"{type(module).__name__} has no ReversibleSequence with blocks in it: nothing to verify")
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    usual = LOW if torch.is_autocast_enabled(x.device.type) else TOLERANCE.get(dtype, LOW)
    report = Verification(tolerance=usual if tolerance is None else tolerance)
    module, random = copy.deepcopy(module), _Random(x.device)
    try:
        with torch.enable_grad():
            _verify(report, module, x, names, random)
    except RuntimeError as error:
        report.findings.append(str(error))
    finally:
        random.rewind()
    return report


def _verify(report: Verification, module: nn.Module, x: Tensor, names: list[str], random: "_Random") -> None:
    stored = _step(module, x, random, recompute=False)
    rebuilt = _step(module, x, random)
    if not stored.output.isfinite().all():
        report.findings.append("the output is not finite on this input, with stored activations, too: give another one")
        return
    sequences = [each for each in module.modules() if isinstance(each, ReversibleSequence)]
    fused = any("fused" in each.engines() for each in sequences)
    _compare(report, rebuilt, stored, random, rounding=report.tolerance if fused else 0.0)
    inputs = _inputs(module, x, names, random)
    if not inputs:
        raise ValueError(f"{type(module).__name__} does not reach its ReversibleSequence {names[0]}: nothing to verify")
    for name, each in inputs.items():
        random.rewind()
        report.drift[name] = _drift(module.get_submodule(name), each)
    name = max(report.drift, key=lambda each: max(report.drift[each]))
    drift = max(report.drift[name])
    place = f"the input of {name or 'the sequence'}"
    if not max(report.gradient, report.worst[1]) <= report.tolerance:
        report.anchor_every = _anchors(module, x, stored, random, tolerance=report.tolerance)
        remedy = (
            f"anchor_every={report.anchor_every} brings it within"
            if report.anchor_every
            else "anchors do not help: do its branches do the same twice?"
        )
        report.findings.append(
            f"the gradient is off by {report.gradient:.1e}, that of {report.worst[0]} by {report.worst[1]:.1e}, more "
            f"than {report.tolerance:.0e}, and {place} is rebuilt within {drift:.1e}; {remedy}"
        )
    elif not drift <= report.tolerance:
        random.rewind()
        if not max(_drift(module.get_submodule(name), inputs[name], anchor_every=1)) <= report.tolerance:
            report.findings.append(
                f"{place} is rebuilt with an error of {drift:.1e}, which anchors do not help, even if the gradient "
                f"does not show it here: do its branches do the same twice?"
            )


class _Random:
    """Every source of random numbers, as it was at the start."""

    def __init__(self, device: torch.device):
        self.sources = list(sources_of([], device))
        self.start = self.now()

    def now(self) -> list[Any]:
        return [source.get() for source in self.sources]

    def rewind(self) -> None:
        for source, state in zip(self.sources, self.start, strict=True):
            source.set(state)

    def same(self, one: list[Any], other: list[Any]) -> bool:
        return all(source.same(a, b) for source, a, b in zip(self.sources, one, other, strict=True))


@dataclass
class _Step:
    """One forward and backward, and what it left."""

    output: Tensor
    gradients: dict[str, Tensor]
    random: list[Any]
    buffers: dict[str, Tensor]


def _step(module: nn.Module, x: Tensor, random: _Random, **options: Any) -> _Step:
    """On a copy of the module, whose sequences have these options."""
    module, x = _copy(module, **options), _leaf(x)
    random.rewind()
    output = torch.cat([_real(each).flatten() for each in _tensors(module(x))])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (output * weights).sum().backward()
    named = {"the input": x, **dict(module.named_parameters())}
    return _Step(
        output.detach(),
        {name: each.grad for name, each in named.items() if each.grad is not None},
        random.now(),
        {name: buffer.clone() for name, buffer in module.named_buffers()},
    )


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex())


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _copy(module: nn.Module, **options: Any) -> nn.Module:
    module = copy.deepcopy(module)
    module.zero_grad()
    for each in module.modules():
        if isinstance(each, ReversibleSequence):
            each.recompute = options.get("recompute", True)
            each.anchor_every = options.get("anchor_every", each.anchor_every)
    return module


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _compare(report: Verification, rebuilt: _Step, stored: _Step, random: _Random, *, rounding: float) -> None:
    report.gradient, report.worst = _errors(rebuilt.gradients, stored.gradients)
    missing = [name for name in stored.gradients if name not in rebuilt.gradients]
    if missing:
        report.findings.append(f"{missing[0]} has no gradient")
    difference = _distance({"": rebuilt.output}, {"": stored.output})
    if not difference <= rounding:
        report.findings.append(f"the output differs by {difference:.1e}: something in it does not do the same twice")
    if not random.same(rebuilt.random, stored.random):
        report.findings.append("random numbers drawn after the step differ: a branch draws from a source of its own")
    moved = [name for name, buffer in stored.buffers.items() if not torch.equal(rebuilt.buffers[name], buffer)]
    if moved:
        report.findings.append(f"the buffer {moved[0]} is moved otherwise by the step: the rebuild updates it, too")


def _errors(ours: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[float, tuple[str, float]]:
    """The relative error of all gradients together; and the parameter whose own is the largest, with that."""
    floor = FLOOR * float(sum(_square(each) for each in others.values())) ** 0.5
    single = {
        name: float(_square(ours[name] - each)) ** 0.5 / max(float(_square(each)) ** 0.5, floor, 1e-300)
        for name, each in others.items()
        if name in ours
    }
    worst = max(single, key=lambda name: single[name], default="")
    return _distance(ours, others), (worst, single.get(worst, 0.0))


def _square(x: Tensor) -> Tensor:
    wide = torch.complex128 if x.is_complex() else torch.float64
    return _real(x.to(wide)).square().sum()


def _distance(ours: Mapping[Any, Tensor], others: Mapping[Any, Tensor]) -> float:
    """|ours - others| / |others|, over what both have."""
    common = {name: each for name, each in others.items() if name in ours}
    difference = sum(float(_square(ours[name] - each)) for name, each in common.items())
    size = sum(float(_square(each)) for each in others.values())
    return (difference / size) ** 0.5 if size else 0.0


def _inputs(module: nn.Module, x: Tensor, names: list[str], random: _Random) -> dict[str, Tensor]:
    """What each sequence that is reached got, at its last call in a forward."""
    found: dict[str, Tensor] = {}
    module = _copy(module, recompute=False)
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, options, name=name: found.update({name: [*args, *options.values()][0].detach()}),
            with_kwargs=True,
        )
    random.rewind()
    with torch.no_grad():
        module(x)
    return found


def _drift(sequence: nn.Module, x: Tensor, **options: Any) -> list[float]:
    """The error of the rebuilt input of each block."""
    sequence = _copy(sequence, **options)
    assert isinstance(sequence, ReversibleSequence)
    stream, frame = Stream.split(_leaf(x), grid=sequence.grid), Frame()
    true = [[half.detach() for half in stream.halves()]]
    for behind in sequence.record(stream, frame):
        true.append([half.detach() for half in behind.halves()])
    frame.keep(behind)
    errors = {
        number: _distance(dict(enumerate(rebuilt.halves())), dict(enumerate(true[number])))
        for number, rebuilt in frame.walk_back()
    }
    starts = accumulate((len(steps) for steps in sequence.steps()), initial=0)
    return [errors[number] for number in starts if number in errors]


def _anchors(module: nn.Module, x: Tensor, stored: _Step, random: _Random, *, tolerance: float) -> int | None:
    """The largest power of two, as the number of blocks between anchors, with which the gradient is within."""
    longest = max(len(each.blocks) for each in module.modules() if isinstance(each, ReversibleSequence))
    every = 1 << max(0, (longest - 1).bit_length() - 1)
    while every:
        step = _step(module, x, random, anchor_every=every)
        whole, (_, worst) = _errors(step.gradients, stored.gradients)
        if max(whole, worst) <= tolerance:
            return every
        every //= 2
    return None
