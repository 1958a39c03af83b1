"""The accountants: an upper bound of the epsilon of events, for adding or removing one example.

pld   privacy loss distributions (Koskela et al., 2020; Doroshenko et al., PETS 2022), by dp-accounting: tight, all
      rounding is upwards, at any epsilon
prv   privacy random variables (Gopi et al., NeurIPS 2021), by Opacus: nearly exact
rdp   Renyi differential privacy (Mironov et al., 2019), by Opacus: looser, without numerical integration
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from memsave.privacy.errors import PrivacyError
from memsave.privacy.events import Event

ACCOUNTANTS = ("pld", "prv", "rdp")
PRV_LIMIT = 50.0  # PRV is not used for larger epsilons: at 600 it takes 10 s and 1 GB, and both grow further
PRV_MECHANISMS = 8  # of different noise or sample rate: the time of PRV grows with their number, to 10 s for 20
REFINEMENTS = 6
POINTS = 200  # of the first grid of privacy losses, up to epsilon
CHANGE = 2e-3  # a finer grid that lowers epsilon by a smaller part is the last one

Events = tuple[Event, ...]


def check_accountant(accountant: str) -> None:
    """Raise PrivacyError for an unknown accountant."""
    if accountant not in ACCOUNTANTS:
        raise PrivacyError(f"accountant is {accountant!r}; choose one of {', '.join(ACCOUNTANTS)}")


def upper_bound(events: Events, *, delta: float, accountant: str) -> float:
    """Epsilon of the events together; each event has noise. Infinity if the noise is too small for any bound.

    Raises PrivacyError if the accountant does not know an event, or cannot compute the epsilon.
    """
    plain = tuple(each for each in events if each.bins is None and each.largest_batch is None)
    if accountant != "pld":
        if plain != events:
            raise PrivacyError(
                f"accountant={accountant} has no bound for truncated Poisson sampling or balls in bins; give "
                f"accountant=pld"
            )
        bound = rdp(events, delta=delta)
        if accountant == "rdp" or bound > PRV_LIMIT or len(events) > PRV_MECHANISMS:
            return bound
        return prv(events, delta=delta)
    # the scale of the grid; for other sampling, RDP without amplification is a bound, but a loose one
    bound = rdp(events if plain == events else tuple(map(_unamplified, events)), delta=delta)
    return bound if bound == math.inf else pld(events, delta=delta, bound=bound)


def _unamplified(event: Event) -> Event:
    return (
        event if event.bins is None and event.largest_batch is None else Event(event.noise_multiplier, 1.0, event.count)
    )


@lru_cache(maxsize=1024)
def pld(events: Events, *, delta: float, bound: float) -> float:
    """An upper bound at most `bound`: losses are rounded up to ever finer grids, until epsilon settles."""
    found, interval = bound, bound / POINTS
    for _ in range(REFINEMENTS):
        try:
            before, found = found, min(found, loss_distribution(events, interval).get_epsilon_for_delta(delta))
        except OverflowError:  # of an epsilon of thousands
            return found
        if before < bound and before - found <= CHANGE * found:
            break
        interval /= 4
    return float(found)


def loss_distribution(events: Events, interval: float) -> Any:
    """dp-accounting's privacy loss distribution of the events, on a grid of this interval, rounded up."""
    try:
        from dp_accounting.pld import privacy_loss_distribution as distributions
    except ModuleNotFoundError as error:
        raise PrivacyError("accountant=pld needs dp-accounting: pip install dp-accounting") from error
    total = distributions.identity(interval)
    for each in events:
        kwargs: dict[str, Any] = {"value_discretization_interval": interval}
        if each.bins is not None:
            from memsave.privacy.allocation import epoch_distribution

            found = epoch_distribution(each.noise_multiplier, each.bins, interval=interval)
        elif each.largest_batch is not None:
            # of two neighbouring data sets, the accountant's is the larger one, where truncation is likelier
            found = distributions.from_truncated_subsampled_gaussian_mechanism(
                dataset_size=(each.size or 0) + 1,
                sampling_probability=each.sample_rate,
                truncated_batch_size=each.largest_batch,
                noise_multiplier=each.noise_multiplier,
                **kwargs,
            )
        else:
            found = distributions.from_gaussian_mechanism(
                each.noise_multiplier, sampling_prob=each.sample_rate, **kwargs
            )
        total = total.compose(found.self_compose(each.count))
    return total


@lru_cache(maxsize=1024)
def prv(events: Events, *, delta: float) -> float:
    """The bound of Opacus's PRVAccountant, whose time and memory grow with epsilon."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(each.noise_multiplier, each.sample_rate, each.count) for each in events]
    return _computed("prv", lambda: accountant.get_epsilon(delta=delta), events, delta=delta)


def rdp(events: Events, *, delta: float) -> float:
    """As Opacus's RDPAccountant, which computes the divergences of a step again for each number of steps."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    def compute() -> float:
        total = sum(each.count * _divergences(each.noise_multiplier, each.sample_rate) for each in events)
        return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)[0])

    return _computed("rdp", compute, events, delta=delta)


@lru_cache(maxsize=1024)
def _divergences(noise_multiplier: float, sample_rate: float) -> Any:
    """The Renyi divergence of one step at each of Opacus's orders."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)


def _computed(accountant: str, compute: Callable[[], float], events: Sequence[Event], *, delta: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns if the best order is the largest one; the bound is still valid
        try:
            epsilon = float(compute())
        except (OverflowError, ZeroDivisionError):
            return math.inf
        except (ValueError, ArithmeticError, MemoryError) as error:
            raise PrivacyError(
                f"the {accountant} accountant cannot compute the epsilon of "
                f"{' and '.join(each.describe() for each in events)} and delta {delta:g} ({error}); give "
                f"privacy.accountant=pld or a larger delta"
            ) from error
    return math.inf if math.isnan(epsilon) else epsilon
