"""Every kind of block: couplings of several forms, and blocks with an inverse of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memsave.reversible import AdditiveCoupling, AffineCoupling, Coupling, ReversibleSequence, verify
from tests.reversible.test_sequence import image
from tests.support.reversible_blocks import assert_same_as_stored, conv_branch, sequence


class Widening(nn.Module):
    """As many channels again, as an affine coupling asks for."""

    def __init__(self, channels, **options):
        super().__init__()
        self.body = conv_branch(channels, **options)
        self.last = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        return self.last(self.body(x))


class Weighted(Coupling):
    """target + weight value, with a parameter of the coupling's own."""

    def __init__(self, f, g):
        super().__init__(f, g)
        self.weight = nn.Parameter(torch.rand(()))

    def combine(self, target, value):
        return target + self.weight * value

    def separate(self, target, value):
        return target - self.weight * value


class Mixing(nn.Module):
    """An invertible pointwise convolution, as in Glow."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x):
        return torch.einsum("oi,bi...->bo...", self.weight, x)

    def inverse(self, y):
        return torch.einsum("oi,bi...->bo...", torch.linalg.inv(self.weight), y)


class Unshuffle(nn.Module):
    """Space into channels: invertible, and another shape."""

    def forward(self, x):
        return nn.functional.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return nn.functional.pixel_shuffle(y, 2)


def affine(channels, **options):
    return AffineCoupling(Widening(channels // 2, **options), Widening(channels // 2, **options))


def additive(channels, **options):
    return AdditiveCoupling(conv_branch(channels // 2, **options), conv_branch(channels // 2, **options))


def weighted(channels, **options):
    return Weighted(conv_branch(channels // 2, **options), conv_branch(channels // 2, **options))


KINDS = {"affine": affine, "additive": additive, "weighted": weighted, "mixing": lambda c, **_: Mixing(c)}


def net_of(kinds, channels=4, *, recompute=True, anchor_every=None, **options):
    torch.manual_seed(0)
    blocks = [KINDS[kind](channels, **options) for kind in kinds]
    return ReversibleSequence(blocks, recompute=recompute, anchor_every=anchor_every).double()


@settings(max_examples=20, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5),
    half=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.3]),
    anchor_every=st.sampled_from([None, 1, 2, 3]),
)
def test_any_blocks_in_any_order_equal_the_stored_twin(kinds, half, dropout, anchor_every):
    net = net_of(kinds, 2 * half, dropout=dropout, anchor_every=anchor_every)
    assert_same_as_stored(net, image(channels=2 * half))


@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling, Weighted])
def test_gradients_are_derivatives(kind):
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(2, 2 * kind.values), nn.Tanh()) for _ in range(2)]
    net = ReversibleSequence([kind(*branches), Mixing(4), kind(*branches)]).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(net.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x, *_: net(x), (x, *parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_undoes_the_forward(kind):
    net, x = net_of([kind] * 4), image()
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-11, atol=1e-11)


def test_a_block_may_change_the_shape_when_it_has_an_inverse():
    net = ReversibleSequence([additive(4), Unshuffle(), additive(16)]).double()
    x = image()
    assert net(x).shape == (2, 16, 3, 3)
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-11, atol=1e-11)
    assert_same_as_stored(net, x)


def test_a_sequence_is_a_block():
    inner = sequence(depth=2)
    assert_same_as_stored(ReversibleSequence([additive(4), inner, affine(4)]).double(), image())


def test_frozen_branches_of_an_affine_coupling():
    for chosen in ("f", "g", "last", "weight"):
        net = net_of(["affine", "affine"])
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(chosen not in name)
        assert_same_as_stored(net, image())


def test_an_affine_coupling_is_bounded():
    block = AffineCoupling(nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), limit=0.5)
    value = 1e3 * torch.randn(2, 4, 3, 3)
    value[:, 2:] = 0
    ratio = block.combine(torch.ones(2, 2, 3, 3), value)
    assert ratio.log().abs().max() <= 0.5 * (1 + 1e-6)
    with pytest.raises(ValueError, match="limit is 0"):
        AffineCoupling(nn.Identity(), nn.Identity(), limit=0)
    with pytest.raises(ValueError, match="2 output channels for each input"):
        AffineCoupling(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1))(torch.ones(2, 4, 3, 3))


def test_a_block_of_its_own_inverse_needs_a_wide_stream():
    net = ReversibleSequence([Mixing(4)]).bfloat16()
    with pytest.raises(ValueError, match=r"blocks\.0 \(Mixing\).*float32 input"):
        net(image().bfloat16())


@pytest.mark.parametrize("kind", ["affine", "weighted"])
def test_branches_in_bfloat16_do_not_break_the_inverse(kind):
    """exp(s) and exp(-s), each rounded to bfloat16, are not inverse."""
    net, x = net_of([kind] * 8).float(), image(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert verify(net, x).gradient < 0.01


def test_a_block_that_gives_less_than_it_was_given_is_refused():
    net = ReversibleSequence([Mixing(4)])
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"blocks\.0 \(Mixing\) gave.*autocast"),
    ):
        net(image(dtype=torch.float32))


class Permuted(nn.Module):
    """Exchanges channels, in whatever layout that gives."""

    def forward(self, x):
        return x.flip(1)

    def inverse(self, y):
        return y.flip(1).contiguous()


def test_a_rebuilt_input_has_the_layout_that_it_had():
    for last in (Permuted(), Mixing(4)):
        net = ReversibleSequence([additive(4, dropout=0.5), last]).double()
        assert_same_as_stored(net, image().to(memory_format=torch.channels_last))


def test_what_a_coupling_may_not_do_is_said():
    class Overwriting(Weighted):
        def separate(self, target, value):
            return target.sub_(self.weight * value)

    net = ReversibleSequence([Overwriting(conv_branch(2), conv_branch(2))]).double()
    with pytest.raises(RuntimeError, match=r"Overwriting\.separate changed one of its arguments in place"):
        net(image()).sum().backward()
    with pytest.raises(TypeError, match="the branch Tuple of a coupling returned a tuple"):
        ReversibleSequence([AdditiveCoupling(Tuple(), Tuple())])(image())
    with pytest.raises(ValueError, match=r"floating-point numbers, but its input is torch\.int64"):
        net(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="limit is inf"):
        AffineCoupling(nn.Identity(), nn.Identity(), limit=float("inf"))


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


class InPlace(Mixing):
    def forward(self, x):
        return super().forward(x.mul_(1.0))

    def inverse(self, y):
        return super().inverse(y)


class Newton(Mixing):
    """Its inverse is found by differentiating."""

    def inverse(self, y):
        with torch.enable_grad():
            z = torch.zeros_like(y).requires_grad_()
            (step,) = torch.autograd.grad((Mixing.forward(self, z) * y).sum(), z)  # W^T y
        return step.detach()


def test_own_inverses_may_differentiate_and_not_work_in_place():
    torch.manual_seed(0)
    net = ReversibleSequence([Newton(4), additive(4)]).double()
    net.blocks[0].weight.data = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]  # so W^T is its inverse
    assert_same_as_stored(net, image())
    with pytest.raises(RuntimeError, match=r"blocks\.0 \(InPlace\) changed its input in place"):
        ReversibleSequence([InPlace(4)]).double()(image())


def test_an_inverse_of_an_older_forward_is_refused():
    class Newer(Mixing):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"Newer, which overrides forward\(\) and not inverse\(\)"):
        ReversibleSequence([Newer(4)])


def test_an_inverse_that_is_not_one_is_an_error_of_its_gradient():
    class Wrong(Mixing):
        def inverse(self, y):
            return 2 * super().inverse(y)

    torch.manual_seed(0)
    net = ReversibleSequence([Wrong(4)]).double()
    with pytest.raises(AssertionError):
        assert_same_as_stored(net, image())
