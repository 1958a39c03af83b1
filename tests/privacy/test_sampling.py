"""Each sampler draws batches with the distribution that its accounting assumes."""

import numpy as np
import pytest
import torch

from memsave.privacy import Mechanism
from memsave.privacy.randomness import SecretStream
from memsave.privacy.sampling import Sampler

SIZE = 40
SAMPLERS = {
    "poisson": {"batch_size": 12},
    "truncated_poisson": {"batch_size": 12, "largest_batch": 13},
    "balls_in_bins": {"batch_size": 10},
    "cyclic": {"batch_size": 10},
    "cyclic_poisson": {"batch_size": 5, "noise": "banded", "bands": 4},
}


def mechanism(sampler, **changes):
    kwargs = {**SAMPLERS[sampler], **changes}
    size, batch_size = kwargs.pop("size", SIZE), kwargs.pop("batch_size")
    return Mechanism(size, batch_size, 1.0, 1.0, delta=0.5 / size, sampler=sampler, **kwargs)


def drawn(sampler, count, *, seed=0, **changes):
    """(count, n): whether each example is in each batch."""
    how = mechanism(sampler, **changes)
    source, found = Sampler(how, SecretStream(seed)), np.zeros((count, how.size))
    for row in found:
        batch = source.draw()
        assert batch == sorted({*batch})
        row[batch] = 1
    return found


def test_poisson_batches_contain_each_example_independently_with_the_sample_rate():
    found = drawn("poisson", 4000)
    assert abs(found.mean(0) - 0.3).max() < 0.04
    assert found.sum(1).var() == pytest.approx(SIZE * 0.3 * 0.7, rel=0.15)  # binomial, unlike a shuffled epoch
    pairs = found.T @ found / 4000
    np.fill_diagonal(pairs, 0.09)
    assert abs(pairs - 0.09).max() < 0.03


def test_truncated_batches_are_poisson_batches_of_which_a_random_part_is_left_out():
    plain, found = drawn("poisson", 3000), drawn("truncated_poisson", 3000)
    assert found.sum(1).max() == 13
    sizes = np.minimum(plain.sum(1), 13)
    assert 0.2 < (sizes == 13).mean() < 0.6
    for size in (9, 11, 13):
        assert (found.sum(1) == size).mean() == pytest.approx((sizes == size).mean(), abs=0.05)
    assert np.ptp(found.mean(0)) < 0.06  # no example is left out more often


@pytest.mark.parametrize("sampler", ["balls_in_bins", "cyclic"])
def test_each_epoch_holds_each_example_once(sampler):
    found = drawn(sampler, 400).reshape(100, 4, SIZE)
    assert (found.sum(1) == 1).all()
    assert found.sum(2).std() > 1  # sizes are random
    same = (found[1:] == found[:-1]).all((1, 2))
    assert same.all() if sampler == "cyclic" else not same.any()
    if sampler == "balls_in_bins":
        assert abs(found.mean(0) - 0.25).max() < 0.2
        together = np.einsum("eti,etj->ij", found, found) / 100
        np.fill_diagonal(together, 0.25)
        assert abs(together - 0.25).max() < 0.2  # balls fall independently of each other


def test_cyclic_poisson_batches_come_from_one_group_after_the_other():
    found = drawn("cyclic_poisson", 4000).reshape(1000, 4, SIZE)
    groups = found.sum(0) > 0  # (4, n)
    assert (groups.sum(0) == 1).all()
    assert abs(found.mean(0)[groups] - 0.5).max() < 0.08


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_a_sampler_continues_with_the_same_batches(sampler, steps):
    first = Sampler(mechanism(sampler), SecretStream())
    for _ in range(steps):
        first.draw()
    state = first.get_state()
    second = Sampler(mechanism(sampler), SecretStream())
    second.set_state(state)
    assert (second.get_state() == state).all()
    assert [first.draw() for _ in range(9)] == [second.draw() for _ in range(9)]


def test_batches_may_be_empty_or_contain_everything():
    rare = drawn("poisson", 40, size=20, batch_size=1)
    assert (rare.sum(1) == 0).any()
    assert drawn("poisson", 3, size=3, batch_size=3).all()
    assert drawn("balls_in_bins", 3, size=3, batch_size=3).all()
    assert drawn("truncated_poisson", 3, size=3, batch_size=3, largest_batch=3).all()


def test_the_default_device_does_not_change_the_batches():
    with torch.device("meta"):  # a device on which no value could be drawn
        assert (drawn("poisson", 2) == drawn("poisson", 2)).all()
