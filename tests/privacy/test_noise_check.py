"""The check of the noise in every step: missing, wrong and repeated noise, also after a checkpoint."""

import math

import pytest
import torch
from torch import nn

from memsave.privacy import Mechanism, PrivacyError, PrivateGradients
from memsave.privacy.noise import GaussianNoise
from memsave.privacy.noise_check import NoiseCheck

pytest.importorskip("opacus")


def model_of(*, width=40, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width, bias=bias), nn.Tanh(), nn.Linear(width, 3, bias=bias))


def private_of(*, sigma=1.0, **shape):
    return PrivateGradients(model_of(**shape), Mechanism(30, 30, sigma, 0.5, delta=1e-3), seed=0)


X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))


def take_steps(private, count):
    for _, indices in zip(range(count), private.batches(), strict=False):
        private.model.zero_grad()
        if indices:
            private.backward(private.model(X[indices]).square().sum(1))
        private.finish()


def test_honest_noise_of_any_size_passes():
    for sigma in (0.0, 1e-200, 1e-9, 0.3, 100.0):
        take_steps(private_of(sigma=sigma), 6)
    take_steps(private_of(width=1, bias=False), 40)  # 8 parameters


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_noise_of_another_size_is_found(factor, monkeypatch):
    add = GaussianNoise.add_
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, *, std: add(self, std=factor * std))
    with pytest.raises(PrivacyError, match=rf"{factor - 0.05:.1f}|{factor:.1f}\d* times the standard deviation"):
        take_steps(private_of(), 120)


def test_a_parameter_without_noise_is_named_in_its_first_step(monkeypatch):
    add = GaussianNoise.add_

    def add_to_others(self, *, std):
        everything, self.parameters = self.parameters, self.parameters[1:]
        add(self, std=std)
        self.parameters = everything

    monkeypatch.setattr(GaussianNoise, "add_", add_to_others)
    with pytest.raises(PrivacyError, match=r"^0\.weight got no noise"):
        take_steps(private_of(), 1)


def test_a_step_without_private_noise_cannot_be_taken(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, *, std: None)
    private = private_of()
    optimizer = torch.optim.SGD(private.model.parameters(), 0.1)
    with pytest.raises(PrivacyError, match="got no noise"):
        take_steps(private, 1)
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()


def test_a_parameter_of_one_element_needs_several_unchanged_steps():
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    check = NoiseCheck([parameter], ["scale"])
    for _ in range(7):
        check.before()
        check.after(1.0)
    with pytest.raises(PrivacyError, match="scale got no noise"):
        check.before()
        check.after(1.0)


def test_elements_of_all_of_a_large_parameter_are_read():
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    check = NoiseCheck([parameter], ["weight"])
    check.before()
    (places,) = check._positions
    assert (len(places.unique()), places[0], places[-1]) == (64, 0, 999)
    assert places.diff().max() <= 16


def test_sums_over_many_steps_are_not_rounded():
    parameter = nn.Parameter(torch.zeros(1))
    check = NoiseCheck([parameter], ["scale"])
    check._squares += 2.0**30
    check._counts += 2.0**30
    parameter.grad = torch.zeros(1)
    check.before()
    parameter.grad += 1
    check.after(1.0)
    assert check._squares.item() == check._counts.item() == 2.0**30 + 1


@pytest.mark.parametrize(("value", "std"), [(1e8, 1e-3), (0.0, 1e-46)])
def test_noise_below_the_last_digit_is_no_fault(value, std):
    parameter = nn.Parameter(torch.zeros(100))
    parameter.grad = torch.full((100,), value)
    check = NoiseCheck([parameter], ["weight"])
    for _ in range(10):
        check.before()
        check.after(std)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 1000.0])
def test_the_noise_of_an_earlier_step_is_found(sigma):
    private = private_of(sigma=sigma)
    take_steps(private, 1)
    state = private._noise.stream.get_state()
    take_steps(private, 3)
    private._noise.stream.set_state(state)
    with pytest.raises(PrivacyError, match="the noise of this step is that of step 2"):
        take_steps(private, 1)


def test_noise_from_before_a_checkpoint_is_found_and_continuing_it_is_no_fault():
    private, resumed = private_of(), private_of()
    before = private._noise.stream.get_state()
    take_steps(private, 4)
    state = private.state_dict()
    assert state["noise_check"].shape == (4, 8)
    resumed.load_state_dict(state)
    take_steps(resumed, 2)
    resumed.load_state_dict(state)  # back to the checkpoint
    take_steps(resumed, 2)
    resumed._noise.stream.set_state(before)
    with pytest.raises(PrivacyError, match="that of step 1,"):
        take_steps(resumed, 1)


def test_any_number_of_steps_is_remembered():
    parameter = nn.Parameter(torch.zeros(50))
    check, generator = NoiseCheck([parameter], ["weight"]), torch.Generator().manual_seed(0)
    for step in range(270):
        parameter.grad = torch.zeros(50)
        check.before()
        parameter.grad += torch.randn(50, generator=generator.manual_seed(200) if step == 269 else generator)
        if step == 200:
            generator.manual_seed(200)
        if step < 269:
            check.after(1.0)
    with pytest.raises(PrivacyError, match="that of step 202,"):
        check.after(1.0)


def test_a_checkpoint_of_an_earlier_version_has_no_noise_to_compare():
    private = private_of()
    take_steps(private, 2)
    state = private.state_dict()
    del state["noise_check"]
    private.load_state_dict(state)
    take_steps(private, 2)
    assert not math.isnan(float(private.state_dict()["noise_check"][0, 0]))


CORRELATED = {"banded": {"noise": "banded", "bands": 3}, "regenerated": {"noise": "regenerated", "bands": 3}}


def correlated(kind, *, seed=0):
    mechanism = Mechanism(len(X), 3, 1.0, 1.0, delta=1e-3, sampler="cyclic", **CORRELATED[kind])
    return PrivateGradients(model_of(), mechanism, seed=seed)


@pytest.mark.parametrize("kind", CORRELATED)
def test_correlated_noise_is_made_independent_first(kind):
    private = correlated(kind)
    take_steps(private, 30)
    check = private._noise_check
    assert check._squares.sum() / check._counts.sum() == pytest.approx(1, abs=0.15)
    resumed = correlated(kind, seed=1)
    resumed.load_state_dict(private.state_dict())
    take_steps(resumed, 30)
    found = resumed._noise_check
    assert found._squares.sum() / found._counts.sum() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("kind", CORRELATED)
def test_half_of_correlated_noise_is_found(kind, monkeypatch):
    private, original = correlated(kind), GaussianNoise.add_
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, *, std: original(self, std=std / 2))
    with pytest.raises(PrivacyError, match="times the standard deviation that epsilon is computed for"):
        take_steps(private, 60)
