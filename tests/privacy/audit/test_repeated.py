"""Lower bounds from many runs: the Clopper-Pearson bound, and mechanisms of known epsilon."""

import math

import numpy as np
import pytest

from memsave.privacy.audit import ErrorRates, error_rates, gaussian_trade_off, repeated
from memsave.privacy.audit.repeated import upper_bound

pytest.importorskip("scipy")


def test_the_upper_bound_of_no_events_is_that_of_the_equation():
    """(1 - p)^n = 0.05."""
    assert upper_bound(0, 30, significance=0.05) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert upper_bound(30, 30, significance=0.05) == 1.0


def test_epsilon_is_that_of_the_error_rates_in_either_direction():
    assert ErrorRates((0.1,), (0.4,), (1, 1)).epsilon(0.0) == pytest.approx(math.log(6))
    assert ErrorRates((0.4,), (0.1,), (1, 1)).epsilon(0.0) == pytest.approx(math.log(6))
    assert ErrorRates((0.1, 0.3), (0.4, 0.3), (1, 1)).epsilon(0.1) == pytest.approx(math.log(5))
    assert ErrorRates((0.6,), (0.6,), (1, 1)).epsilon(0.0) == 0.0


def test_error_rates_refute_the_gaussian_mechanisms_that_cannot_have_them():
    rates = ErrorRates((0.2,), (0.2,), (1, 1))  # mu = 2 * 0.8416
    assert rates.refute(gaussian_trade_off(1.6))
    assert not rates.refute(gaussian_trade_off(1.75))


def test_gaussian_scores_are_shown_to_have_most_of_their_mu_and_no_more():
    chance, mu, above, shown = np.random.default_rng(0), 2.0, 0, 0
    for _ in range(60):
        present, absent = mu + chance.standard_normal(200), chance.standard_normal(200)
        rates = error_rates(present, absent, delta=1e-5, significance=0.05)
        above += rates.refute(gaussian_trade_off(mu))
        shown += rates.refute(gaussian_trade_off(0.6 * mu))
    assert above <= 8
    assert shown >= 50


def test_the_bounds_of_two_thresholds_share_the_significance(monkeypatch):
    monkeypatch.setattr(repeated, "_thresholds", lambda *_, delta: (0.25, 0.75))
    found = error_rates(np.ones(100), np.zeros(100), delta=0.0, significance=0.05)
    bound = upper_bound(0, 80, significance=0.05 / 4)  # a fifth of the scores chooses the thresholds
    assert found.false_positive == found.false_negative == (bound, bound)
    assert found.runs == (80, 80)


def test_scores_without_information_show_nothing():
    chance = np.random.default_rng(1)
    rates = [error_rates(*chance.random((2, 100)), delta=1e-5, significance=0.05) for _ in range(60)]
    assert sum(each.epsilon(1e-5) > 0 for each in rates) <= 8
