"""Verify that a network with reversible sequences computes the same step as with stored activations."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memsave.random_state import RandomSnapshot
from memsave.reversible.coupling import Stream
from memsave.reversible.recompute_context import RecomputeContext
from memsave.reversible.sequence import ReversibleSequence

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 1e-2  # for narrower dtypes and under autocast
KINK_DRIFT = 1e-2  # of the tolerance: a drift below it cannot explain a wrong gradient of a smooth function
FLOOR = 1e-3  # smallest norm, as a share of the whole gradient, that a parameter's error is divided by


@dataclass
class InversionReport:
    """The result of `verify`; `print` it. All errors are relative errors in the Euclidean norm."""

    findings: list[str] = field(default_factory=list)
    """One sentence per problem."""
    drift: dict[str, list[float]] = field(default_factory=dict)
    """By sequence name: the error of the rebuilt input of each block, first to last; errors grow towards the first."""
    gradient: float = float("nan")
    """The error of the gradient of all parameters and the input together."""
    worst: tuple[str, float] = ("", float("nan"))
    """(parameter, error): the parameter whose gradient has the largest error."""
    tolerance: float = 0.0
    """The limit for both errors."""
    in_float64: float | None = None
    """The error of the gradient in float64, if that in float32 comes from kinks; see `verify`."""
    anchor_every: int | None = None
    """If they exceed it: the largest power of two that, as `anchor_every`, brings both errors within it."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.findings

    def __str__(self) -> str:
        if not self.ok:
            return "\n".join(self.findings)
        name, drift = max(self.drift.items(), key=lambda each: max(each[1]))
        place = f"the input of {name or 'the sequence'}"
        kinks = ""
        if self.in_float64 is not None:
            kinks = (
                f" (by {self.in_float64:.1e} in float64: rounding puts a few values on the other side of a kink, such "
                f"as that of ReLU)"
            )
        return (
            f"as stored: output, random state and buffers are the same; the gradient is off by {self.gradient:.1e}, "
            f"for no parameter by more than {self.worst[1]:.1e}{kinks}; {place} is rebuilt within {max(drift):.1e} "
            f"through {len(drift)} blocks"
        )


def verify(module: nn.Module, x: Tensor, *, tolerance: float | None = None) -> InversionReport:
    """Compare one step of `module(x)` with its activations rebuilt and with all of them stored.

    Compares the output, the gradient, and the random state and buffers after the step; detects tensors that are changed
    in place while they are still needed; measures the drift of the rebuilt stream from block to block. `tolerance` is
    the largest allowed relative error of the whole gradient and of each parameter's gradient; the default is 1e-9 in
    float64, 1e-3 in float32, and 1e-2 for narrower dtypes and under autocast.

    Where a function has a kink, as ReLU at zero, a difference of rounding can change one value's gradient as a whole.
    If the gradient exceeds the tolerance in float32 although the stream is rebuilt to within rounding, the step is
    compared in float64, too, and is as stored if it agrees there.

    Works on copies: the module, its
    gradients and the random state do not change. Takes the memory of a step with stored activations.

    Raises ValueError for a module that has, or reaches, no `ReversibleSequence`.
    """
    names = [name for name, each in module.named_modules() if isinstance(each, ReversibleSequence) and each.blocks]
    if not names:
        raise ValueError(f"{type(module).__name__} has no ReversibleSequence with blocks in it: nothing to verify")
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    if tolerance is None:
        low = torch.is_autocast_enabled(x.device.type) or dtype not in TOLERANCE
        tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE[dtype]
    report = InversionReport(tolerance=tolerance)
    module, random = copy.deepcopy(module), RandomSnapshot(x.device)
    try:
        with torch.enable_grad():
            _verify(report, module, x, names, random)
    except RuntimeError as error:
        report.findings.append(str(error))
    finally:
        random.restore()
    return report


def _verify(report: InversionReport, module: nn.Module, x: Tensor, names: list[str], random: RandomSnapshot) -> None:
    stored = _step(module, x, random, recompute=False)
    rebuilt = _step(module, x, random)
    if not stored.output.isfinite().all():
        report.findings.append("the output is not finite on this input, even with stored activations; use another one")
        return
    sequences = [each for each in module.modules() if isinstance(each, ReversibleSequence)]
    fused = any("fused" in each.engines() for each in sequences)
    _compare(report, rebuilt, stored, random, rounding=report.tolerance if fused else 0.0)
    inputs = _inputs(module, x, names, random)
    if not inputs:
        raise ValueError(f"{type(module).__name__} does not reach its ReversibleSequence {names[0]}: nothing to verify")
    for name, each in inputs.items():
        random.restore()
        report.drift[name] = _drift(module.get_submodule(name), each)
    name = max(report.drift, key=lambda each: max(report.drift[each]))
    drift = max(report.drift[name])
    place = f"the input of {name or 'the sequence'}"
    within = max(report.gradient, report.worst[1]) <= report.tolerance
    if not within and drift <= KINK_DRIFT * report.tolerance:
        report.in_float64 = _error_in_float64(module, x, random)
    if not within and report.in_float64 is None:
        report.anchor_every = _anchors(module, x, stored, random, tolerance=report.tolerance)
        remedy = (
            f"anchor_every={report.anchor_every} brings it within"
            if report.anchor_every
            else "anchors do not help: are its branches deterministic?"
        )
        report.findings.append(
            f"the gradient is off by {report.gradient:.1e}, that of {report.worst[0]} by {report.worst[1]:.1e}, more "
            f"than {report.tolerance:.0e}, and {place} is rebuilt within {drift:.1e}; {remedy}"
        )
    elif not drift <= report.tolerance:
        random.restore()
        if not max(_drift(module.get_submodule(name), inputs[name], anchor_every=1)) <= report.tolerance:
            report.findings.append(
                f"{place} is rebuilt with an error of {drift:.1e}, which anchors do not reduce, although the gradient "
                f"does not show it here: are its branches deterministic?"
            )


