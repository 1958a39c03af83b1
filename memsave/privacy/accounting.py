"""What noise an epsilon takes, and what epsilon a noise gives, by Opacus's accountants.

One step samples each example with probability q, clips its gradient to C and adds noise of standard deviation
sigma C to the sum: the subsampled Gaussian mechanism, whose composition over the steps is accounted by

    prv   privacy random variables (Gopi et al., NeurIPS 2021): nearly exact
    rdp   Renyi differential privacy (Mironov et al., 2019): looser, and without numerical integration

under add-or-remove-one adjacency. Both answer with upper bounds.
"""

import math
import warnings
from typing import Any

ACCOUNTANTS = ("prv", "rdp")
PRV_LIMIT = 50.0  # epsilon above which PRV is not asked: at 600 it takes 10 s and 1 GB, and both go on growing
MOST_NOISE = 1e4  # accountants fail for more noise by rounding; epsilon falls with the noise, so its bound holds
EPSILON_TOLERANCE = 0.01  # calibration ends this close below the target, as Opacus's does by default


class PrivacyError(ValueError):
    """What was asked for would not be private as stated; the message is one sentence."""


def check_accountant(accountant: str) -> None:
    """Refuse the name of no accountant."""
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"accountant is {accountant!r}; choose one of {', '.join(ACCOUNTANTS)}")


def check_noise(noise_multiplier: float) -> None:
    """Refuse noise that is negative, infinite or NaN."""
    if not 0 <= noise_multiplier < math.inf:
        raise PrivacyError(f"noise_multiplier is {noise_multiplier:g}; give a finite number of 0 or more")


def default_delta(size: int) -> float:
    """n^-1.1 (Li et al. 2022): below 1/n, the delta at which publishing one example outright would be allowed."""
    return size**-1.1


def check_delta(delta: float, *, size: int) -> None:
    """Refuse a delta that promises nothing."""
    if not 0 < delta < 1 / size:
        raise PrivacyError(
            f"delta is {delta:g} for {size} examples; it must be above 0 and below 1/n = {1 / size:.3g}, for at 1/n "
            f"one example may be published outright: n^-1.1 = {default_delta(size):.3g} is usual"
        )


def check_sample_rate(sample_rate: float) -> None:
    """Refuse a rate that is no probability."""
    if not 0 < sample_rate <= 1:
        raise PrivacyError(
            f"sample_rate is {sample_rate:g}; it is the probability that an example is in a batch: give one above 0 "
            f"and at most 1, the batch size over the number of examples"
        )


def epsilon_of(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str) -> float:
    """The epsilon that `steps` steps spend, an upper bound; 0.0 for no steps, infinity for no noise.

    PRV's time and memory grow with epsilon, to minutes and gigabytes. Above `PRV_LIMIT` this is therefore the RDP
    bound, which is looser and as valid. Noise so small that the bound overflows gives infinity.

    Raises PrivacyError for numbers that are out of range, and where the accountant cannot compute an answer.
    """
    check_accountant(accountant)
    check_noise(noise_multiplier)
    check_sample_rate(sample_rate)
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta:g}; it must be above 0 and below 1")
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    run: dict[str, Any] = {
        "noise_multiplier": min(noise_multiplier, MOST_NOISE),
        "sample_rate": sample_rate,
        "steps": steps,
    }
    bound = _opacus_epsilon(**run, delta=delta, accountant="rdp")
    if accountant == "rdp" or bound > PRV_LIMIT:
        return bound
    return _opacus_epsilon(**run, delta=delta, accountant=accountant)


def _opacus_epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str) -> float:
    from opacus.accountants import create_accountant

    mechanism = create_accountant(accountant)
    mechanism.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns when the best order is the largest one; the bound still holds
        try:
            epsilon = float(mechanism.get_epsilon(delta=delta))
        except (OverflowError, ZeroDivisionError):
            return math.inf
        except (ValueError, ArithmeticError, MemoryError) as error:
            other = "give privacy.accountant=rdp or" if accountant == "prv" else "give"
            raise PrivacyError(
                f"the {accountant} accountant cannot compute the epsilon of {steps} steps with noise multiplier "
                f"{noise_multiplier:g} at sample rate {sample_rate:g} and delta {delta:g} ({error}); {other} a larger "
                f"delta"
            ) from error
    return math.inf if math.isnan(epsilon) else epsilon


def noise_multiplier_for(
    *, target_epsilon: float, sample_rate: float, steps: int, delta: float, accountant: str
) -> float:
    """The smallest noise multiplier that keeps `steps` steps within the target, to `EPSILON_TOLERANCE` in epsilon."""
    check_accountant(accountant)
    check_sample_rate(sample_rate)
    if not 0 < target_epsilon < math.inf:
        raise PrivacyError(f"target_epsilon is {target_epsilon}; give a positive one, such as 8 or 3")
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
