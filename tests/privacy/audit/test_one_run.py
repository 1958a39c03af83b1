"""Lower bounds from one run: against brute force, hand-computed values, and mechanisms of known epsilon."""

import itertools
import math

import numpy as np
import pytest

from memsave.privacy.audit import TradeOff, epsilon_of_guesses, gaussian_trade_off, p_value, refutes
from memsave.privacy.audit.one_run import epsilon_of_run, guess, guess_counts, largest, run_refutes

pytest.importorskip("scipy")


def tail(count, probability, least):
    return sum(
        math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(max(0, least), count + 1)
    )


@pytest.mark.parametrize(("guesses", "correct", "epsilon"), [(5, 5, 0.0), (8, 6, 1.0), (12, 7, 0.3), (6, 0, 2.0)])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_p_value_is_that_of_theorem_5_2(guesses, correct, epsilon, delta):
    probability = math.exp(epsilon) / (1 + math.exp(epsilon))
    own = tail(guesses, probability, correct)
    slopes = [(tail(guesses, probability, correct - i) - own) / i for i in range(1, correct + 1)]
    expected = own + 2 * 20 * delta * max([0.0, *slopes])
    found = p_value(canaries=20, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(min(1.0, expected), rel=1e-9)


def test_the_epsilon_of_right_guesses_alone_is_that_of_the_equation():
    """p^r = 0.05 for r right guesses of r, with p = e^epsilon / (1 + e^epsilon)."""
    p = 0.05 ** (1 / 40)
    found = epsilon_of_guesses(canaries=40, guesses=40, correct=40, delta=0.0, significance=0.05)
    assert found == pytest.approx(math.log(p / (1 - p)), abs=1e-3)


def test_epsilon_grows_with_right_guesses_and_shrinks_with_delta_and_confidence():
    options = {"canaries": 100, "guesses": 50, "delta": 1e-5, "significance": 0.05}
    bounds = [epsilon_of_guesses(**options, correct=correct) for correct in range(20, 51)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0 < bounds[-1]
    surer = epsilon_of_guesses(**{**options, "significance": 0.001}, correct=45)
    looser = epsilon_of_guesses(**{**options, "delta": 1e-3}, correct=45)
    assert max(surer, looser) < epsilon_of_guesses(**options, correct=45)


def test_all_numbers_of_guesses_are_fixed_by_the_number_of_canaries():
    assert guess_counts(100) == [(50, 50), (50, 0), (25, 25), (25, 0), (12, 12), (12, 0)]
    assert guess_counts(5) == [(2, 3), (2, 0)]
    assert all(high + low <= m for m in range(2, 300) for high, low in guess_counts(m))


def test_guesses_are_counted_by_rank_and_ties_reveal_nothing():
    outcome = guess([0.1, 3.0, 2.0, -1.0], [False, True, False, False])
    assert [(one.included, one.excluded, one.correct) for one in outcome] == [(2, 2, 3), (2, 0, 1)]
    included = [True, False, False, True]
    assert guess([7.0] * 4, included)[1].correct == 1  # the first two, whatever was included


def test_randomized_response_is_never_shown_to_spend_more_than_its_epsilon():
    """400 audits at 95% confidence: 20 may exceed epsilon; more than 36 would have a probability below 0.001."""
    chance, epsilon, canaries = np.random.default_rng(0), 1.0, 200
    above, bounds = 0, []
    for _ in range(400):
        included = chance.random(canaries) < 0.5
        kept = chance.random(canaries) < math.exp(epsilon) / (1 + math.exp(epsilon))
        bound = epsilon_of_run(
            guess(np.where(kept, included, ~included), included), canaries=canaries, delta=0.0, significance=0.05
        )
        bounds.append(bound)
        above += bound > epsilon
    assert above <= 36
    assert np.median(bounds) > 0.4  # and it shows a good part of it


def test_scores_without_information_show_nothing_in_19_of_20_audits():
    chance, canaries = np.random.default_rng(1), 200
    outcomes = [guess(chance.random(canaries), chance.random(canaries) < 0.5) for _ in range(400)]
    options = {"canaries": canaries, "significance": 0.05}
    assert sum(epsilon_of_run(one, delta=1e-5, **options) > 0 for one in outcomes) <= 36
    assert sum(run_refutes(gaussian_trade_off(1e-3), one, **options) for one in outcomes) <= 36


def brute_force(trade_off, *, canaries, guesses, correct, significance):
    """Algorithm 3 of Mahloujifar et al. with arrays, as it stands in the paper."""
    h, r = [0.0] * (correct + 1), [0.0] * (correct + 1)
    h[correct], r[correct] = significance * (guesses - correct) / canaries, significance * correct / canaries
    for i in range(correct - 1, -1, -1):
        h[i] = max(h[i + 1], trade_off(1 - r[i + 1]))
        r[i] = min(1.0, r[i + 1] + i / (guesses - i) * (h[i] - h[i + 1]))
    return r[0] + h[0] > guesses / canaries


def test_the_recursion_of_f_dp_is_that_of_the_paper():
    answers = set()
    for guesses, correct, mu in itertools.product((10, 30), (10, 8, 5), (0.01, 0.5, 2.0)):
        options = {"canaries": 40, "guesses": guesses, "correct": correct * guesses // 10, "significance": 0.05}
        found = refutes(gaussian_trade_off(mu), **options)
        assert found == brute_force(gaussian_trade_off(mu), **options)
        answers.add(found)
    assert answers == {True, False}


def test_gaussian_scores_are_never_shown_to_have_a_larger_mu_and_f_dp_shows_more_than_one_epsilon():
    chance, canaries, mu = np.random.default_rng(2), 400, 2.0
    above, shown = 0, []
    for _ in range(60):
        included = chance.random(canaries) < 0.5
        outcomes = guess(mu * included + chance.standard_normal(canaries), included)
        options = {"canaries": canaries, "significance": 0.05}
        above += run_refutes(gaussian_trade_off(mu), outcomes, **options)
        shown.append(run_refutes(gaussian_trade_off(mu / 4), outcomes, **options))
    assert above <= 8
    assert np.mean(shown) > 0.9


def test_a_trade_off_function_of_one_epsilon_is_that_of_the_definition():
    found = TradeOff([math.log(3)], [0.1])
    assert found(0.1) == pytest.approx(1 - 0.1 - 3 * 0.1)
    assert found(0.6) == pytest.approx((1 - 0.1 - 0.6) / 3)
    assert found(0.95) == 0.0


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_the_gaussian_trade_off_function_is_close_to_and_below_the_exact_one(mu):
    from scipy.stats import norm

    found = gaussian_trade_off(mu)
    for alpha in (0.01, 0.2, 0.5, 0.9):
        exact = norm.cdf(norm.ppf(1 - alpha) - mu)
        assert exact - 2e-3 <= found(alpha) <= exact + 1e-12


def test_a_sampled_mechanism_at_a_rate_close_to_one_has_almost_the_trade_off_function_of_the_gaussian():
    pytest.importorskip("dp_accounting")
    from memsave.privacy.audit import mechanism_trade_off

    found = mechanism_trade_off(noise_multiplier=1.5, sample_rate=1 - 1e-9, steps=3)
    exact = mechanism_trade_off(noise_multiplier=1.5, sample_rate=1.0, steps=3)
    for alpha in (0.02, 0.3, 0.7):
        assert found(alpha) == pytest.approx(exact(alpha), abs=1e-4)
        assert mechanism_trade_off(noise_multiplier=1.5, sample_rate=0.1, steps=3)(alpha) > exact(alpha)


def test_the_largest_refuted_number():
    assert largest(lambda x: x < 3.7, most=100) == pytest.approx(3.7, abs=1e-3)
    assert largest(lambda x: False, most=100) == 0.0
    assert largest(lambda x: True, most=100) == 100
