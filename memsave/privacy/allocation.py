"""The privacy loss distribution of one epoch of balls in bins.

An epoch has T batches with Gaussian noise of standard deviation sigma (in units of C); an example is in exactly one of
them, chosen uniformly. Chua et al. ("Balls-and-Bins Sampling for DP-SGD", 2024) show that with an example and without
it, the outcomes are dominated by

    P = 1/T sum_t N(e_t, sigma^2 I)        Q = N(0, sigma^2 I)        on R^T .

The likelihood ratio P/Q is the mean of T independent numbers u = exp(z / sigma - 1 / (2 sigma^2)), z ~ N(0, 1) under
Q; under P, one of them has z ~ N(1 / sigma, 1). Its distribution is computed without sampling:

- u is put on a grid: a value between two points is divided between them so that its mean is kept. Both hockey-stick
  divergences are expectations of convex functions of the ratio, and such a spread only makes them larger (this is the
  "connect the dots" rounding of Doroshenko et al., 2022). The result is an upper bound.
- The sum of T - 1 numbers is a power of the characteristic function (fast Fourier transform). A Chernoff bound keeps
  what lies beyond the grid below `TAIL`.
- What is cut off or lost by rounding counts as an infinite loss.
- Where the example is left out, a larger ratio is a smaller loss. Large u are then rounded down to a cap, so that the
  grid can be finer.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats import norm

CAPPED = 2.8  # u is capped where P has P(z > 2.8 + 1 / sigma), a quarter of a percent
TAIL = 1e-13  # probability, in an epoch, that is counted as an infinite loss
GRID = 2**20  # points for the sum of T - 1 numbers
SUMS = 1500  # points to which that sum is compressed
VALUES = 1000  # points of the number whose distribution differs between P and Q


def epoch_distribution(noise_multiplier: float, bins: int, *, interval: float) -> Any:
    """dp-accounting's PrivacyLossDistribution of an epoch of `bins` batches, on a grid of losses of this interval."""
    from dp_accounting.pld import privacy_loss_distribution as distributions

    if bins == 1:
        return distributions.from_gaussian_mechanism(noise_multiplier, value_discretization_interval=interval)
    loss, mass, lost = _losses(noise_multiplier, bins, with_example=True)
    loss_without, mass_without, lost_without = _losses(noise_multiplier, bins, with_example=False)
    return distributions.PrivacyLossDistribution.create_from_rounded_probability(
        _rounded(loss, mass, interval),
        lost,
        interval,
        rounded_probability_mass_function_add=_rounded(loss_without, mass_without, interval),
        infinity_mass_add=lost_without,
        symmetric=False,
    )


def _rounded(loss: np.ndarray, mass: np.ndarray, interval: float) -> dict[int, float]:
    """Divide each loss between two points of the grid so that the mean of exp(-loss) is kept."""
    below = np.floor(loss / interval)
    first = int(below.min())
    # share of the upper point: (1 - exp(below - loss)) / (1 - exp(-interval)), all in units of exp(-below)
    upper = np.clip(np.expm1(below * interval - loss) / math.expm1(-interval), 0, 1)
    index = below.astype(np.int64) - first
    total = np.bincount(index, mass * (1 - upper)) if len(index) else np.zeros(0)
    total = np.append(total, 0.0)
    total += np.bincount(index + 1, mass * upper, minlength=len(total))
    return {first + int(position): float(total[position]) for position in np.flatnonzero(total)}


@lru_cache(maxsize=8)
def _losses(sigma: float, bins: int, *, with_example: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """(losses, their mass, what is lost): log P/Q under P, or log Q/P under Q."""
    sums, sum_mass, lost = _sum_of(sigma, bins - 1, capped=not with_example)
    values, mass = _tilted(sigma, with_example=with_example)
    ratio, both = ((sums[:, None] + values) / bins).ravel(), (sum_mass[:, None] * mass).ravel()
    lost += TAIL + float(both[ratio == 0].sum())
    loss = np.log(ratio[ratio > 0])
    return loss if with_example else -loss, both[ratio > 0], lost


def _ratio(z: np.ndarray | float, sigma: float) -> Any:
    """u = exp(z / sigma - 1 / (2 sigma^2))."""
    return np.exp(np.asarray(z) / sigma - 0.5 / sigma**2)


def _spread(points: np.ndarray, sigma: float) -> np.ndarray:
    """The mass of u under Q on increasing points: each u between two of them is divided so that its mean is kept.

    What lies beyond the last point is left out; the first point must be 0.
    """
    with np.errstate(divide="ignore"):
        z = sigma * np.log(points) + 0.5 / sigma  # the first is -inf
    mass, mean = np.diff(norm.cdf(z)), np.diff(norm.cdf(z - 1 / sigma))  # of [points[i], points[i + 1]), E[u 1] there
    upper = np.clip((mean - points[:-1] * mass) / np.diff(points), 0, mass)
    return np.append(mass - upper, 0.0) + np.insert(upper, 0, 0.0)


def _tilted(sigma: float, *, with_example: bool) -> tuple[np.ndarray, np.ndarray]:
    """(points, their mass under P or Q) of the number whose distribution differs."""
    low, high = norm.ppf(TAIL / 2), 1 / sigma + norm.isf(TAIL / 2)
    points = np.append(0.0, _ratio(np.linspace(low, high, VALUES), sigma))
    mass = _spread(points, sigma)
    return points, points * mass if with_example else mass  # P/Q of this number alone is u


def _sum_of(sigma: float, count: int, *, capped: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """(points, their mass, what is lost) of the sum of `count` numbers under Q."""
    tail = norm.isf(TAIL / (4 * count))
    largest = float(_ratio(min(tail, CAPPED + 1 / sigma) if capped else tail, sigma))
    most = count + 2.5 * largest
    while True:
        step = most / GRID
        points = step * np.arange(int(largest / step) + 2)
        mass = _spread(points, sigma)
        if capped:
            mass[-1] += max(0.0, 1 - mass.sum())
        if _chernoff(points, mass, count=count, most=most, largest=largest) <= math.log(TAIL / 4):
            break
        most *= 1.5
    found = np.fft.irfft(np.fft.rfft(mass, GRID) ** count, GRID)
    noise = -found[found < 0].sum()
    compressed = _compressed(step, np.clip(found, 0, None), mean=float(count))
    return (*compressed, TAIL / 2 + 4 * float(noise))


def _chernoff(points: np.ndarray, mass: np.ndarray, *, count: int, most: float, largest: float) -> float:
    """An upper bound of log P(sum > most)."""
    rates = np.geomspace(1, 60, 8) / largest
    return min(count * math.log(float(mass @ np.exp(rate * points))) - rate * most for rate in rates)


def _compressed(step: float, mass: np.ndarray, *, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Points that are dense around the mean, with the mass divided between them so that its mean is kept."""
    last = len(mass) - 1
    spread = np.sinh(np.linspace(-1, 1, SUMS) * math.asinh(100.0 * last * step / mean)) / 100.0  # relative to the mean
    grid = np.unique(np.clip(np.round(mean * (1 + spread) / step), 0, last).astype(np.int64))
    grid = np.unique(np.concatenate([[0], grid, [last]]))
    position = np.arange(len(mass))
    bucket = np.clip(np.searchsorted(grid, position, side="right") - 1, 0, len(grid) - 2)
    upper = (position - grid[bucket]) / (grid[bucket + 1] - grid[bucket])
    total = np.bincount(bucket, mass * (1 - upper), minlength=len(grid))
    total += np.bincount(bucket + 1, mass * upper, minlength=len(grid))
    kept = total > 0
    return step * grid[kept], total[kept]
