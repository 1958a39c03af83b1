"""Epsilon and noise compared with dp-accounting and with known values."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.privacy import (
    Event,
    Mechanism,
    PrivacyError,
    accountants,
    default_delta,
    epsilon_of,
    epsilon_of_runs,
    noise_multiplier_for,
)
from memsave.privacy.accounting import calibrated

pytest.importorskip("opacus")

CASES = [  # noise multiplier, sample rate, steps, delta
    (0.8, 5e-3, 1000, 1e-6),
    pytest.param((0.6, 0.04, 80, 7e-5), marks=pytest.mark.slow),
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


TIGHT = [(2.0, 0.1, 300, 1e-5), (30.0, 1e-3, 10**5, 1e-6), (1.0, 1.0, 1, 1e-5)]
SLOWER = [(0.3, 0.05, 50, 1e-5), (0.6, 0.04, 80, 7e-5)]


@pytest.mark.parametrize("case", [*TIGHT, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOWER)], ids=str)
def test_pld_settles_from_above_at_any_epsilon(case):
    accounting = pytest.importorskip("dp_accounting")
    noise, rate, steps, delta = case
    kwargs = {"noise_multiplier": noise, "sample_rate": rate, "steps": steps, "delta": delta}
    found = epsilon_of(**kwargs, accountant="pld")
    fine = accounting.pld.PLDAccountant(
        accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=min(1e-4, found / 1e4)
    )
    event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
    expected = fine.compose(event, steps).get_epsilon(delta)
    assert expected * 0.998 <= found <= expected * 1.005
    assert found <= epsilon_of(**kwargs, accountant="rdp")
    assert found <= epsilon_of(**kwargs, accountant="prv") * 1.001


def test_pld_of_tiny_noise_is_the_bound_of_rdp():
    kwargs = {"noise_multiplier": 1e-3, "sample_rate": 0.05, "steps": 60, "delta": 1e-5}
    assert epsilon_of(**kwargs, accountant="pld") == epsilon_of(**kwargs, accountant="rdp") > 1e6


@pytest.mark.parametrize("target", [0.01, 1.0, pytest.param(100.0, marks=pytest.mark.slow)])
def test_pld_calibrates_to_small_and_large_targets(target):
    kwargs = {"sample_rate": 0.02, "steps": 500, "delta": 1e-5}
    noise = noise_multiplier_for(target_epsilon=target, **kwargs, accountant="pld")
    assert target * 0.985 <= epsilon_of(noise_multiplier=noise, **kwargs, accountant="pld") <= target
    if target > 0.1:  # RDP cannot prove less
        assert noise <= noise_multiplier_for(target_epsilon=target, **kwargs, accountant="rdp")
    with pytest.raises(PrivacyError, match="no noise multiplier up to"):
        noise_multiplier_for(target_epsilon=1e-9, **kwargs, accountant="pld")


@pytest.mark.parametrize(
    ("target", "accountant"),
    [
        (3.0, "pld"),
        (3.0, "rdp"),
        (8.0, "rdp"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(8.0, "pld"), (8.0, "prv"), (3.0, "prv")]),
    ],
)
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
        ({"accountant": "gdp"}, "'gdp'; choose one of pld, prv, rdp"),
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
    with pytest.raises(PrivacyError, match="no noise multiplier up to 10000 keeps 100 steps"):
        noise_multiplier_for(target_epsilon=1e-9, **kwargs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_rate": 1.5}, r"sample_rate is 1\.5; it is the probability"),
        ({"sample_rate": 0.0}, "sample_rate is 0"),
        ({"delta": 0.0}, "delta is 0; it must be above 0"),
        ({"delta": 1e-18}, r"prv accountant cannot compute the epsilon of 60 steps .*delta 1e-18.*accountant=pld or"),
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


RUNS = [  # (noise multiplier, sample rate, steps) of each run, delta
    ([(1.5, 0.02, 100), (1.0, 0.01, 100)], 1e-5),
    pytest.param(([(0.6, 0.04, 80), (0.9, 0.04, 200)], 7e-5), marks=pytest.mark.slow),
    pytest.param(([(1.5, 0.02, 400), (0.8, 5e-3, 1000), (1.5, 0.02, 100)], 1e-6), marks=pytest.mark.slow),
    pytest.param(([(0.7, 0.03, 60), (20.0, 0.001, 10)], 1e-5), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_several_runs_agree_with_dp_accountings_privacy_loss_distributions(case):
    accounting = pytest.importorskip("dp_accounting")
    runs, delta = case
    pld = accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for noise, rate, steps in runs:
        event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
        pld.compose(accounting.SelfComposedDpEvent(event, steps))
    expected = pld.get_epsilon(delta)
    prv = epsilon_of_runs(runs, delta=delta, accountant="prv")
    assert expected - 1e-3 <= prv <= expected + 0.03
    assert prv < epsilon_of_runs(runs, delta=delta, accountant="rdp")
    alone = [
        epsilon_of(noise_multiplier=noise, sample_rate=rate, steps=steps, delta=delta, accountant="prv")
        for noise, rate, steps in runs
    ]
    assert max(alone) - 1e-6 <= prv < sum(alone)  # PRV rounds


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_runs_equal_one_run_of_all_their_steps(count, accountant):
    how = {"delta": 7e-5, "accountant": accountant}
    together = epsilon_of_runs([(0.9, 0.04, 50)] * count, **how)
    assert together == epsilon_of(noise_multiplier=0.9, sample_rate=0.04, steps=50 * count, **how)


mechanisms = st.tuples(st.floats(0.3, 50), st.floats(1e-4, 1), st.integers(0, 500))


@settings(max_examples=10, deadline=None)
@given(runs=st.lists(mechanisms, min_size=1, max_size=4), more=mechanisms, delta=st.floats(1e-9, 1e-3))
def test_another_run_never_makes_epsilon_smaller(runs, more, delta):
    how = {"delta": delta, "accountant": "rdp"}
    before, after = epsilon_of_runs(runs, **how), epsilon_of_runs([*runs, more], **how)
    assert before <= after
    assert after == pytest.approx(epsilon_of_runs([more, *reversed(runs)], **how), rel=1e-9)  # the order is irrelevant


def test_runs_without_steps_cost_nothing_and_a_run_without_noise_costs_everything():
    how = {"delta": 1e-5, "accountant": "prv"}
    assert epsilon_of_runs([], **how) == epsilon_of_runs([(1.0, 0.1, 0), (0.0, 0.1, 0)], **how) == 0
    assert epsilon_of_runs([(1.0, 0.1, 5), (0.0, 0.1, 1)], **how) == float("inf")


def test_many_or_expensive_mechanisms_take_the_bound_of_rdp(monkeypatch):
    monkeypatch.setattr(accountants, "prv", None)
    many = [(1.0 + 0.1 * number, 0.01, 10) for number in range(accountants.PRV_MECHANISMS + 1)]
    epsilon_of_runs(many, delta=1e-5, accountant="prv")
    assert epsilon_of_runs([(0.4, 0.05, 60)] * 9, delta=1e-5, accountant="prv") > accountants.PRV_LIMIT


@pytest.mark.parametrize(
    ("runs", "delta", "words"),
    [
        ([(1.0, 0.1, 5), (-1.0, 0.1, 5)], 1e-5, "noise_multiplier is -1"),
        ([(1.0, 0.1, 5), (1.0, 1.5, 5)], 1e-5, r"sample_rate is 1\.5"),
        ([(1.0, 0.1, 5)], 1.0, "delta is 1; it must be above 0 and below 1"),
        (
            [(1.0, 0.05, 60), (2.0, 0.1, 5)],
            1e-18,
            "60 steps with noise multiplier 1 .* and 5 steps with .* delta 1e-18",
        ),
    ],
)
def test_runs_that_cannot_be_composed_are_refused(runs, delta, words):
    with pytest.raises(PrivacyError, match=words):
        epsilon_of_runs(runs, delta=delta, accountant="prv")


def test_the_example_of_several_runs_in_the_document_holds():
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    (stated,) = re.findall(r"three runs of `experiment=gpt2_dp` with epsilon 3 spend (\S+) together", page)
    size, batch_size, steps = 6000, 256, 60  # of the experiment
    how = {"delta": default_delta(size)}
    noise = noise_multiplier_for(target_epsilon=3, sample_rate=batch_size / size, steps=steps, **how)
    assert epsilon_of_runs([(noise, batch_size / size, steps)] * 3, **how) == pytest.approx(float(stated), abs=5e-3)


def test_events_are_described_in_words():
    assert Event(1.5, 0.1, 20).describe() == "20 steps with noise multiplier 1.5 at sample rate 0.1"
    truncated = Event(1.0, 0.1, 5, largest_batch=30, size=100)
    assert truncated.describe() == "5 steps with noise multiplier 1 at sample rate 0.1 with at most 30 examples"
    assert Event(1.0, 0.25, 3, bins=4).describe() == "3 epochs with noise multiplier 1 at sample rate 0.25"


def test_calibration_ends_where_epsilon_jumps_over_the_target():
    found = calibrated(lambda noise_multiplier: 9.0 if noise_multiplier < 2 else 1.0, target_epsilon=5.0, what="")
    assert 2 <= found <= 2.002
