"""All kinds of blocks: several couplings, and blocks with their own inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memsave.reversible import AdditiveCoupling, AffineCoupling, Coupling, ReversibleSequence, verify
from tests.reversible.test_sequence import image
from tests.support.reversible_blocks import assert_same_as_stored, conv_branch, sequence

pytestmark = pytest.mark.usefixtures("device")


class Widening(nn.Module):
    """Doubles the channels, as an affine coupling requires."""

    def __init__(self, channels, **options):
        super().__init__()
        self.body = conv_branch(channels, **options)
        self.last = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        return self.last(self.body(x))


class Weighted(Coupling):
    """target + weight * value, where the weight is a parameter of the coupling."""

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
    """Space to channels: invertible, with another shape."""

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
def test_gradients_of_any_blocks_in_any_order_equal_stored_activations(kinds, half, dropout, anchor_every):
    net = net_of(kinds, 2 * half, dropout=dropout, anchor_every=anchor_every)
    assert_same_as_stored(net, image(channels=2 * half))


@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling, pytest.param(Weighted, marks=pytest.mark.slow)])
def test_gradients_pass_gradcheck(kind):
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(2, 2 * kind.values), nn.Tanh()) for _ in range(2)]
    net = ReversibleSequence([kind(*branches), Mixing(4), kind(*branches)]).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(net.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x, *_: net(x), (x, *parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_of_forward_is_the_input(kind):
    net, x = net_of([kind] * 4), image()
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-11, atol=1e-11)


def test_a_block_may_change_the_shape_when_it_has_an_inverse():
    net = ReversibleSequence([additive(4), Unshuffle(), additive(16)]).double()
    x = image()
    assert net(x).shape == (2, 16, 3, 3)
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-11, atol=1e-11)
    assert_same_as_stored(net, x)


def test_a_sequence_can_be_a_block_of_a_sequence():
    inner = sequence(depth=2)
    assert_same_as_stored(ReversibleSequence([additive(4), inner, affine(4)]).double(), image())


def test_frozen_branches_of_an_affine_coupling_are_exact():
    for chosen in ("f", "g", "last", "weight"):
        net = net_of(["affine", "affine"])
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(chosen not in name)
        assert_same_as_stored(net, image())


def test_an_affine_coupling_scales_within_its_limit():
    block = AffineCoupling(nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), limit=0.5)
    value = 1e3 * torch.randn(2, 4, 3, 3)
    value[:, 2:] = 0
    ratio = block.combine(torch.ones(2, 2, 3, 3), value)
    assert ratio.log().abs().max() <= 0.5 * (1 + 1e-6)
    with pytest.raises(ValueError, match="limit is 0"):
        AffineCoupling(nn.Identity(), nn.Identity(), limit=0)
    with pytest.raises(ValueError, match="2 output channels for each input"):
        AffineCoupling(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1))(torch.ones(2, 4, 3, 3))


def test_a_block_with_its_own_inverse_refuses_low_precision():
    net = ReversibleSequence([Mixing(4)]).bfloat16()
    with pytest.raises(ValueError, match=r"blocks\.0 \(Mixing\).*float32 input"):
        net(image().bfloat16())


@pytest.mark.parametrize("kind", ["affine", "weighted"])
def test_values_of_bfloat16_branches_are_upcast_before_separate(kind):
    """Rounded to bfloat16, exp(s) and exp(-s) are not inverse."""
    net, x = net_of([kind] * 8).float(), image(dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert verify(net, x).gradient < 0.01


def test_a_block_that_returns_a_narrower_dtype_is_refused():
    net = ReversibleSequence([Mixing(4)])
    with (
        torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"blocks\.0 \(Mixing\) returned.*autocast"),
    ):
        net(image(dtype=torch.float32))


class Permuted(nn.Module):
    """Reverses the channels without restoring the memory format."""

    def forward(self, x):
        return x.flip(1)

    def inverse(self, y):
        return y.flip(1).contiguous()


def test_a_rebuilt_input_has_the_strides_of_the_forward():
    for last in (Permuted(), Mixing(4)):
        net = ReversibleSequence([additive(4, dropout=0.5), last]).double()
        assert_same_as_stored(net, image().to(memory_format=torch.channels_last))


def test_invalid_couplings_raise_errors():
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
    """Computes its inverse with autograd."""

    def inverse(self, y):
        with torch.enable_grad():
            z = torch.zeros_like(y).requires_grad_()
            (step,) = torch.autograd.grad((Mixing.forward(self, z) * y).sum(), z)  # W^T y
        return step.detach()


def test_an_inverse_may_call_autograd_but_not_change_its_input():
    torch.manual_seed(0)
    net = ReversibleSequence([Newton(4), additive(4)]).double()
    net.blocks[0].weight.data = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]  # W^T inverts it
    assert_same_as_stored(net, image())
    with pytest.raises(RuntimeError, match=r"blocks\.0 \(InPlace\) changed its input in place"):
        ReversibleSequence([InPlace(4)]).double()(image())


def test_a_forward_overridden_without_its_inverse_is_refused():
    class Newer(Mixing):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"Newer, which overrides forward\(\) and not inverse\(\)"):
        ReversibleSequence([Newer(4)])


def test_a_wrong_inverse_gives_a_wrong_gradient():
    class Wrong(Mixing):
        def inverse(self, y):
            return 2 * super().inverse(y)

    torch.manual_seed(0)
    net = ReversibleSequence([Wrong(4)]).double()
    with pytest.raises(AssertionError):
        assert_same_as_stored(net, image())
