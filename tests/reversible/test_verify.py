"""`verify` finds all problems and changes nothing."""

import random

import pytest
import torch
from torch import nn

from memsave.models import ReversibleUNet3d
from memsave.reversible import AdditiveCoupling, ReversibleSequence, verify
from tests.reversible.test_couplings import Mixing
from tests.reversible.test_sequence import image
from tests.support.reversible_blocks import conv_branch, sequence

pytestmark = pytest.mark.usefixtures("device")


def unnormalised(channels, gain=4.0):
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.normal_(conv.weight, std=gain / (9 * channels) ** 0.5)
    return nn.Sequential(conv, nn.ReLU())


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"norm": "batch"}, {}])
def test_verify_accepts_an_exact_sequence(options):
    report = verify(sequence(depth=4, **options), image())
    assert report.ok, str(report)
    assert report.gradient < 1e-12
    (drift,) = report.drift.values()
    assert len(drift) == 4 and 0 < max(drift) < 1e-13
    assert "as stored" in str(report) and "through 4 blocks" in str(report)


def test_the_drift_of_every_sequence_is_reported():
    net = ReversibleUNet3d(channels=(4, 8), blocks=2)
    report = verify(net, torch.randn(1, 4, 16, 16, 16))
    assert report.ok, str(report)
    assert set(report.drift) == {"encoder.0", "encoder.1", "decoder.0"}


def test_verify_does_not_change_the_module_or_the_random_state():
    net, x = sequence(norm="batch", dropout=0.2), image()
    net(x).sum().backward()
    before = [p.grad.clone() for p in net.parameters()] + [b.clone() for b in net.buffers()]
    states = torch.get_rng_state(), random.getstate()
    assert verify(net, x).ok
    after = [p.grad for p in net.parameters()] + list(net.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert not x.requires_grad and net.recompute


def test_drift_is_reported_with_the_largest_sufficient_anchor_every():
    net, x = sequence(depth=12, branch=unnormalised, dtype=torch.float32), image(dtype=torch.float32)
    report = verify(net, x)
    assert not report.ok
    assert report.gradient > 1e-3 and report.anchor_every in (1, 2, 4)
    assert f"anchor_every={report.anchor_every} brings it within" in str(report)
    (drift,) = report.drift.values()
    assert drift[0] > 100 * drift[-1]

    net.anchor_every = report.anchor_every
    assert verify(net, x).ok
    net.anchor_every *= 2
    assert not verify(net, x).ok  # anchor_every was the largest sufficient one


def test_a_given_tolerance_is_used():
    net, x = sequence(depth=8, dtype=torch.float32), image(dtype=torch.float32)
    assert verify(net, x).ok
    assert not verify(net, x, tolerance=1e-12).ok


class Fickle(nn.Module):
    """Depends on internal state."""

    def __init__(self, channels):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Wrong(Mixing):
    def inverse(self, y):
        return 1.1 * super().inverse(y)


class Moving(nn.Module):
    """Updates a large buffer without the version counter."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("seen", torch.zeros(5000))

    def forward(self, x):
        self.seen.data.add_(1)
        return x.sin()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([AdditiveCoupling(Fickle(2), Fickle(2))], "are its branches deterministic"),
        ([Wrong(4)], "the gradient is off"),
        ([AdditiveCoupling(conv_branch(2), nn.ReLU(inplace=True))], "changed its input in place"),
        ([AdditiveCoupling(Moving(2), conv_branch(2))], r"the buffer blocks\.0\.f\.seen differs after the step"),
    ],
)
def test_problems_are_named(blocks, words):
    torch.manual_seed(0)
    net = ReversibleSequence(blocks).to(torch.get_default_device(), torch.float64)
    report = verify(net, image())
    assert not report.ok
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(str(report))


class Flips(nn.Module):
    """Negates the gradient of one small parameter when it runs again."""

    def __init__(self, channels):
        super().__init__()
        self.body = conv_branch(channels)
        self.small = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        sign = 1 if self.calls == 1 else -1
        return self.body(x) + 1e-2 * self.small * (sign * x)


def test_one_wrong_parameter_is_named():
    torch.manual_seed(0)
    net = ReversibleSequence([AdditiveCoupling(Flips(2), conv_branch(2))])
    report = verify(net, image(dtype=torch.float32))
    assert report.gradient < 1e-2 and not report.ok
    assert report.worst[0] == "blocks.0.f.small" and "blocks.0.f.small" in str(report)


class Outer(nn.Module):
    def __init__(self, reached=True):
        super().__init__()
        self.net, self.unused, self.reached = sequence(), sequence(seed=2), reached

    def forward(self, x):
        return self.net(x=x) if self.reached else x * 1.0


def test_a_sequence_called_with_keywords_or_under_no_grad_is_verified():
    report = verify(Outer(), image())
    assert report.ok, str(report)
    with torch.no_grad():
        assert verify(Outer(), image()).ok
    with pytest.raises(ValueError, match="does not reach its ReversibleSequence net"):
        verify(Outer(reached=False), image())
    assert "output is not finite" in str(verify(sequence(), image() * float("inf")))


def test_complex_networks_are_verified():
    def branch(channels):
        return nn.Conv2d(channels, channels, 3, padding=1)

    net = sequence(branch=branch, dtype=torch.complex128)
    x = torch.complex(image(), image().flip(0))
    report = verify(net, x)
    assert report.ok, str(report)


def test_a_module_without_sequences_is_refused():
    with pytest.raises(ValueError, match="Linear has no ReversibleSequence"):
        verify(nn.Linear(2, 2), torch.ones(1, 2))


class Kinked(nn.Module):
    """|x - c| whose kinks c are closer to the values of the first call than float32 can rebuild, not than float64."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.kinks = None

    def forward(self, x):
        if self.kinks is None:
            self.kinks = x.detach() * (1 + 1e-7)
        return self.weight * (x - self.kinks.to(x)).abs()

    def __deepcopy__(self, memo):
        copied = Kinked().to(self.weight)
        copied.kinks = self.kinks
        return copied


def test_a_value_on_the_other_side_of_a_kink_is_no_fault():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 40)
    net = ReversibleSequence([AdditiveCoupling(Kinked(), Kinked()) for _ in range(2)])
    net(x.double())
    report = verify(net, x)
    assert report.ok, str(report)
    assert max(report.gradient, report.worst[1]) > 1e-3 and report.in_float64 < 1e-9
    assert "other side of a kink" in str(report)
    assert not verify(net, x, tolerance=1e-7).ok  # drift of float32 is above this
