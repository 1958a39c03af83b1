"""Lower bounds of epsilon from many runs, each with or without one canary.

A threshold of the score is a test of "the canary was there". A fifth of the runs chooses the threshold, and the others
bound its error rates from above (Clopper and Pearson, 1934). For an (epsilon, delta)-private mechanism,

    1 - delta <= FNR + e^epsilon FPR    and    1 - delta <= FPR + e^epsilon FNR      (Kairouz, Oh and Viswanath, 2015)

Sharper, if the mechanism is known but for its noise: the largest noise multiplier whose trade-off function the error
rates contradict (Nasr et al., USENIX Security 2023, who fit the Gaussian mechanism in this way).
"""

import math
from dataclasses import dataclass

import numpy as np

from memsave.privacy.audit.trade_off import TradeOff

MOST_CUTS = 500  # thresholds that are compared
CHOOSING = 5  # one in so many runs chooses the thresholds


@dataclass(frozen=True)
class ErrorRates:
    """Upper bounds of the error rates of some tests, which hold together."""

    false_positive: tuple[float, ...]
    false_negative: tuple[float, ...]
    runs: tuple[int, int]
    """Runs with and without the canary that the bounds come from."""

    def refute(self, trade_off: TradeOff) -> bool:
        """Whether a mechanism with this trade-off function cannot have one of these pairs of error rates."""
        return any(
            not trade_off.allows(*pair) or not trade_off.allows(*reversed(pair))
            for pair in zip(self.false_positive, self.false_negative, strict=True)
        )

    def epsilon(self, delta: float) -> float:
        """The largest epsilon that the error rates refute."""
        found = 0.0
        for pair in zip(self.false_positive, self.false_negative, strict=True):
            for one, other in (pair, pair[::-1]):
                if one > 0 and 1 - delta - other > one:
                    found = max(found, math.log((1 - delta - other) / one))
        return found


def upper_bound(events: int, trials: int, *, significance: float) -> float:
    """The Clopper-Pearson upper bound of a probability."""
    from scipy.stats import beta

    return 1.0 if events >= trials else float(beta.ppf(1 - significance, events + 1, trials - events))


def error_rates(with_canary: np.ndarray, without: np.ndarray, *, delta: float, significance: float) -> ErrorRates:
    """Bounds of the error rates of two thresholds, together at this significance.

    The first fifth of each array chooses the thresholds: the one that shows the largest epsilon, and the one with the
    smallest sum of both rates. Only the rest is counted.
    """
    present, absent = len(with_canary) // CHOOSING, len(without) // CHOOSING
    second = with_canary[present:], without[absent:]
    cuts = sorted({*_thresholds(with_canary[:present], without[:absent], delta=delta)})
    each = significance / (2 * len(cuts))
    pairs = [_rates(second[0], second[1], cut, significance=each) for cut in cuts]
    return ErrorRates(
        tuple(one for one, _ in pairs), tuple(other for _, other in pairs), (len(second[0]), len(second[1]))
    )


def _rates(with_canary: np.ndarray, without: np.ndarray, cut: float, *, significance: float) -> tuple[float, float]:
    positive, negative = int((without >= cut).sum()), int((with_canary < cut).sum())
    return (
        upper_bound(positive, len(without), significance=significance),
        upper_bound(negative, len(with_canary), significance=significance),
    )


def _thresholds(with_canary: np.ndarray, without: np.ndarray, *, delta: float) -> tuple[float, float]:
    """The threshold that shows the largest epsilon, and the one with the smallest sum of both rates."""
    from scipy.stats import beta

    cuts = np.unique(np.concatenate([with_canary, without]))
    cuts = cuts[:: max(1, len(cuts) // MOST_CUTS)]
    found = [
        (len(without) - np.searchsorted(np.sort(without), cuts), len(without)),
        (np.searchsorted(np.sort(with_canary), cuts), len(with_canary)),
    ]
    bounds = [beta.ppf(0.95, counts + 1, np.maximum(trials - counts, 1e-9)) for counts, trials in found]
    shown = [ErrorRates((one,), (other,), (1, 1)).epsilon(delta) for one, other in zip(*bounds, strict=True)]
    errors = sum(counts / trials for counts, trials in found)
    return float(cuts[int(np.argmax(shown))]), float(cuts[int(np.argmin(errors))])
