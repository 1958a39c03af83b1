"""The privacy loss of balls in bins, compared with quadrature, with sampling, and with what is known of its limits."""

import math

import numpy as np
import pytest

from memsave.privacy import Event, Mechanism, epsilon_of, epsilon_of_events

distributions = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
pytest.importorskip("opacus")

from memsave.privacy.allocation import epoch_distribution  # noqa: E402

FINE = 1e-3


def deltas(sigma, bins, epsilon):
    """(with the example, without it): upper bounds of the two divergences of an epoch."""
    found = epoch_distribution(sigma, bins, interval=FINE)
    return (
        found._pmf_remove.get_delta_for_epsilon(epsilon),
        found._pmf_add.get_delta_for_epsilon(epsilon),
    )


def by_quadrature(sigma, epsilon):
    """The two divergences for two bins, by a dense grid over both coordinates."""
    z = np.linspace(-9, 9, 3001)
    mass = np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    u = np.exp(z / sigma - 0.5 / sigma**2)
    ratio, both = (u[:, None] + u) / 2, mass[:, None] * mass
    return (
        (both * np.clip(ratio - math.exp(epsilon), 0, None)).sum(),
        (both * np.clip(1 - math.exp(epsilon) * ratio, 0, None)).sum(),
    )


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 0.5), (2.0, 0.2)])
def test_an_epoch_of_two_batches_agrees_with_quadrature_from_above(sigma, epsilon):
    for found, exact in zip(deltas(sigma, 2, epsilon), by_quadrature(sigma, epsilon), strict=True):
        assert exact * 0.9999 <= found <= exact * 1.002


@pytest.mark.parametrize(
    ("sigma", "bins", "epsilon"), [(0.7, 50, 0.7), pytest.param(0.5, 100, 1.0, marks=pytest.mark.slow)]
)
def test_an_epoch_of_many_batches_agrees_with_sampling(sigma, bins, epsilon):
    rng, count = np.random.default_rng(0), 100_000
    z = rng.standard_normal((count, bins))
    without = np.exp(z / sigma - 0.5 / sigma**2).mean(1)
    z[:, 0] += 1 / sigma
    present = np.exp(z / sigma - 0.5 / sigma**2).mean(1)
    samples = np.clip(1 - math.exp(epsilon) / present, 0, None), np.clip(1 - math.exp(epsilon) * without, 0, None)
    for found, each in zip(deltas(sigma, bins, epsilon), samples, strict=True):
        error = each.std() / math.sqrt(count)
        assert each.mean() - 4 * error <= found <= each.mean() * 1.05 + 4 * error


def test_one_batch_is_the_gaussian_mechanism():
    found = epoch_distribution(1.3, 1, interval=FINE).get_delta_for_epsilon(0.7)
    assert found == distributions.from_gaussian_mechanism(
        1.3, value_discretization_interval=FINE
    ).get_delta_for_epsilon(0.7)


def test_epsilon_lies_below_that_of_poisson_batches_and_of_known_bins():
    """Chua et al. (2024) and Feldman and Shenfeld (2025) report that balls in bins spend less than Poisson sampling."""
    sigma, bins, epochs, delta = 0.8, 20, 5, 1e-5
    found = epsilon_of_events([Event(sigma, 1 / bins, epochs, bins=bins)], delta=delta)
    poisson = epsilon_of(noise_multiplier=sigma, sample_rate=1 / bins, steps=epochs * bins, delta=delta)
    assert 0.7 * poisson < found < poisson
    assert found < epsilon_of(noise_multiplier=sigma, sample_rate=1.0, steps=epochs, delta=delta)


def test_a_part_of_an_epoch_counts_as_a_whole_one():
    mechanism = Mechanism(1000, 50, 1.0, 1.0, delta=1e-5, sampler="balls_in_bins")
    assert mechanism.bins == 20
    assert mechanism.epsilon(1) == mechanism.epsilon(20) < mechanism.epsilon(21) == mechanism.epsilon(40)
