"""What noise an epsilon takes, and what epsilon a noise gives, by Opacus's accountants.

One step samples each example with probability q, clips its gradient to C and adds noise of standard deviation
sigma C to the sum: the subsampled Gaussian mechanism, whose composition over the steps is accounted by

    prv   privacy random variables (Gopi et al., NeurIPS 2021): nearly exact
    rdp   Renyi differential privacy (Mironov et al., 2019): looser, and without numerical integration

under add-or-remove-one adjacency. Both answer with upper bounds.
"""

import warnings

ACCOUNTANTS = ("prv", "rdp")
EPSILON_TOLERANCE = 0.01  # calibration ends this close below the target, as Opacus's does by default


class PrivacyError(ValueError):
    """What was asked for would not be private as stated; the message is one sentence."""


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
    """The epsilon that `steps` steps have spent, an upper bound; 0.0 for none, infinity for no noise."""
    check_sample_rate(sample_rate)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return float("inf")
    from opacus.accountants import create_accountant

    mechanism = create_accountant(accountant)
    mechanism.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest one: the bound holds all the same
        return float(mechanism.get_epsilon(delta=delta))


def noise_multiplier_for(
    *, target_epsilon: float, sample_rate: float, steps: int, delta: float, accountant: str
) -> float:
    """The smallest noise multiplier that keeps `steps` steps within the target, to `EPSILON_TOLERANCE` in epsilon."""
    check_sample_rate(sample_rate)
    if not target_epsilon > 0:
        raise PrivacyError(f"target_epsilon is {target_epsilon}; give a positive one, such as 8 or 3")
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
        except ValueError as error:
            raise PrivacyError(
                f"no noise multiplier keeps {steps} steps at sample rate {sample_rate:g} within epsilon "
                f"{target_epsilon:g} by the {accountant} accountant ({error}); take fewer steps or a larger epsilon"
            ) from error
