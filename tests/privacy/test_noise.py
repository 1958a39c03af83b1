"""Noise of gradients: its standard deviation, its correlation between steps, and its continuation."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from memsave.privacy import PrivacyError
from memsave.privacy.correlated import inverse_series
from memsave.privacy.noise import GaussianNoise
from memsave.privacy.randomness import SecretStream

KINDS = [("independent", 1), ("banded", 3), ("regenerated", 3)]


def make(
    device="cpu", *, seed=0, secure=False, noise="independent", bands=1, dtype=torch.float64, sizes=((7, 5), (9,))
):
    model = nn.ParameterList([torch.zeros(size, dtype=dtype, device=device) for size in sizes])
    stream = SecretStream(seed)
    return model, GaussianNoise(list(model), stream=stream, secure=secure, noise=noise, bands=bands)


def steps_of(model, noise, count, *, std=0.7):
    """(count, n): the noise of each step."""
    found = []
    for _ in range(count):
        for parameter in model:
            parameter.grad = torch.zeros_like(parameter)
        noise.add_(std=std)
        found.append(torch.cat([p.grad.flatten() for p in model]).double().cpu())
    return torch.stack(found) if found else torch.empty(0)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_has_the_standard_deviation_and_is_new_for_each_parameter_and_step(secure, device):
    model, noise = make(device, secure=secure, dtype=torch.float32, sizes=[(300, 300)])
    buffers = [noise._total, *noise._drawn]
    addresses = [each.data_ptr() for each in buffers]
    steps = steps_of(model, noise, 2)
    for step in steps:
        assert step.mean().abs() < 0.01
        assert step.std().item() == pytest.approx(0.7, rel=0.01)
        assert (step.abs() > 1.4).float().mean().item() == pytest.approx(0.0455, abs=0.004)  # two standard deviations
    assert torch.corrcoef(steps)[0, 1].abs() < 0.02
    assert [each.data_ptr() for each in buffers] == addresses
    assert all(each.dtype == torch.float64 for each in buffers)  # float32 normals end at 5.77


@pytest.mark.parametrize(("noise", "bands"), KINDS)
@pytest.mark.parametrize("chunk", [4, 2**20])
@pytest.mark.parametrize("secure", [False, True])
def test_correlated_noise_is_the_inverse_matrix_times_independent_noise(
    noise, bands, chunk, secure, device, monkeypatch
):
    monkeypatch.setattr("memsave.privacy.noise.CHUNK", chunk)
    independent = steps_of(*make(device, secure=secure), 6)
    weights = inverse_series(noise, bands=bands, steps=6)
    rows = [[weights[i - j] if i >= j else 0.0 for j in range(6)] for i in range(6)]
    matrix = torch.tensor(rows, device="cpu")
    found = steps_of(*make(device, secure=secure, noise=noise, bands=bands), 6)
    assert torch.allclose(found, matrix.double() @ independent, atol=1e-12)
    assert len(found.unique()) == found.numel()


@pytest.mark.parametrize(("noise", "bands"), KINDS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_noise_continues_exactly(noise, bands, before, device):
    kwargs = {"noise": noise, "bands": bands, "dtype": torch.float32}
    model, first = make(device, **kwargs)
    steps_of(model, first, before)
    state, past = first.stream.get_state(), first.get_past().clone()
    expected = steps_of(model, first, 4)
    other, second = make(device, seed=1, **kwargs)
    steps_of(other, second, 2)
    second.stream.set_state(state)
    second.set_past(past)
    assert torch.equal(steps_of(other, second, 4), expected)


def test_regenerated_noise_keeps_nothing_of_the_size_of_the_parameters():
    model, noise = make(noise="regenerated", bands=4, sizes=[(500, 500)])
    steps_of(model, noise, 6)
    assert noise.get_past().shape == (3, 13)
    assert isinstance(noise._states, deque)
    assert all(each.nbytes < 200 for each in noise._states)


def test_correlated_noise_of_sharded_parameters_is_refused(monkeypatch):
    monkeypatch.setattr("memsave.privacy.noise.is_sharded", lambda parameter: True)
    make()
    with pytest.raises(PrivacyError, match="noise=banded needs whole gradients, and FSDP shards them"):
        make(noise="banded", bands=3)


def test_large_parameters_are_noised_piece_by_piece(monkeypatch, device):
    monkeypatch.setattr("memsave.privacy.noise.CHUNK", 1000)
    model, noise = make(device, sizes=[(70, 70), (70,)])
    drawn = steps_of(model, noise, 1, std=1.0)[0]
    assert drawn.std().item() == pytest.approx(1, rel=0.05)
    assert len(np.unique(drawn.numpy())) == len(drawn)
