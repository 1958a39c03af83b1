"""Does a network with reversible sequences do what its stored twin does? In plain words."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memsave.reversible.coupling import Stream
from memsave.reversible.frame import Frame
from memsave.reversible.randomness import sources_of
from memsave.reversible.sequence import ReversibleSequence

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW = 1e-2  # of narrower ones


@dataclass
class Verification:
    """What was found; `print` it. All errors are relative, in the Euclidean norm."""

    findings: list[str] = field(default_factory=list)
    """One sentence for each thing that is wrong."""
    drift: dict[str, list[float]] = field(default_factory=dict)
    """By sequence: the error of the rebuilt input of each block, first to last; the first one is the largest."""
    gradient: float = float("nan")
    """The error of the gradient, of all parameters and the input together."""
    tolerance: float = 0.0
    """What the gradient was compared with."""
    anchor_every: int | None = None
    """Where the gradient is off: the largest number of blocks between anchors with which it is not; None for none."""

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return not self.findings

    def __str__(self) -> str:
        if not self.ok:
            return "\n".join(self.findings)
        name, drift = max(self.drift.items(), key=lambda each: max(each[1]))
        return (
            f"as stored: output, random state and buffers are the same, and the gradient is off by "
            f"{self.gradient:.1e}; the input of {name or 'the sequence'} is rebuilt within {max(drift):.1e} through "
            f"{len(drift)} blocks"
        )


def verify(module: nn.Module, x: Tensor, *, tolerance: float | None = None) -> Verification:
    """Compare one step of `module(x)` with its activations rebuilt and with all of them stored.

    Looks at the output, the gradient, the random state and the buffers after the step, at tensors that are changed in
    place where they are still needed, and at the drift of the rebuilt stream from block to block. `tolerance` is the
    largest relative error of the gradient: 1e-9 in float64, 1e-3 in float32, 1e-2 below, if not given. Leaves the
    module, its gradients and the random state as they were; takes the memory of a stored step, on copies.

    Raises ValueError for a module without a `ReversibleSequence`.
    """
    names = [name for name, each in module.named_modules() if isinstance(each, ReversibleSequence) and each.blocks]
    if not names:
        raise ValueError(f"{type(module).__name__} has no ReversibleSequence with blocks in it: nothing to verify")
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    report = Verification(tolerance=TOLERANCE.get(dtype, LOW) if tolerance is None else tolerance)
    random = _Random(x.device)
    try:
        stored = _step(module, x, random, recompute=False)
        rebuilt = _step(module, x, random)
        _compare(report, rebuilt, stored, random)
        for name, each in _inputs(module, x, names, random).items():
            random.rewind()
            report.drift[name] = _drift(module.get_submodule(name), each)
        worst = max(report.drift, key=lambda name: max(report.drift[name]))
        if not report.gradient <= report.tolerance:
            report.anchor_every = _anchors(module, x, stored, random, tolerance=report.tolerance)
            report.findings.append(_off(report))
        elif not max(report.drift[worst]) <= report.tolerance:
            report.findings.append(
                f"the input of {worst or 'the sequence'} is rebuilt with an error of {max(report.drift[worst]):.1e}, "
                f"even if the gradient does not show it here: do its branches do the same twice?"
            )
    except RuntimeError as error:
        report.findings.append(str(error))
    finally:
        random.rewind()
    return report


def _off(report: Verification) -> str:
    remedy = (
        f"anchor_every={report.anchor_every} brings it within"
        if report.anchor_every
        else "anchors do not help: do its branches do the same twice?"
    )
    worst = max(max(each) for each in report.drift.values())
    return (
        f"the gradient is off by {report.gradient:.1e}, more than {report.tolerance:.0e}, and the rebuilt stream by "
        f"{worst:.1e}; {remedy}"
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
    module, x = _copy(module, **options), x.detach().clone()
    x.requires_grad_(x.is_floating_point())
    random.rewind()
    output = torch.cat([each.flatten() for each in _tensors(module(x))])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (output * weights).sum().backward()
    named = {"the input": x, **dict(module.named_parameters())}
    return _Step(
        output.detach(),
        {name: each.grad for name, each in named.items() if each.grad is not None},
        random.now(),
        {name: buffer.clone() for name, buffer in module.named_buffers()},
    )


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


def _compare(report: Verification, rebuilt: _Step, stored: _Step, random: _Random) -> None:
    report.gradient = _distance(rebuilt.gradients, stored.gradients)
    missing = [name for name in stored.gradients if name not in rebuilt.gradients]
    if missing:
        report.findings.append(f"{missing[0]} has no gradient")
    difference = _distance({"": rebuilt.output}, {"": stored.output})
    if difference:
        report.findings.append(f"the output differs by {difference:.1e}: something in it does not do the same twice")
    if not random.same(rebuilt.random, stored.random):
        report.findings.append("random numbers drawn after the step differ: a branch draws from a source of its own")
    moved = [name for name, buffer in stored.buffers.items() if not torch.equal(rebuilt.buffers[name], buffer)]
    if moved:
        report.findings.append(f"the buffer {moved[0]} is moved otherwise by the step: the rebuild updates it, too")


def _distance(ours: Mapping[Any, Tensor], others: Mapping[Any, Tensor]) -> float:
    """|ours - others| / |others|, over what both have."""
    common = {name: each for name, each in others.items() if name in ours}
    difference = sum((ours[name].double() - each.double()).square().sum() for name, each in common.items())
    size = sum(each.double().square().sum() for each in others.values())
    return float((difference / size).sqrt()) if size else 0.0


def _inputs(module: nn.Module, x: Tensor, names: list[str], random: _Random) -> dict[str, Tensor]:
    """What each sequence got, at its last call in a forward; a sequence within another one is left to that one."""
    found: dict[str, Tensor] = {}
    module = _copy(module, recompute=False)
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].detach()})
        )
    random.rewind()
    with torch.no_grad():
        module(x)
    return found


def _drift(sequence: nn.Module, x: Tensor) -> list[float]:
    """The error of the rebuilt input of each block."""
    sequence = copy.deepcopy(sequence)
    assert isinstance(sequence, ReversibleSequence)
    stream, frame = Stream.split(x.requires_grad_(x.is_floating_point())), Frame()
    true: list[list[Tensor]] = []
    starts = []
    for number, steps in enumerate(sequence.steps()):
        if sequence.anchor_every and number and number % sequence.anchor_every == 0:
            frame.keep(stream)
        starts.append(len(true))
        for step in steps:
            true.append([half.detach() for half in stream.halves()])
            stream = frame.run(step, stream)
    frame.keep(stream)
    errors = {
        number: _distance(dict(enumerate(rebuilt.halves())), dict(enumerate(true[number])))
        for number, rebuilt in frame.walk_back()
    }
    return [errors[number] for number in starts]


def _anchors(module: nn.Module, x: Tensor, stored: _Step, random: _Random, *, tolerance: float) -> int | None:
    """The largest power of two, as the number of blocks between anchors, with which the gradient is within."""
    longest = max(len(each.blocks) for each in module.modules() if isinstance(each, ReversibleSequence))
    every = 1 << max(0, (longest - 1).bit_length() - 1)
    while every:
        step = _step(module, x, random, anchor_every=every)
        if _distance(step.gradients, stored.gradients) <= tolerance:
            return every
        every //= 2
    return None
