"""The epsilon of a noise multiplier and the noise multiplier for an epsilon.

One step samples each example with probability q, clips its gradient to C and adds noise of standard deviation sigma C
to the sum: the subsampled Gaussian mechanism. Every epsilon here is an upper bound for adding or removing one example,
by one of the accountants of `accountants.py`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from memsave.privacy.accountants import check_accountant, loss_distribution, upper_bound
from memsave.privacy.errors import PrivacyError
from memsave.privacy.events import Event, check_sample_rate

MOST_NOISE = (
    1e4  # for more noise, rounding makes the accountants fail; epsilon decreases with noise, so this bound holds
)
EPSILON_TOLERANCE = 0.01  # calibration stops this close below the target
LEAST_NOISE = 1e-6  # a search for less noise ends here
CLOSEST = 1.0005  # epsilon may jump, as where PRV gives way to RDP; noise multipliers this close end the search
FINE = 2000  # points of the grid of a curve


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


def epsilon_of(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> float:
    """An upper bound of the epsilon that `steps` steps spend; 0.0 for no steps, infinity for no noise.

    The time and memory of PRV grow with epsilon, to minutes and gigabytes. Above `PRV_LIMIT` its result is therefore
    the RDP bound, which is looser but valid. If noise is so small that the bound overflows, the result is infinity.

    Raises PrivacyError for numbers out of range, and if the accountant cannot compute epsilon.
    """
    return epsilon_of_runs([(noise_multiplier, sample_rate, steps)], delta=delta, accountant=accountant)


def epsilon_of_runs(runs: Iterable[tuple[float, float, int]], *, delta: float, accountant: str = "pld") -> float:
    """An upper bound of the epsilon that several runs on the same data spend together.

    The mechanisms of all steps are composed (heterogeneous composition), which is tighter than the sum of the runs'
    epsilons, and holds at one delta instead of the sum of their deltas. Equal runs equal one run of all their steps.
    Limits and errors are those of `epsilon_of`; PRV is also replaced by the RDP bound for more than `PRV_MECHANISMS`
    different pairs of noise and sample rate.

    Model, learning rate and initial weights of a run may depend on the private results of earlier runs. Noise, sample
    rate and steps must not: the composition assumes that they were fixed beforehand.

    Args:
        runs: (noise multiplier, sample rate, steps) of each; that of other mechanisms is in `epsilon_of_events`.
        delta, accountant: of all runs together.
    """
    return epsilon_of_events([Event(*run) for run in runs], delta=delta, accountant=accountant)


def epsilon_of_events(events: Iterable[Event], *, delta: float, accountant: str = "pld") -> float:
    """An upper bound of the epsilon of events on the same data together; see `epsilon_of_runs`."""
    check_accountant(accountant)
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta:g}; it must be above 0 and below 1")
    found = _merged(events)
    if not found:
        return 0.0
    if any(each.noise_multiplier == 0 for each in found):
        return math.inf
    return upper_bound(found, delta=delta, accountant=accountant)


def _merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """The events with a use, in their order, equal ones as one."""
    counts: dict[Event, int] = {}
    for each in events:
        if each.count:
            kind = replace(each, noise_multiplier=min(each.noise_multiplier, MOST_NOISE), count=1)
            counts[kind] = counts.get(kind, 0) + each.count
    return tuple(replace(kind, count=count) for kind, count in counts.items())


def epsilon_curve(events: Sequence[Event], deltas: Sequence[float]) -> list[float]:
    """Upper bounds of epsilon by PLD, one for each delta; infinity where there is none."""
    found = _merged(events)
    if not found:
        return [0.0] * len(deltas)
    bound = epsilon_of_events(found, delta=min(deltas))
    if bound == math.inf:
        return [bound] * len(deltas)
    try:
        distribution = loss_distribution(found, bound / FINE)
        return [min(float(distribution.get_epsilon_for_delta(delta)), bound) for delta in deltas]
    except OverflowError:  # of an epsilon of thousands
        return [epsilon_of_events(found, delta=delta) for delta in deltas]


def noise_multiplier_for(
    *, target_epsilon: float, sample_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> float:
    """The smallest noise multiplier for which `steps` steps spend at most the target, to `EPSILON_TOLERANCE`."""
    check_accountant(accountant)
    check_sample_rate(sample_rate)

    def epsilon(noise_multiplier: float) -> float:
        return epsilon_of(
            noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, delta=delta, accountant=accountant
        )

    return calibrated(epsilon, target_epsilon=target_epsilon, what=f"{steps} steps at sample rate {sample_rate:g}")


def calibrated(epsilon: Callable[[float], float], *, target_epsilon: float, what: str) -> float:
    """The smallest noise multiplier for which `epsilon` is at most the target, to `EPSILON_TOLERANCE`.

    By interpolation between a noise that is too little and one that is enough, where log epsilon is nearly a line over
    log noise.

    Args:
        epsilon: of a noise multiplier; does not grow with it.
        target_epsilon: above 0.
        what: the steps in words, for the error.
    """
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"target_epsilon is {target_epsilon}; give a positive one, such as 8 or 3")
    tolerance = min(EPSILON_TOLERANCE, target_epsilon / 100)
    enough, reached = 1.0, epsilon(1.0)
    too_little, spent = enough, reached
    while reached > target_epsilon:
        too_little, spent = enough, reached
        enough *= min(16.0, max(1.5, 1.1 * reached / target_epsilon))
        if too_little >= MOST_NOISE:
            raise PrivacyError(
                f"no noise multiplier up to {MOST_NOISE:g} keeps {what} within epsilon {target_epsilon:g}; take fewer "
                f"steps or a larger epsilon"
            )
        reached = epsilon(enough)
    while spent <= target_epsilon and too_little > LEAST_NOISE:
        enough, reached = too_little, spent
        too_little /= 1.5
        spent = epsilon(too_little)
    while target_epsilon - reached > tolerance and enough > too_little * CLOSEST:
        share = 0.5
        if reached > 0 and spent < math.inf:
            aim = target_epsilon - tolerance / 2
            share = min(0.95, max(0.05, math.log(aim / reached) / math.log(spent / reached)))
        between = enough * (too_little / enough) ** share
        found = epsilon(between)
        if found <= target_epsilon:
            enough, reached = between, found
        else:
            too_little, spent = between, found
    return enough
