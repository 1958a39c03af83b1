"""`Mechanism`: which combinations have an epsilon, and what it is."""

import dataclasses

import pytest

from memsave.privacy import Event, Mechanism, PrivacyError, epsilon_of, epsilon_of_events
from memsave.privacy.mechanism import SAMPLERS_OF

pytest.importorskip("opacus")
pld = pytest.importorskip("dp_accounting.pld")
dp_accounting = pytest.importorskip("dp_accounting")

BASE = {"size": 1000, "batch_size": 50, "noise_multiplier": 1.0, "max_grad_norm": 0.1, "delta": 1e-5}
OF_SAMPLER = {"truncated_poisson": {"largest_batch": 80}}
OF_NOISE = {"independent": {}, "banded": {"bands": 4}, "regenerated": {"bands": 4}}
COMBINATIONS = [(noise, sampler) for noise, samplers in SAMPLERS_OF.items() for sampler in samplers]
ALL_SAMPLERS = sorted({sampler for _, sampler in COMBINATIONS})


def make(noise="independent", sampler="poisson", **changes):
    return Mechanism(
        **{**BASE, "noise": noise, "sampler": sampler, **OF_NOISE[noise], **OF_SAMPLER.get(sampler, {}), **changes}
    )


@pytest.mark.parametrize(("noise", "sampler"), [(n, s) for n in OF_NOISE for s in ALL_SAMPLERS])
def test_each_combination_has_an_epsilon_or_is_refused_with_the_ones_that_have(noise, sampler):
    if (noise, sampler) in COMBINATIONS:
        epsilons = [make(noise, sampler).epsilon(steps) for steps in (1, 40, 400)]
        assert 0 < epsilons[0] <= epsilons[1] < epsilons[2] < 1000
    else:
        with pytest.raises(PrivacyError, match=f"no epsilon is known for noise={noise} with sampler={sampler}; give"):
            make(noise, sampler)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "shuffled"}, "sampler=shuffled; give sampler=poisson or truncated_poisson"),
        ({"noise": "pink"}, "noise is 'pink'; choose one of independent, banded"),
        (
            {"sampler": "truncated_poisson", "largest_batch": 80, "accountant": "prv"},
            "prv has no bound for sampler=trunc",
        ),
        ({"sampler": "balls_in_bins", "accountant": "rdp"}, "rdp has no bound for sampler=balls_in_bins"),
        ({"sampler": "truncated_poisson"}, "give largest_batch with sampler=truncated_poisson"),
        ({"largest_batch": 80}, "give largest_batch with sampler=truncated_poisson, and with no other"),
        (
            {"sampler": "truncated_poisson", "largest_batch": 49},
            "largest_batch is 49; give at least the batch size, 50",
        ),
        ({"sampler": "truncated_poisson", "largest_batch": 1001}, "largest_batch is 1001.* at most the 1000 examples"),
        ({"bands": 3}, "bands is 3 with noise=independent; give 1"),
        ({"noise": "banded", "sampler": "cyclic"}, "bands is 1 with noise=banded; give .* 2 or more"),
        ({"noise": "banded", "sampler": "cyclic_poisson", "bands": 21}, "cannot be drawn from 21 groups"),
    ],
    ids=str,
)
def test_what_has_no_guarantee_is_refused(changes, words):
    with pytest.raises(PrivacyError, match=words):
        Mechanism(**{**BASE, **changes})


def test_a_batch_may_be_as_large_as_its_group():
    assert Mechanism(**{**BASE, "noise": "banded", "sampler": "cyclic_poisson", "bands": 20}).bins == 20


def test_truncation_makes_epsilon_larger_and_vanishes_for_large_limits():
    """A removed example may let another one into a full batch, so two gradients may differ."""
    plain = make().epsilon(100)
    close = make(sampler="truncated_poisson", largest_batch=200).epsilon(100)
    assert plain == pytest.approx(close, rel=1e-3)
    tight = make(sampler="truncated_poisson", largest_batch=52).epsilon(100)
    assert tight > 1.02 * plain


def test_truncated_poisson_agrees_with_dp_accounting():
    found = make(sampler="truncated_poisson", largest_batch=60).epsilon(100)
    event = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(1001, 0.05, 60, 1.0)
    fine = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    expected = fine.compose(event, 100).get_epsilon(1e-5)
    assert expected * 0.998 <= found <= expected * 1.005


def test_cyclic_batches_are_not_amplified():
    found = make(sampler="cyclic").epsilon(400)  # every example in each 20th batch
    assert found == epsilon_of(noise_multiplier=1.0, sample_rate=1.0, steps=20, delta=1e-5)
    assert found > 2 * make().epsilon(400)


def test_banded_noise_with_one_participation_is_one_gaussian_mechanism():
    found = make("banded", "cyclic").epsilon(20)
    norm = sum(each**2 for each in (1, 1 / 2, 3 / 8, 5 / 16)) ** 0.5  # of the coefficients of (1 - x)^(-1/2)
    assert found == epsilon_of(noise_multiplier=1 / norm, sample_rate=1.0, steps=1, delta=1e-5)


def test_cyclic_poisson_batches_are_amplified_within_their_group():
    found = make("banded", "cyclic_poisson").epsilon(400)
    norm = sum(each**2 for each in (1, 1 / 2, 3 / 8, 5 / 16)) ** 0.5
    assert found == epsilon_of(noise_multiplier=1 / norm, sample_rate=0.2, steps=100, delta=1e-5)


@pytest.mark.parametrize(
    ("noise", "sampler"),
    [("independent", "poisson"), ("regenerated", "cyclic"), ("banded", "cyclic_poisson")],
)
def test_calibrated_noise_spends_the_target_and_no_more(noise, sampler):
    found = make(noise, sampler).calibrated(3.0, steps=200)
    assert 2.98 <= found.epsilon(200) <= 3.0
    assert dataclasses.replace(found, noise_multiplier=1.0) == make(noise, sampler)


def test_the_curve_falls_with_delta_and_passes_through_epsilon():
    mechanism = make()
    deltas = [1e-7, 1e-6, 1e-5, 1e-4]
    found = mechanism.curve(200, deltas)
    assert found == sorted(found, reverse=True)
    assert found[2] == pytest.approx(mechanism.epsilon(200), rel=5e-3)
    assert make(noise_multiplier=0.0).curve(3, deltas) == [float("inf")] * 4
    assert mechanism.curve(0, deltas) == [0.0] * 4


def test_different_events_compose_to_less_than_the_sum_of_their_epsilons():
    mechanisms = [make(), make(sampler="truncated_poisson"), make("regenerated", "cyclic")]
    alone = [each.epsilon(40) for each in mechanisms]
    found = epsilon_of_events([event for each in mechanisms for event in each.events(40)], delta=1e-5)
    assert max(alone) < found < sum(alone)


def test_the_error_of_correlated_noise_is_smaller_where_sampling_does_not_help():
    usual, banded = make(sampler="cyclic"), make("banded", "cyclic")
    errors = [each.calibrated(3.0, steps=20).error_of_sums(20) for each in (usual, banded)]
    assert errors[1] < 0.8 * errors[0]


def test_equal_events_are_one():
    one = [Event(1.0, 0.1, 30)]
    assert epsilon_of_events([Event(1.0, 0.1, 10), Event(1.0, 0.1, 20)], delta=1e-5) == epsilon_of_events(
        one, delta=1e-5
    )