def _error_in_float64(module: nn.Module, x: Tensor, random: RandomSnapshot) -> float | None:
    """The error of the gradient of the same step in float64; None if it exceeds its tolerance, or has no meaning."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return None
    module = copy.deepcopy(module).double()
    ours, others = (_step(module, x.double(), random, recompute=each).gradients for each in (True, False))
    error, (_, largest) = _errors(ours, others)
    return error if max(error, largest) <= TOLERANCE[torch.float64] else None


@dataclass
class _Step:
    """The results of one forward and backward."""

    output: Tensor
    gradients: dict[str, Tensor]
    random: list[Any]
    buffers: dict[str, Tensor]


def _step(module: nn.Module, x: Tensor, random: RandomSnapshot, **options: Any) -> _Step:
    """Run forward and backward on a copy of the module whose sequences have these options."""
    module, x = _copy(module, **options), _leaf(x)
    random.restore()
    output = torch.cat([_real(each).flatten() for each in tree_leaves(module(x)) if isinstance(each, Tensor)])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
    (output * weights).sum().backward()
    named = {"the input": x, **dict(module.named_parameters())}
    return _Step(
        output.detach(),
        {name: each.grad for name, each in named.items() if each.grad is not None},
        random.current(),
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


def _compare(
    report: InversionReport, rebuilt: _Step, stored: _Step, random: RandomSnapshot, *, rounding: float
) -> None:
    report.gradient, report.worst = _errors(rebuilt.gradients, stored.gradients)
    missing = [name for name in stored.gradients if name not in rebuilt.gradients]
    if missing:
        report.findings.append(f"{missing[0]} has no gradient")
    difference = _distance({"": rebuilt.output}, {"": stored.output})
    if not difference <= rounding:
        report.findings.append(f"the output differs by {difference:.1e}: the network is not deterministic")
    if not random.same(rebuilt.random, stored.random):
        report.findings.append("the random state after the step differs: a branch has an unknown generator")
    changed = [name for name, buffer in stored.buffers.items() if not torch.equal(rebuilt.buffers[name], buffer)]
    if changed:
        report.findings.append(f"the buffer {changed[0]} differs after the step: rebuilding also updates it")


def _errors(ours: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[float, tuple[str, float]]:
    """(relative error of all gradients together, (parameter with the largest error of its gradient, that error))."""
    floor = FLOOR * float(sum(_square(each) for each in others.values())) ** 0.5
    single = {
        name: float(_square(ours[name] - each)) ** 0.5 / max(float(_square(each)) ** 0.5, floor, 1e-300)
        for name, each in others.items()
        if name in ours
    }
    worst = max(single, key=lambda name: single[name], default="")
    return _distance(ours, others), (worst, single.get(worst, 0.0))


def _square(x: Tensor) -> Tensor:
    dtype = torch.complex128 if x.is_complex() else torch.float64
    return _real(x.to(dtype)).square().sum()


def _distance(ours: Mapping[Any, Tensor], others: Mapping[Any, Tensor]) -> float:
    """|ours - others| / |others|, over the keys of both."""
    common = {name: each for name, each in others.items() if name in ours}
    difference = sum(float(_square(ours[name] - each)) for name, each in common.items())
    size = sum(float(_square(each)) for each in others.values())
    return (difference / size) ** 0.5 if size else 0.0


def _inputs(module: nn.Module, x: Tensor, names: list[str], random: RandomSnapshot) -> dict[str, Tensor]:
    """The input of each sequence at its last call in a forward, by name; without sequences that are not called."""
    found: dict[str, Tensor] = {}
    module = _copy(module, recompute=False)
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, options, name=name: found.update({name: [*args, *options.values()][0].detach()}),
            with_kwargs=True,
        )
    random.restore()
    with torch.no_grad():
        module(x)
    return found


def _drift(sequence: nn.Module, x: Tensor, **options: Any) -> list[float]:
    """The relative error of the rebuilt input of each block."""
    sequence = _copy(sequence, **options)
    assert isinstance(sequence, ReversibleSequence)
    stream, context = Stream.split(_leaf(x), grid=sequence.grid), RecomputeContext()
    true = [[half.detach() for half in stream.halves()]]
    for after in sequence.run_steps(stream, context):
        true.append([half.detach() for half in after.halves()])
    context.keep(after)
    errors = {
        number: _distance(dict(enumerate(rebuilt.halves())), dict(enumerate(true[number])))
        for number, rebuilt in context.rebuilt_streams()
    }
    starts = accumulate((len(steps) for steps in sequence.steps()), initial=0)
    return [errors[number] for number in starts if number in errors]


def _anchors(module: nn.Module, x: Tensor, stored: _Step, random: RandomSnapshot, *, tolerance: float) -> int | None:
    """The largest power of two that, as `anchor_every`, brings the gradient within the tolerance; None for none."""
    longest = max(len(each.blocks) for each in module.modules() if isinstance(each, ReversibleSequence))
    every = 1 << max(0, (longest - 1).bit_length() - 1)
    while every:
        step = _step(module, x, random, anchor_every=every)
        whole, (_, worst) = _errors(step.gradients, stored.gradients)
        if max(whole, worst) <= tolerance:
            return every
        every //= 2
    return None
