"""A test of the sampler: whether batches are Poisson samples at the sample rate that epsilon is computed for.

Under Poisson sampling each of n examples is in Binomial(k, q) of k batches, and each batch has Binomial(n, q) examples.
Shuffled batches draw every example equally often and have equal sizes; then both counts vary too little.
"""

import math
from collections.abc import Sequence

from torch import Tensor

FALSE_ALARM = 1e-6


def sampling_findings(draws: Tensor, batch_sizes: Sequence[int], *, sample_rate: float) -> list[str]:
    """Sentences about draws (n,) and sizes (k,) that differ from Poisson sampling; empty if none does.

    Normal approximations, with the exact mean and variance of the mean, and of the dispersion.
    """
    size, steps, q = len(draws), len(batch_sizes), sample_rate
    if not steps:
        return []
    if q == 1:
        return [] if int(draws.sum()) == size * steps else ["not every batch had every example at sample rate 1"]
    total = size * steps
    mean = (int(draws.sum()) - total * q) / math.sqrt(total * q * (1 - q))
    findings = []
    if _p_value(mean) < FALSE_ALARM:
        findings.append(
            f"examples were drawn {int(draws.sum()) / (total * q):.3g} times as often as the sample rate {q:.4g} says"
        )
    counted = {"numbers of draws of the examples": (draws.tolist(), steps), "sizes of the batches": (batch_sizes, size)}
    for name, (counts, trials) in counted.items():
        dispersion, score = _dispersion([int(each) for each in counts], trials=trials, q=q)
        if _p_value(score) < FALSE_ALARM:
            findings.append(
                f"the variance of the {name} is {dispersion:.3g} times that of Poisson sampling: batches were drawn in "
                f"another way, and epsilon is that of another mechanism"
            )
    return findings


def _dispersion(counts: Sequence[int], *, trials: int, q: float) -> tuple[float, float]:
    """(mean square over the variance of Binomial(trials, q), the same as a standard normal by Wilson and Hilferty)."""
    variance = trials * q * (1 - q)
    dispersion = sum((each - trials * q) ** 2 for each in counts) / (variance * len(counts))
    kurtosis = 3 + (1 - 6 * q * (1 - q)) / variance
    ninth = (kurtosis - 1) / len(counts) / 9
    return dispersion, (dispersion ** (1 / 3) - (1 - ninth)) / math.sqrt(ninth)


def _p_value(score: float) -> float:
    """Of a standard normal, on both sides."""
    return math.erfc(abs(score) / math.sqrt(2))
