"""Secret generators, Poisson batches, and the standard deviation of the noise."""

import pytest
import torch
from torch import nn

from memsave.privacy import PrivacyError
from memsave.privacy.noise import GaussianNoise
from memsave.privacy.randomness import FIRST_WORD, WORDS, secret_generator, seeded_generator
from memsave.privacy.sampling import poisson_batches

pytest.importorskip("opacus")


def test_manual_seed_keeps_32_bits():
    draws = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert torch.equal(*draws)


def test_every_word_of_a_secret_state_is_random():
    words = [secret_generator().get_state()[FIRST_WORD : FIRST_WORD + 8 * WORDS].view(torch.int64) for _ in range(2)]
    assert (words[0] != words[1]).float().mean() > 0.99
    for each in words:
        assert ((each >> 31) & 1).float().mean() == pytest.approx(0.5, abs=0.15)  # high bits are random, too


def test_secret_numbers_are_normal(device):
    draws = torch.randn(200_000, generator=secret_generator(device))
    assert draws.mean().abs() < 0.02
    assert draws.std().item() == pytest.approx(1, abs=0.02)


def test_an_unknown_state_format_is_refused(monkeypatch):
    monkeypatch.setattr("memsave.privacy.randomness.FIRST_WORD", 16)
    with pytest.raises(RuntimeError, match="stores its generator's state in an unknown format"):
        secret_generator()


def test_poisson_batches_contain_each_example_independently_with_the_sample_rate():
    batches = poisson_batches(size=40, sample_rate=0.3, generator=seeded_generator(0))
    drawn = torch.zeros(4000, 40)
    for row in drawn:
        row[next(batches)] = 1
    assert (drawn.mean(0) - 0.3).abs().max() < 0.04
    assert drawn.sum(1).var() == pytest.approx(
        40 * 0.3 * 0.7, rel=0.15
    )  # sizes are binomial, unlike those of a shuffled epoch
    pairs = (drawn.T @ drawn / 4000).fill_diagonal_(0.09)
    assert (pairs - 0.09).abs().max() < 0.03


def test_batches_may_be_empty_or_contain_everything():
    rare = poisson_batches(size=3, sample_rate=0.05, generator=seeded_generator(0))
    assert [] in [next(rare) for _ in range(20)]
    assert next(poisson_batches(size=3, sample_rate=1.0, generator=seeded_generator(0))) == [0, 1, 2]


def test_the_default_device_does_not_change_the_batches():
    with torch.device("meta"):  # a device on which no value could be drawn
        drawn = next(poisson_batches(size=40, sample_rate=0.3, generator=seeded_generator(0)))
    assert drawn == next(poisson_batches(size=40, sample_rate=0.3, generator=seeded_generator(0)))


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_impossible_sample_rates_are_refused(rate):
    with pytest.raises(PrivacyError, match="sample rate is"):
        next(poisson_batches(size=3, sample_rate=rate, generator=seeded_generator(0)))


def test_a_batch_is_drawn_only_when_requested():
    generator = seeded_generator(0)
    batches = poisson_batches(size=5, sample_rate=0.5, generator=generator)
    next(batches)
    state = generator.get_state()
    second = next(batches)
    generator.set_state(state)
    assert next(poisson_batches(size=5, sample_rate=0.5, generator=generator)) == second


@pytest.mark.parametrize("secure", [False, True])
def test_noise_has_the_standard_deviation_and_is_new_for_each_parameter_and_step(secure, device):
    model = nn.Linear(300, 300, bias=False)
    model.weight.grad = torch.full_like(model.weight, 2.0)
    noise = GaussianNoise(list(model.parameters()), generator=seeded_generator(0, device), secure=secure)
    buffers = [each.data_ptr() for each in noise._buffers]
    steps = []
    for _ in range(2):
        before = model.weight.grad.clone()
        noise.add_(std=0.7)
        steps.append((model.weight.grad - before).flatten())
    for step in steps:
        assert step.mean().abs() < 0.01
        assert step.std().item() == pytest.approx(0.7, rel=0.01)
        assert (step.abs() > 1.4).float().mean().item() == pytest.approx(0.0455, abs=0.004)  # two standard deviations
    assert torch.corrcoef(torch.stack(steps))[0, 1].abs() < 0.02
    assert [each.data_ptr() for each in noise._buffers] == buffers
    assert all(each.dtype == torch.float64 for each in noise._buffers)  # float32 normals end at 5.77


def test_large_parameters_are_noised_piece_by_piece(monkeypatch, device):
    monkeypatch.setattr("memsave.privacy.noise.CHUNK", 1000)
    model = nn.Linear(70, 70)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    GaussianNoise(list(model.parameters()), generator=seeded_generator(0, device)).add_(std=1.0)
    drawn = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert drawn.std().item() == pytest.approx(1, rel=0.05)
    assert len(drawn.unique()) == len(drawn)
