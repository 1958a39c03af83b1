"""Lower bounds of epsilon from one training run with many canaries.

Each of m canaries is included with probability 1/2, independently of the others. An adversary who sees the output of
the mechanism gives each canary a score, guesses that those with the highest scores were included and those with the
lowest were not, and abstains from the rest. With r guesses, of which v are right:

Steinke, Nasr and Jagielski (NeurIPS 2023), Theorem 5.2: for an (epsilon, delta)-private mechanism,

    P[at least v right] <= b(v) + 2 m delta max over i of (b(v - i) - b(v)) / i,    b(v) = P[Binomial(r, p) >= v],
    p = e^epsilon / (1 + e^epsilon)

Mahloujifar, Melis and Chaudhuri (2024), Algorithm 3: the same question for a mechanism with a trade-off function f,
which uses all pairs of epsilon and delta of the mechanism together, and therefore shows more.

The number of guesses is not chosen by the result: all of `guess_counts` are tried, each at the significance divided by
their number (Bonferroni).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from memsave.privacy.audit.trade_off import TradeOff

SHARES = (2, 4, 8, 16, 32)  # guesses are m over these
LEAST_GUESSES = 8
MOST_EPSILON = 100.0


@dataclass(frozen=True)
class Guesses:
    """The outcome of one number of guesses."""

    included: int
    """k+: so many canaries with the highest scores were guessed to be included."""
    excluded: int
    """k-: so many canaries with the lowest scores were guessed to be excluded."""
    correct: int

    @property
    def count(self) -> int:
        """r, all guesses."""
        return self.included + self.excluded


def guess_counts(canaries: int) -> list[tuple[int, int]]:
    """The pairs (k+, k-) that an audit of so many canaries tries; they depend on nothing else."""
    found = []
    for share in SHARES:
        count = canaries // share
        if count >= LEAST_GUESSES or share == SHARES[0]:
            found += [(count, canaries - count if share == 2 else count), (count, 0)]
    return found


def guess(scores: Sequence[float] | np.ndarray, included: Sequence[bool] | np.ndarray) -> list[Guesses]:
    """Guess by scores, for each pair of `guess_counts`. Equal scores keep their order, which reveals nothing."""
    truth = np.asarray(included, dtype=bool)[np.argsort(-np.asarray(scores, dtype=float), kind="stable")]
    rows = []
    for high, low in guess_counts(len(truth)):
        right = int(truth[:high].sum()) + int((~truth[len(truth) - low :]).sum())
        rows.append(Guesses(high, low, right))
    return rows


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound of the probability of so many right guesses for an (epsilon, delta)-private mechanism."""
    from scipy.stats import binom

    probability = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, probability))
    if not delta:
        return tail
    steps = np.arange(1, correct + 1)
    slopes = (binom.sf(correct - steps - 1, guesses, probability) - tail) / steps
    return min(1.0, tail + 2 * canaries * delta * float(slopes.max(initial=0.0)))


@lru_cache(maxsize=4096)
def epsilon_of_guesses(*, canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The largest epsilon that these guesses refute at this significance; 0.0 if they refute none."""

    def refuted(epsilon: float) -> bool:
        values = {"canaries": canaries, "guesses": guesses, "correct": correct}
        return p_value(**values, epsilon=epsilon, delta=delta) < significance

    return largest(refuted, most=MOST_EPSILON)


def refutes(trade_off: TradeOff, *, canaries: int, guesses: int, correct: int, significance: float) -> bool:
    """Whether a mechanism with this trade-off function gives so many right guesses with less than this probability.

    r and h follow the recursion of Algorithm 3: bounds of the shares of right and wrong guesses, for v, v - 1, ... 0
    right ones.
    """
    if not guesses:
        return False
    right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
    for remaining in range(correct - 1, -1, -1):
        more = max(wrong, trade_off(1 - right))
        if more == wrong:
            break
        right = min(1.0, right + remaining / (guesses - remaining) * (more - wrong))
        wrong = more
    return right + wrong > guesses / canaries


def largest(refuted: Callable[[float], bool], *, most: float, tolerance: float = 1e-4) -> float:
    """The largest number from 0 to `most` that is refuted, if smaller ones are, too; 0.0 if none is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < most and refuted(high):
        low, high = high, 2 * high
    if high >= most and refuted(most):
        return most
    high = min(high, most)
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def epsilon_of_run(outcomes: Sequence[Guesses], *, canaries: int, delta: float, significance: float) -> float:
    """The lower bound of Steinke et al. over all numbers of guesses, together at this significance."""
    each = significance / len(outcomes)
    return max(
        epsilon_of_guesses(canaries=canaries, guesses=one.count, correct=one.correct, delta=delta, significance=each)
        for one in outcomes
    )


def run_refutes(trade_off: TradeOff, outcomes: Sequence[Guesses], *, canaries: int, significance: float) -> bool:
    """Whether any number of guesses refutes the trade-off function, together at this significance."""
    each = significance / len(outcomes)
    return any(
        refutes(trade_off, canaries=canaries, guesses=one.count, correct=one.correct, significance=each)
        for one in outcomes
    )


def all_correct(canaries: int) -> list[Guesses]:
    """The outcome of an adversary who is always right."""
    return [Guesses(high, low, high + low) for high, low in guess_counts(canaries)]
