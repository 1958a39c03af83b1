"""What runs have spent on the same data: one `Spending` for each run, and the epsilon of all of them together.

The privacy of several runs is that of the composition of all their steps (`memsave.privacy.epsilon_of_events`). It is
stated at the smallest delta of the runs, so that it holds wherever the statement of each run does: at this delta, the
epsilon together is at least the epsilon of each run. A run without a guarantee cannot be composed: together with it, no
bound holds. Runs that protect different units, such as records and persons, are not composed either: their epsilons
bound the effect of different changes of the data.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memsave.privacy import Event, Mechanism, PrivacyError, epsilon_of_events
from memsave.privacy.accounting import check_delta


@dataclass(frozen=True)
class Spending:
    """The steps of one run on private data."""

    run: str
    """The id of the run, which it keeps when it is continued in another folder."""
    folder: str
    data: str | None
    """The fingerprint of the data; None if it is not known."""
    steps: int
    """The steps to count: those taken, or those planned if the run has not ended."""
    no_guarantee: str | None = None
    """The reason why the run has no guarantee; None if it has one."""
    noise_multiplier: float = 0.0
    sample_rate: float = 1.0
    delta: float = 1.0
    accountant: str = "pld"
    size: int | None = None
    """Number of training examples."""
    mechanism: dict[str, Any] | None = None
    """The arguments of `Mechanism`; None if the run's version had only Poisson sampling and independent noise."""
    epsilon: float | None = None
    """Epsilon of this run alone at its own delta, if it is known."""
    unfinished: bool = False
    """Whether the run has not reported its end."""
    unit: str | None = None
    """What the run protects: data.unit, or None for single records."""

    @property
    def events(self) -> list[Event]:
        """What the steps did to the data."""
        if self.mechanism is None:
            return [Event(self.noise_multiplier, self.sample_rate, self.steps)]
        return Mechanism(**self.mechanism).events(self.steps)


@dataclass(frozen=True)
class Total:
    """The privacy that several runs on the same data spent together."""

    private: int
    """Number of runs with a guarantee."""
    without: int
    """Number of runs without one; if there are any, all runs together have none."""
    unfinished: int
    epsilon: float | None
    """Of the runs with a guarantee; None if there are none, or if no accountant can compute it."""
    delta: float | None
    accountant: str
    units: int = 1
    """Number of different units that the runs with a guarantee protect; for several, there is no common epsilon."""


def check_mechanism(spending: Spending) -> None:
    """Raise PrivacyError for numbers that no accountant takes, TypeError for values that are no numbers."""
    assert spending.events
    if spending.no_guarantee is None and not 0 < spending.delta < 1:
        raise PrivacyError(f"delta is {spending.delta:g}; it must be above 0 and below 1")


def once(spendings: Iterable[Spending]) -> list[Spending]:
    """Each run once, with most of its steps: a continued run may stand in several folders."""
    found: dict[str, Spending] = {}
    for each in spendings:
        other = found.get(each.run)
        if other is None or each.steps > other.steps:
            found[each.run] = each
    return list(found.values())


def total(spendings: Sequence[Spending], *, delta: float | None = None, accountant: str | None = None) -> Total:
    """Compose runs on the same data.

    Args:
        spendings: one for each run.
        delta: of all runs together; None takes the smallest delta of the runs.
        accountant: pld, prv or rdp; None takes the loosest of those of the runs, so that the bound is no smaller
            than theirs.

    Raises PrivacyError for a delta or an accountant that cannot be used.
    """
    private = [each for each in spendings if each.no_guarantee is None]
    if accountant is None:
        taken = {each.accountant for each in private}
        accountant = next((each for each in ("rdp", "prv") if each in taken), "pld")
    if delta is None and private:
        delta = min(each.delta for each in private)
    elif delta is not None and (sizes := [each.size for each in private if each.size]):
        check_delta(delta, size=max(sizes))
    units = len({each.unit for each in private})
    can_compose = delta is not None and units == 1
    epsilon = _epsilon(private, delta=delta, accountant=accountant) if delta is not None and can_compose else None
    return Total(
        private=len(private),
        without=len(spendings) - len(private),
        unfinished=sum(each.unfinished for each in spendings),
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        units=max(1, units),
    )


def _epsilon(private: Sequence[Spending], *, delta: float, accountant: str) -> float | None:
    events = [event for each in private for event in each.events]
    epsilon = epsilon_of_events(events, delta=delta, accountant=accountant)
    # accountants round numerically: a bound of all runs must not lie below a bound of one of them
    alike = [each for each in private if each.accountant == accountant and each.delta >= delta]
    return None if epsilon == math.inf else max([epsilon, *(each.epsilon for each in alike if each.epsilon)])


def total_or_none(spendings: Sequence[Spending]) -> Total:
    """`total` for a report that must not fail: by PLD or RDP, or without an epsilon, where an accountant cannot."""
    for accountant in (None, "pld", "rdp"):
        try:
            return total(spendings, accountant=accountant)
        except PrivacyError:
            continue
    without = sum(each.no_guarantee is not None for each in spendings)
    unfinished = sum(each.unfinished for each in spendings)
    return Total(len(spendings) - without, without, unfinished, None, None, "rdp")
