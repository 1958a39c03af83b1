"""The epsilon of a noise multiplier and the noise multiplier for an epsilon.

One step samples each example with probability q, clips its gradient to C and adds noise of standard deviation sigma C
to the sum. This is the subsampled Gaussian mechanism. Its composition over the steps is bounded by

    prv   privacy random variables (Gopi et al., NeurIPS 2021): nearly exact
    rdp   Renyi differential privacy (Mironov et al., 2019): looser, without numerical integration
    pld   privacy loss distributions (Koskela et al., 2020; Doroshenko et al., PETS 2022): the tightest; all rounding is
          upwards, at any epsilon (needs dp-accounting)

for add-or-remove-one adjacency. All give upper bounds.
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

ACCOUNTANTS = ("prv", "rdp", "pld")
PRV_LIMIT = 50.0  # PRV is not used for larger epsilons: at 600 it takes 10 s and 1 GB, and both grow further
MOST_NOISE = (
    1e4  # for more noise, rounding makes the accountants fail; epsilon decreases with noise, so this bound holds
)
PRV_MECHANISMS = 8  # of different noise or sample rate: the time of PRV grows with their number, to 10 s for 20
PLD_REFINEMENTS = 6
PLD_CHANGE = 2e-3  # a finer grid that lowers epsilon by a smaller part is the last one
EPSILON_TOLERANCE = 0.01  # calibration stops this close below the target, the default of Opacus


class PrivacyError(ValueError):
    """The request would not be private as stated; the message is one sentence."""


def check_accountant(accountant: str) -> None:
    """Raise PrivacyError for an unknown accountant."""
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"accountant is {accountant!r}; choose one of {', '.join(ACCOUNTANTS)}")


def check_noise(noise_multiplier: float) -> None:
    """Raise PrivacyError for noise that is negative, infinite or NaN."""
    if not 0 <= noise_multiplier < math.inf:
        raise PrivacyError(f"noise_multiplier is {noise_multiplier:g}; give a finite number of 0 or more")


def default_delta(size: int) -> float:
    """n^-1.1 (Li et al. 2022). It is below 1/n, the delta at which a mechanism may publish one example."""
    return size**-1.1


def check_delta(delta: float, *, size: int) -> None:
    """Raise PrivacyError for a delta that guarantees nothing."""
    if not 0 < delta < 1 / size:
        raise PrivacyError(
            f"delta is {delta:g} for {size} examples; it must be above 0 and below 1/n = {1 / size:.3g}, because a "
            f"mechanism with delta 1/n may publish one example: n^-1.1 = {default_delta(size):.3g} is usual"
        )


def check_sample_rate(sample_rate: float) -> None:
    """Raise PrivacyError for a sample rate that is not a probability above 0."""
    if not 0 < sample_rate <= 1:
        raise PrivacyError(
            f"sample_rate is {sample_rate:g}; it is the probability that an example is in a batch: give one above 0 "
            f"and at most 1, the batch size over the number of examples"
        )


def epsilon_of(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str) -> float:
    """An upper bound of the epsilon that `steps` steps spend; 0.0 for no steps, infinity for no noise.

    The time and memory of PRV grow with epsilon, to minutes and gigabytes. Above `PRV_LIMIT` the result is therefore
    the RDP bound, which is looser but valid. If noise is so small that the bound overflows, the result is infinity.

    Raises PrivacyError for numbers out of range, and if the accountant cannot compute epsilon.
    """
    return epsilon_of_runs([(noise_multiplier, sample_rate, steps)], delta=delta, accountant=accountant)


def epsilon_of_runs(runs: Iterable[tuple[float, float, int]], *, delta: float, accountant: str) -> float:
    """An upper bound of the epsilon that several runs on the same data spend together.

    The mechanisms of all steps are composed (heterogeneous composition), which is tighter than the sum of the runs'
    epsilons, and holds at one delta instead of the sum of their deltas. Equal runs equal one run of all their steps.
    Limits and errors are those of `epsilon_of`; the result is also the RDP bound for more than `PRV_MECHANISMS`
    different pairs of noise and sample rate.

    Model, learning rate and initial weights of a run may depend on the private results of earlier runs. Noise, sample
    rate and steps must not: the composition assumes that they were fixed beforehand.

    Args:
        runs: (noise multiplier, sample rate, steps) of each.
        delta, accountant: of all runs together.
    """
    check_accountant(accountant)
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta:g}; it must be above 0 and below 1")
    steps_of: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, steps in runs:
        check_noise(noise_multiplier)
        check_sample_rate(sample_rate)
        if steps:
            mechanism = (min(noise_multiplier, MOST_NOISE), sample_rate)
            steps_of[mechanism] = steps_of.get(mechanism, 0) + steps
    if not steps_of:
        return 0.0
    if any(noise_multiplier == 0 for noise_multiplier, _ in steps_of):
        return math.inf
    history = tuple((*mechanism, steps) for mechanism, steps in steps_of.items())
    bound = _opacus_epsilon(history, delta=delta, accountant="rdp")
    if accountant == "pld":
        return min(bound, _pld_epsilon(history, delta=delta, bound=bound)) if bound < math.inf else bound
    if accountant == "rdp" or bound > PRV_LIMIT or len(history) > PRV_MECHANISMS:
        return bound
    return _opacus_epsilon(history, delta=delta, accountant=accountant)


@lru_cache(maxsize=1024)
def _opacus_epsilon(history: tuple[tuple[float, float, int], ...], *, delta: float, accountant: str) -> float:
    """`history`: (noise multiplier, sample rate, steps) of each mechanism."""
    from opacus.accountants import PRVAccountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns if the best order is the largest one; the bound is still valid
        try:
            if accountant == "rdp":
                epsilon = _rdp_epsilon(history, delta=delta)
            else:
                prv = PRVAccountant()
                prv.history = list(history)
                epsilon = float(prv.get_epsilon(delta=delta))
        except (OverflowError, ZeroDivisionError):
            return math.inf
        except (ValueError, ArithmeticError, MemoryError) as error:
            other = "give privacy.accountant=rdp or" if accountant == "prv" else "give"
            mechanisms = " and ".join(
                f"{steps} steps with noise multiplier {noise:g} at sample rate {rate:g}"
                for noise, rate, steps in history
            )
            raise PrivacyError(
                f"the {accountant} accountant cannot compute the epsilon of {mechanisms} and delta {delta:g} "
                f"({error}); {other} a larger delta"
            ) from error
    return math.inf if math.isnan(epsilon) else epsilon


@lru_cache(maxsize=1024)
def _pld_epsilon(history: tuple[tuple[float, float, int], ...], *, delta: float, bound: float) -> float:
    """An upper bound by dp-accounting, which rounds privacy losses up to a grid: finer ones, until epsilon settles."""
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ModuleNotFoundError as error:
        raise PrivacyError("accountant=pld needs dp-accounting: pip install dp-accounting") from error
    found, interval = bound, bound / 200
    for _ in range(PLD_REFINEMENTS):
        accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
        try:
            for noise_multiplier, sample_rate, steps in history:
                accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)
            before, found = found, min(found, float(accountant.get_epsilon(delta)))
        except OverflowError:  # of an epsilon of thousands
            return found
        if before < bound and before - found <= PLD_CHANGE * found:
            break
        interval /= 4
    return found


def _rdp_epsilon(history: tuple[tuple[float, float, int], ...], *, delta: float) -> float:
    """As Opacus's RDPAccountant, which computes the divergences of a step again for each number of steps."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(steps * _rdp_of_a_step(noise, rate) for noise, rate, steps in history)
    epsilon, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)
    return float(epsilon)


