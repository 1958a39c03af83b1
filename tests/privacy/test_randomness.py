"""Secret streams of random numbers."""

import numpy as np
import pytest
import torch

from memsave.privacy import randomness
from memsave.privacy.randomness import KEY_BITS, WORDS, SecretStream


def normals(stream, count, device="cpu"):
    return stream.fill_normal(torch.empty(count, dtype=torch.float64, device=device))


def test_manual_seed_keeps_32_bits():  # the reason for another generator
    draws = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert torch.equal(*draws)


def test_every_bit_of_a_key_matters_and_comes_from_the_operating_system():
    first = normals(SecretStream(5), 4)
    others = [normals(SecretStream(5 ^ 1 << bit), 4) for bit in range(KEY_BITS)]
    assert not any(torch.isclose(first, other).any() for other in others)
    keys = np.stack([SecretStream().get_state()[4:6] for _ in range(200)])
    bits = (keys[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 0.2


def test_secret_numbers_are_normal_with_tails_beyond_those_of_float32(device):
    draws = normals(SecretStream(), 200_000, device)
    assert draws.mean().abs() < 0.02
    assert draws.std().item() == pytest.approx(1, abs=0.02)
    assert len(draws.unique()) == len(draws)
    assert (draws.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=0.004)


def test_normal_numbers_on_the_cpu_are_those_of_philox():
    expected = np.random.Generator(np.random.Philox(key=7)).standard_normal(5)
    assert normals(SecretStream(7), 5).tolist() == expected.tolist()


def test_normal_numbers_on_another_device_come_from_a_seed_of_64_bits_from_philox(monkeypatch):
    """The generator of the other device is here one of the CPU."""

    class Elsewhere:
        device = torch.device("cuda")

        def normal_(self, *, generator=None):
            return torch.empty(5, dtype=torch.float64).normal_(generator=generator)

    monkeypatch.setattr(randomness, "Generator", lambda device: torch.Generator())
    stream = SecretStream(7)
    found = [stream.fill_normal(Elsewhere()) for _ in range(2)]
    seeds = np.random.Generator(np.random.Philox(key=7)).integers(2**63, size=2)
    for values, seed in zip(found, seeds, strict=True):
        generator = torch.Generator().manual_seed(int(seed))
        assert torch.equal(values, torch.empty(5, dtype=torch.float64).normal_(generator=generator))


@pytest.mark.parametrize("before", range(5))
def test_a_stream_continues_exactly_at_its_state(before, device):
    stream = SecretStream()
    stream.uniforms(before)
    stream.integers(before, below=3)  # may leave half of a number
    state = stream.get_state()
    assert state.shape == (WORDS,)
    expected = stream.uniforms(3), stream.integers(5, below=7), normals(stream, 5, device)
    again = SecretStream.at(state)
    found = again.uniforms(3), again.integers(5, below=7), normals(again, 5, device)
    assert all(list(a) == list(b) for a, b in zip(expected, found, strict=True))
    assert (again.get_state() == stream.get_state()).all()


def test_choose_takes_each_subset_equally_often():
    stream, items = SecretStream(0), np.array([3, 5, 8, 9])
    found = [tuple(stream.choose(items, 2)) for _ in range(3000)]
    assert all(list(each) == sorted(each) for each in found)
    counts = [found.count(each) for each in {*found}]
    assert len(counts) == 6
    assert max(abs(count / 3000 - 1 / 6) for count in counts) < 0.03
