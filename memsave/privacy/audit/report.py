"""The result of an audit: lower bounds of epsilon beside the promise, and what the audit could have shown at most.

Three lower bounds come from the same guesses:

    one_run      Steinke et al. (2023); holds for any (epsilon, delta)-private mechanism
    f_dp         Mahloujifar et al. (2024), with the trade-off functions of Gaussian mechanisms at the sample rate and
                 the steps of the run: the largest noise that the guesses refute, as an epsilon
    independent  each canary counts as a run of its own (`memsave.privacy.audit.repeated`). Canaries without a common
                 element, under noise that is independent in every element, are independent; input-space canaries are
                 not, and do not have this bound

They hold together at the confidence of the audit: each has its share of the significance. Any of them above the
promised epsilon refutes the promise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from memsave.privacy.audit.one_run import epsilon_of_run, guess, run_refutes
from memsave.privacy.audit.repeated import error_rates
from memsave.privacy.audit.sampling_check import sampling_findings
from memsave.privacy.audit.trade_off import TradeOff, mechanism_trade_off

if TYPE_CHECKING:
    from memsave.privacy.gradients import Mechanism, PrivateGradients

OCTAVES, FINENESS = 4, 24  # noise is tried from 2^-4 to 2^4 times the promised one, in factors of 2^(1/24)
LEAST_RUNS = 10  # with and without the canary
BOUNDS = ("one_run", "f_dp", "independent")


@dataclass(frozen=True)
class CanaryGroup:
    """The result of the canaries of one kind."""

    kind: str
    """gradient or input."""
    canaries: int
    included: int
    bounds: dict[str, float]
    """The lower bound of epsilon by each method."""
    most: dict[str, float]
    """What each method would show if there were no noise: every canary that was drawn is recognised."""
    scores: list[float] = field(repr=False)
    truth: list[bool] = field(repr=False)

    @property
    def epsilon(self) -> float:
        """The largest of the lower bounds."""
        return max(self.bounds.values())


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit; `print` it."""

    promised: float
    """The epsilon of the accountant; infinity for a run without noise."""
    delta: float
    confidence: float
    steps: int
    groups: list[CanaryGroup]
    findings: list[str] = field(default_factory=list)
    """One sentence for each difference between the sampler and the mechanism."""

    @property
    def epsilon(self) -> float:
        """The lower bound of epsilon at this confidence."""
        return max((group.epsilon for group in self.groups), default=0.0)

    @property
    def most(self) -> float:
        """The largest lower bound that the audit could have shown."""
        return max((bound for group in self.groups for bound in group.most.values()), default=0.0)

    @property
    def breach(self) -> bool:
        """Whether the audit refutes the promise."""
        return self.epsilon > self.promised or bool(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For `result.json`; a promise of infinity is None."""
        return {
            **asdict(self),
            "promised": None if self.promised == math.inf else self.promised,
            "epsilon": self.epsilon,
            "most": self.most,
            "breach": self.breach,
        }

    def __str__(self) -> str:
        promised = "none" if self.promised == math.inf else f"{self.promised:.2f}"
        verdict = "refuted" if self.breach else "not refuted"
        lines = [
            f"audit: epsilon is at least {self.epsilon:.2f} with {self.confidence:.0%} confidence, promised {promised} "
            f"at delta = {self.delta:.2e}; the promise is {verdict}",
            f"this audit could have shown at most {self.most:.2f}; a lower bound is no proof of privacy",
        ]
        return "\n".join([*lines, *self.findings])


def audit_report(
    private: "PrivateGradients",
    *,
    input_scores: Tensor | Sequence[float] | None = None,
    confidence: float = 0.95,
) -> AuditReport:
    """The report of the audit of a `PrivateGradients`, after its last step.

    `input_scores` (inputs,): larger for input-space canaries that look included, such as the decrease of their losses.
    None leaves them out.
    """
    audit, mechanism, steps = private.audit, private.mechanism, private.steps
    if audit is None:
        raise ValueError("this PrivateGradients has no audit; create it with audit=CanaryAudit(...)")
    scores = {"input": input_scores if audit.inputs else None, "gradient": audit.evidence if audit.gradient else None}
    given = {kind: np.asarray(values, dtype=float) for kind, values in scores.items() if values is not None}
    included = {"input": audit.included[: audit.inputs], "gradient": audit.included[audit.inputs :]}
    significance = (1 - confidence) / (len(given) or 1)
    groups = [
        _group(kind, values, included[kind].numpy(), mechanism, steps=steps, significance=significance)
        for kind, values in given.items()
        if steps
    ]
    findings = sampling_findings(audit.draws, audit.batch_sizes, sample_rate=mechanism.sample_rate)
    return AuditReport(mechanism.epsilon(steps), mechanism.delta, confidence, steps, groups, findings)


def _group(
    kind: str, scores: np.ndarray, truth: np.ndarray, mechanism: "Mechanism", *, steps: int, significance: float
) -> CanaryGroup:
    methods = [name for name in BOUNDS if name != "independent" or kind == "gradient"]
    if not mechanism.noise_multiplier:
        methods.remove("f_dp")
    each = significance / len(methods)
    canaries, delta = len(scores), mechanism.delta

    def bounds(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        found, outcomes = {}, guess(scores, truth)
        found["one_run"] = epsilon_of_run(outcomes, canaries=canaries, delta=delta, significance=each)
        if "f_dp" in methods:
            found["f_dp"] = epsilon_of_refuted_noise(
                lambda f: run_refutes(f, outcomes, canaries=canaries, significance=each), mechanism, steps=steps
            )
        if "independent" in methods:
            found["independent"] = _independent(scores, truth, mechanism, steps=steps, significance=each)
        return found

    most = bounds(*_without_noise(canaries, sample_rate=mechanism.sample_rate, steps=steps))
    return CanaryGroup(
        kind, canaries, int(truth.sum()), bounds(scores, truth), most, scores.tolist(), truth.astype(bool).tolist()
    )


def _without_noise(canaries: int, *, sample_rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, whether included): half are included, and those of them that are never drawn look excluded."""
    truth = np.arange(canaries) % 2 == 0
    present = int(truth.sum())
    drawn = present - round(present * (1 - sample_rate) ** steps)
    return (truth & (np.cumsum(truth) <= drawn)).astype(float), truth


def _independent(
    scores: np.ndarray, truth: np.ndarray, mechanism: "Mechanism", *, steps: int, significance: float
) -> float:
    present, absent = scores[truth.astype(bool)], scores[~truth.astype(bool)]
    if min(len(present), len(absent)) < LEAST_RUNS:
        return 0.0
    rates = error_rates(present, absent, delta=mechanism.delta, significance=significance)
    if not mechanism.noise_multiplier:
        return rates.epsilon(mechanism.delta)
    return max(rates.epsilon(mechanism.delta), epsilon_of_refuted_noise(rates.refute, mechanism, steps=steps))


def epsilon_of_refuted_noise(refuted: Callable[[TradeOff], bool], mechanism: "Mechanism", *, steps: int) -> float:
    """The epsilon of the mechanism with the smallest noise that is refuted; 0.0 if none is.

    More noise than that is refuted, too. `refuted` decides by the trade-off function of a noise.
    """

    def at(step: int) -> float:
        return mechanism.noise_multiplier * float(2 ** (step / FINENESS))

    def is_refuted(step: int) -> bool:
        return refuted(_trade_off(at(step), mechanism.sample_rate, steps))

    low, high = -OCTAVES * FINENESS - 1, OCTAVES * FINENESS
    if not is_refuted(high):
        return 0.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_refuted(middle) else (middle, high)
    return replace(mechanism, noise_multiplier=at(high)).epsilon(steps)


@lru_cache(maxsize=512)
def _trade_off(noise_multiplier: float, sample_rate: float, steps: int) -> TradeOff:
    return mechanism_trade_off(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