@lru_cache(maxsize=1024)
def _rdp_of_a_step(noise_multiplier: float, sample_rate: float) -> Any:
    """The Renyi divergence of one step at each of Opacus's orders."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)


@lru_cache(maxsize=256)
def noise_multiplier_for(
    *, target_epsilon: float, sample_rate: float, steps: int, delta: float, accountant: str
) -> float:
    """The smallest noise multiplier for which `steps` steps spend at most the target, to `EPSILON_TOLERANCE`."""
    check_accountant(accountant)
    check_sample_rate(sample_rate)
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"target_epsilon is {target_epsilon}; give a positive one, such as 8 or 3")
    if accountant == "pld":
        return _pld_noise(target_epsilon=target_epsilon, sample_rate=sample_rate, steps=steps, delta=delta)
    if target_epsilon > PRV_LIMIT:
        accountant = "rdp"  # as in `epsilon_of`
    from opacus.accountants.utils import get_noise_multiplier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(
                get_noise_multiplier(
                    target_epsilon=target_epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=accountant,
                    epsilon_tolerance=min(EPSILON_TOLERANCE, target_epsilon / 100),
                )
            )
        except (ValueError, ArithmeticError, MemoryError) as error:
            raise PrivacyError(
                f"no noise multiplier keeps {steps} steps at sample rate {sample_rate:g} within epsilon "
                f"{target_epsilon:g} by the {accountant} accountant ({error}); take fewer steps or a larger epsilon"
            ) from error


def _pld_noise(*, target_epsilon: float, **account: Any) -> float:
    """Bisection between a noise that is too little and one that is enough."""

    def spent(noise_multiplier: float) -> float:
        return epsilon_of(noise_multiplier=noise_multiplier, **account, accountant="pld")

    tolerance = min(EPSILON_TOLERANCE, target_epsilon / 100)
    enough = 1.0
    while spent(enough) > target_epsilon:
        enough *= 2
        if enough > MOST_NOISE:
            raise PrivacyError(
                f"no noise multiplier up to {MOST_NOISE:g} keeps {account['steps']} steps at sample rate "
                f"{account['sample_rate']:g} within epsilon {target_epsilon:g}; take fewer steps or a larger epsilon"
            )
    too_little = enough / 2
    while spent(too_little) <= target_epsilon:
        enough, too_little = too_little, too_little / 2
    reached = spent(enough)
    while target_epsilon - reached > tolerance:
        between = (too_little + enough) / 2
        if not too_little < between < enough:
            break
        epsilon = spent(between)
        if epsilon <= target_epsilon:
            enough, reached = between, epsilon
        else:
            too_little = between
    return enough
