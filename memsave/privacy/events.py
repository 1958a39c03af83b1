"""What happened to the data, apart from what it costs: `Event`, which the accountants compose.

An event is a number of independent uses of the Gaussian mechanism, each on a random part of the data. One step of
DP-SGD is such a use; with correlated noise, or with batches that are drawn together, several steps are one use.
"""

import math
from dataclasses import dataclass

from memsave.privacy.errors import PrivacyError


@dataclass(frozen=True)
class Event:
    """`count` uses of the Gaussian mechanism with sensitivity 1 and standard deviation `noise_multiplier`."""

    noise_multiplier: float
    """sigma."""
    sample_rate: float
    """q: the probability with which an example takes part; with `bins`, 1 / bins."""
    count: int
    bins: int | None = None
    """T, if a use is an epoch of T batches with noise each, in one of which the example is (balls in bins)."""
    largest_batch: int | None = None
    """L, if only L examples of a larger batch are taken (truncated Poisson sampling)."""
    size: int | None = None
    """n, the number of examples, for `largest_batch`."""

    def __post_init__(self) -> None:
        check_noise(self.noise_multiplier)
        check_sample_rate(self.sample_rate)

    def describe(self) -> str:
        """The event in words."""
        how = f"noise multiplier {self.noise_multiplier:g} at sample rate {self.sample_rate:g}"
        if self.largest_batch is not None:
            how += f" with at most {self.largest_batch} examples"
        return f"{self.count} {'steps' if self.bins is None else 'epochs'} with {how}"


def check_noise(noise_multiplier: float) -> None:
    """Raise PrivacyError for noise that is negative, infinite or NaN."""
    if not 0 <= noise_multiplier < math.inf:
        raise PrivacyError(f"noise_multiplier is {noise_multiplier:g}; give a finite number of 0 or more")


def check_sample_rate(sample_rate: float) -> None:
    """Raise PrivacyError for a sample rate that is not a probability above 0."""
    if not 0 < sample_rate <= 1:
        raise PrivacyError(
            f"sample_rate is {sample_rate:g}; it is the probability that an example is in a batch: give one above 0 "
            f"and at most 1, the batch size over the number of examples"
        )
