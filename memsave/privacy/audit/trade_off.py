"""Trade-off functions: how well any adversary can tell two neighbouring data sets apart (Dong, Roth and Su, 2022).

    f(alpha) = the smallest false negative rate of any test whose false positive rate is at most alpha

A mechanism that is (epsilon, delta(epsilon))-private for every epsilon, in both directions, has

    f(alpha) >= max over epsilon of  1 - delta(epsilon) - e^epsilon alpha,  e^-epsilon (1 - delta(epsilon) - alpha)

Here the maximum is over a grid of epsilons. That makes f smaller, so that an audit refutes less, and never too much.
"""

import math
from collections.abc import Sequence

import numpy as np

from memsave.privacy.accountants import loss_distribution
from memsave.privacy.events import Event

GRID = 240
SMALLEST_DELTA = 1e-9  # the grid ends where delta is smaller: further lines would not matter at these error rates
MOST_EPSILON = 50.0


class TradeOff:
    """f of a mechanism, from pairs of epsilon and delta that hold for it in both directions."""

    def __init__(self, epsilons: Sequence[float] | np.ndarray, deltas: Sequence[float] | np.ndarray):
        self._factors = np.exp(np.asarray(epsilons, dtype=float))
        self._tops = 1 - np.asarray(deltas, dtype=float)

    def __call__(self, alpha: float) -> float:
        """The smallest possible false negative rate at the false positive rate alpha."""
        lines = np.maximum(self._tops - self._factors * alpha, (self._tops - alpha) / self._factors)
        return max(0.0, float(lines.max()))

    def allows(self, false_positive: float, false_negative: float) -> bool:
        """Whether a test may have at most these error rates."""
        return false_negative >= self(false_positive)


def gaussian_trade_off(mu: float) -> TradeOff:
    """That of one Gaussian mechanism: normals with standard deviation 1 at distance mu."""
    from scipy.stats import norm

    top = min(MOST_EPSILON, mu * mu / 2 + 6.5 * mu)
    epsilons = np.linspace(0, top, GRID)
    deltas = norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons + norm.logcdf(-mu / 2 - epsilons / mu))
    return TradeOff(epsilons, np.clip(deltas, 0, 1))


def mechanism_trade_off(*, noise_multiplier: float, sample_rate: float, steps: int) -> TradeOff:
    """That of `steps` Gaussian mechanisms on Poisson samples.

    A sample rate of 1 gives one Gaussian mechanism with mu = sqrt(steps) / noise_multiplier. Other rates need
    dp-accounting, whose privacy loss distributions are rounded upwards. Raises PrivacyError if it is missing.
    """
    if sample_rate == 1:
        return gaussian_trade_off(math.sqrt(steps) / noise_multiplier)
    interval = min(0.1, max(1e-4, 2e-3 * min(1.0, sample_rate * 10) / min(noise_multiplier, 2.0) ** 2))
    loss = loss_distribution((Event(noise_multiplier, sample_rate, steps),), interval)
    top = min(MOST_EPSILON, max(0.5, float(loss.get_epsilon_for_delta(SMALLEST_DELTA))))
    epsilons = np.linspace(0, top, GRID)
    return TradeOff(epsilons, np.asarray(loss.get_delta_for_epsilon(epsilons)))
