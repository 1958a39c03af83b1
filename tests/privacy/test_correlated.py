"""The matrices of correlated noise: inverses, sensitivity against brute force, and the error of sums."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.privacy.correlated import error_of_sums, inverse_series, sensitivity, series

KINDS = [("independent", 1), ("banded", 2), ("banded", 4), ("regenerated", 2), ("regenerated", 4)]


def toeplitz(column):
    steps = len(column)
    return np.array([[column[i - j] if i >= j else 0.0 for j in range(steps)] for i in range(steps)])


@pytest.mark.parametrize(("noise", "bands"), KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_the_two_series_are_inverse_and_have_their_bands(noise, bands, steps):
    matrix = toeplitz(series(noise, bands=bands, steps=steps))
    inverse = toeplitz(inverse_series(noise, bands=bands, steps=steps))
    assert np.allclose(matrix @ inverse, np.eye(steps), atol=1e-12)
    assert (matrix >= 0).all()
    assert (np.diag(matrix) == 1).all()
    banded = inverse if noise == "regenerated" else matrix
    assert (np.tril(banded, -bands) == 0).all()


def test_with_all_bands_the_banded_matrix_is_the_square_root_of_sums():
    root = toeplitz(series("banded", bands=8, steps=8))
    assert np.allclose(root @ root, np.tril(np.ones((8, 8))))
    inverse = toeplitz(inverse_series("regenerated", bands=8, steps=8))
    assert np.allclose(inverse, np.linalg.inv(root))


@pytest.mark.parametrize(("noise", "bands"), KINDS)
@settings(max_examples=15, deadline=None)
@given(steps=st.integers(1, 9), period=st.integers(1, 5))
def test_sensitivity_is_the_largest_change_by_one_example(noise, bands, steps, period):
    matrix = toeplitz(series(noise, bands=bands, steps=steps))
    found = sensitivity(noise, bands=bands, steps=steps, period=period)
    changes = []
    for start in range(period):
        taking = [step for step in range(steps) if step % period == start]
        for signs in itertools.product((-1, 1), repeat=len(taking)):  # extreme points of gradients in one dimension
            change = np.zeros(steps)
            change[taking] = signs
            changes.append(np.linalg.norm(matrix @ change))
    assert found == pytest.approx(max(changes), abs=1e-12)
    rng = np.random.default_rng(steps)
    gradients = np.zeros((steps, 3))
    gradients[::period] = rng.standard_normal((len(gradients[::period]), 3))
    gradients[::period] /= np.linalg.norm(gradients[::period], axis=1, keepdims=True)
    assert np.linalg.norm(matrix @ gradients) <= found + 1e-12


@pytest.mark.parametrize(("noise", "bands"), KINDS)
def test_the_error_of_sums_is_that_of_the_matrices(noise, bands):
    steps = 7
    product = np.tril(np.ones((steps, steps))) @ toeplitz(inverse_series(noise, bands=bands, steps=steps))
    expected = np.sqrt((product**2).sum(1).mean())
    assert error_of_sums(noise, bands=bands, steps=steps) == pytest.approx(expected)


def test_correlated_noise_has_a_smaller_error_at_the_same_privacy_of_one_epoch():
    """Without sampling, an epoch of 1000 batches: the reason for all of this."""

    def error(noise, bands):
        scale = sensitivity(noise, bands=bands, steps=1000, period=1000)
        return scale * error_of_sums(noise, bands=bands, steps=1000)

    usual = error("independent", 1)
    assert error("banded", 4) < 0.6 * usual
    assert error("banded", 32) < error("banded", 4)
    assert error("regenerated", 4) < 0.8 * usual
    assert error("banded", 1000) < 0.15 * usual
