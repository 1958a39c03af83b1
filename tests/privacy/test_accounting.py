"""Epsilon and noise compared with dp-accounting and with known values."""

import pytest

from memsave.privacy import Mechanism, PrivacyError, default_delta, epsilon_of, noise_multiplier_for

pytest.importorskip("opacus")

CASES = [  # noise multiplier, sample rate, steps, delta
    (0.8, 5e-3, 1000, 1e-6),
    (0.6, 0.04, 80, 7e-5),
    (2.0, 0.1, 300, 1e-5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prv_agrees_with_dp_accountings_privacy_loss_distributions_and_rdp_lies_above(case):
    accounting = pytest.importorskip("dp_accounting")
    noise, rate, steps, delta = case
    kwargs = {"noise_multiplier": noise, "sample_rate": rate, "steps": steps, "delta": delta}
    event = accounting.SelfComposedDpEvent(
        accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise)), steps
    )
    pld = accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event)
    expected = pld.get_epsilon(delta)
    prv = epsilon_of(**kwargs, accountant="prv")
    assert expected - 1e-3 <= prv <= expected + 0.03
    assert prv < epsilon_of(**kwargs, accountant="rdp")


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("target", [8.0, 3.0])
def test_calibrated_noise_spends_the_target_and_no_more(target, accountant):
    kwargs = {"sample_rate": 256 / 6000, "steps": 80, "delta": default_delta(6000), "accountant": accountant}
    noise = noise_multiplier_for(target_epsilon=target, **kwargs)
    assert target - 0.02 <= epsilon_of(noise_multiplier=noise, **kwargs) <= target


def test_epsilon_is_zero_without_steps_and_infinite_without_noise():
    kwargs = {"sample_rate": 0.1, "delta": 1e-5, "accountant": "prv"}
    assert epsilon_of(noise_multiplier=1.0, steps=0, **kwargs) == 0
    assert epsilon_of(noise_multiplier=0.0, steps=1, **kwargs) == float("inf")


@pytest.mark.parametrize("rate", [1.5, 0.0, -0.1, float("nan")])
def test_a_sample_rate_outside_zero_to_one_is_refused(rate):
    kwargs = {"sample_rate": rate, "steps": 10, "delta": 1e-5, "accountant": "prv"}
    with pytest.raises(PrivacyError, match=rf"sample_rate is {rate:g}; .* above 0 and at most 1"):
        epsilon_of(noise_multiplier=1.0, **kwargs)
    with pytest.raises(PrivacyError, match=rf"sample_rate is {rate:g}"):
        noise_multiplier_for(target_epsilon=3.0, **kwargs)


def test_epsilon_grows_with_every_step():
    mechanism = Mechanism(1000, 100, 1.0, 0.1, delta=1e-5)
    assert 0 < mechanism.epsilon(10) < mechanism.epsilon(20) < mechanism.epsilon(40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.01}, r"delta is 0\.01 for 100 examples.*below 1/n = 0\.01.*n\^-1\.1 = 0\.00631"),
        ({"delta": 0.0}, "must be above 0"),
        ({"batch_size": 101}, "batch size is 101 for 100 examples; give one from 1 to 100"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1; give a finite number of 0 or more"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier is inf; give a finite number"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier is nan; give a finite number"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf; give a finite number above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0; give a finite number above 0"),
        ({"accountant": "gdp"}, "'gdp'; choose one of prv, rdp"),
    ],
    ids=str,
)
def test_parameters_without_a_guarantee_are_refused(options, words):
    with pytest.raises(PrivacyError, match=words):
        Mechanism(
            **{"size": 100, "batch_size": 10, "noise_multiplier": 1.0, "max_grad_norm": 0.1, "delta": 1e-4, **options}
        )


def test_unreachable_targets_are_refused():
    kwargs = {
        "sample_rate": 1.0,
        "steps": 100,
        "delta": 1e-5,
        "accountant": "rdp",
    }  # the rate with the fastest accounting
    with pytest.raises(PrivacyError, match="target_epsilon is 0; give a positive one"):
        noise_multiplier_for(target_epsilon=0, **kwargs)
    with pytest.raises(PrivacyError, match="no noise multiplier keeps 100 steps"):
        noise_multiplier_for(target_epsilon=1e-9, **kwargs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_rate": 1.5}, r"sample_rate is 1\.5; it is the probability"),
        ({"sample_rate": 0.0}, "sample_rate is 0"),
        ({"delta": 0.0}, "delta is 0; it must be above 0"),
        ({"delta": 1e-18}, r"prv accountant cannot compute the epsilon of 60 steps .*delta 1e-18.*accountant=rdp or"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier is nan"),
    ],
    ids=str,
)
def test_an_epsilon_that_cannot_be_computed_raises_privacy_error(options, words):
    with pytest.raises(PrivacyError, match=words):
        epsilon_of(
            **{"noise_multiplier": 1.0, "sample_rate": 0.05, "steps": 60, "delta": 1e-5, "accountant": "prv"} | options
        )


def test_tiny_noise_is_fast_and_huge_noise_does_not_fail():
    kwargs = {"sample_rate": 0.05, "steps": 60, "delta": 1e-5, "accountant": "prv"}
    epsilons = [
        epsilon_of(noise_multiplier=noise, **kwargs) for noise in (5e-324, 1e-200, 1e-3, 0.1, 0.4, 1.0, 1e4, 1e8)
    ]
    assert epsilons[:2] == [float("inf")] * 2
    assert epsilons == sorted(epsilons, reverse=True)
    assert epsilons[2] > 1e6
    assert 1000 < epsilons[3] < 2000  # PRV would take 10 s and 1 GB for 596
    assert epsilon_of(noise_multiplier=1.0, **{**kwargs, "steps": 10**5}) > 100  # PRV would take 8 GB


def test_calibration_to_a_large_target_is_fast():
    kwargs = {"sample_rate": 0.05, "steps": 60, "delta": 1e-5, "accountant": "prv"}
    noise = noise_multiplier_for(target_epsilon=1000, **kwargs)
    assert 990 <= epsilon_of(noise_multiplier=noise, **kwargs) <= 1000
