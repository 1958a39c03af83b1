"""The depthwise convolution compared with PyTorch's, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from memsave.models import depthwise, depthwise_conv3d
from memsave.profiler import allocator_peak

SIZES = st.integers(1, 5)


def operands(batch, channels, size, kernel=3, *, dtype=torch.float64, last=True):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    x = torch.randn(batch, channels, *size, dtype=dtype, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, kernel, dtype=dtype, generator=generator)
    if last:
        x = x.to(memory_format=torch.channels_last_3d)
    return x.requires_grad_(), weight.requires_grad_()


def plain(x, weight, bias=None, *, stride=1, padding=None, dilation=1):
    padding = dilation * (weight.shape[-1] // 2) if padding is None else padding
    return F.conv3d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=x.shape[1])


def compare(function, tensors, **options):
    ours, theirs = function(*tensors, **options), plain(*tensors, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(theirs)
    wanted = [t for t in tensors if t.requires_grad]
    ours, theirs = (torch.autograd.grad(y, wanted, upstream) for y in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    size=st.tuples(SIZES, SIZES, SIZES),
    kernel=st.sampled_from([1, 3, 5]),
    last=st.booleans(),
)
@pytest.mark.usefixtures("device")
def test_value_and_gradients_equal_conv3d(batch, channels, size, kernel, last):
    compare(depthwise_conv3d, operands(batch, channels, size, kernel, last=last))


@pytest.mark.usefixtures("device")
def test_samples_are_independent():
    x, weight = operands(2, 3, (4, 4, 4))
    with torch.no_grad():
        x[1] = 0
    upstream = torch.zeros_like(x)
    upstream[1] = 1  # only the zero sample has a gradient
    (gradient,) = torch.autograd.grad(depthwise_conv3d(x, weight), weight, upstream)
    assert gradient.abs().max() == 0


def test_the_fast_backward_is_used_only_where_it_applies(monkeypatch):
    taken = []
    original = depthwise._Depthwise.apply
    monkeypatch.setattr(depthwise._Depthwise, "apply", lambda *args: taken.append(1) or original(*args))
    compare(depthwise_conv3d, operands(1, 2, (4, 4, 4)))
    assert taken
    taken.clear()
    for kernel, options in [(3, {"stride": 2}), (3, {"dilation": 2}), (3, {"padding": 0}), (2, {})]:
        compare(depthwise_conv3d, operands(2, 2, (6, 6, 6), kernel), **options)
    x, _ = operands(1, 2, (5, 5, 5))
    several = torch.randn(4, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)  # two outputs per channel
    uneven = torch.randn(2, 1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    compare(depthwise_conv3d, (x, several))
    torch.testing.assert_close(
        depthwise_conv3d(x, uneven, padding=0), F.conv3d(x, uneven, groups=2), rtol=1e-12, atol=1e-12
    )
    assert not taken


@pytest.mark.usefixtures("device")
def test_bias_and_frozen_operands_are_exact():
    x, weight = operands(2, 3, (3, 4, 5))
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    compare(depthwise_conv3d, (x, weight, bias))
    compare(depthwise_conv3d, (x.detach(), weight))
    compare(depthwise_conv3d, (x, weight.detach()))


@pytest.mark.usefixtures("device")
def test_second_derivatives_are_exact():
    x, weight = operands(2, 2, (3, 3, 3))
    assert torch.autograd.gradcheck(depthwise_conv3d, (x, weight))
    assert torch.autograd.gradgradcheck(depthwise_conv3d, (x, weight))


def test_keeps_channels_last_and_casts_under_autocast():
    x, weight = operands(2, 8, (4, 4, 4), dtype=torch.float32)
    assert depthwise_conv3d(x, weight).is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv3d(x, weight)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weight.grad.dtype == x.grad.dtype == torch.float32
    assert weight.grad.abs().max() > 0


def test_autocast_changes_neither_float64_nor_backward():
    x, weight = operands(2, 4, (4, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise_conv3d(x, weight).dtype == plain(x, weight).dtype == torch.float64
    x, weight = operands(2, 4, (6, 6, 6), dtype=torch.float32)
    y = depthwise_conv3d(x, weight)
    outside = torch.autograd.grad(y.sin().sum(), (x, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.sin().sum(), (x, weight))
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("device")
def test_transforms_and_unbatched_volumes_use_conv3d():
    x, weight = operands(2, 3, (3, 3, 3))
    torch.testing.assert_close(depthwise_conv3d(x[0], weight), plain(x, weight)[0], rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.func.grad(lambda w, f=f: f(x, w).sin().sum())(weight) for f in (depthwise_conv3d, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.func.vmap(lambda v, f=f: f(v[None], weight))(x) for f in (depthwise_conv3d, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("device")
def test_large_slices_of_a_batch_are_exact(dtype):
    x, weight = operands(3, 16, (9, 8, 7), dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    ours, theirs = (torch.autograd.grad(f(x, weight).sin().sum(), (x, weight)) for f in (depthwise_conv3d, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    size=st.tuples(SIZES, SIZES, SIZES),
    kernel=st.sampled_from([1, 3, 5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    slab=st.integers(1, 200),
)
def test_narrow_dtypes_are_computed_in_float32_and_rounded_once(batch, channels, size, kernel, dtype, slab):
    x, weight = operands(batch, channels, size, kernel, dtype=dtype)
    upstream = torch.randn(batch, channels, *size).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "SLAB", slab)
        y = depthwise_conv3d(x, weight)
        found = torch.autograd.grad(y, (x, weight), upstream)
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    wanted = plain(*exact)
    gradients = torch.autograd.grad(wanted, exact, upstream.double())
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    for ours, theirs in zip((y, *found), (wanted, *gradients), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-5)


def test_second_derivatives_of_narrow_dtypes_are_recorded():
    x, weight = operands(1, 2, (3, 3, 3), dtype=torch.bfloat16)
    first = torch.autograd.grad(depthwise_conv3d(x, weight).square().sum(), (x, weight), create_graph=True)
    ours = torch.autograd.grad(sum(each.square().sum() for each in first), (x, weight))
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    first = torch.autograd.grad(plain(*exact).square().sum(), exact, create_graph=True)
    theirs = torch.autograd.grad(sum(each.square().sum() for each in first), exact)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05 * other.abs().max().item())


def test_narrow_dtypes_need_one_slab_in_float32():
    x = torch.randn(1, 8, 64, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(8, 1, 3, 3, 3, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(depthwise, "SLAB", 4 * 8 * 32 * 32)  # four planes of 64
        peak = allocator_peak(lambda: depthwise_conv3d(x, weight), device=x.device)
    result = x.numel() * x.element_size()
    slabs = 4 * (6 + 4) * 8 * 32 * 32  # bytes: with one plane more on each side, and the slab of the result
    assert result + slabs <= peak < result + 1.2 * slabs


def test_operators_of_narrow_dtypes_have_right_schemas_fakes_and_flops():
    x, weight = (each.detach() for each in operands(2, 3, (4, 5, 6), dtype=torch.bfloat16))
    slab, gradients = depthwise._space(x, more=2), depthwise._space(x)
    calls = {
        torch.ops.memsave.depthwise_in_slabs.default: (x, weight, slab),
        torch.ops.memsave.depthwise_weight_gradient_in_slabs.default: (x, x, weight, slab, gradients),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        with FlopCounterMode(display=False) as counter:
            operator(*arguments)
        assert counter.get_total_flops() == 2 * x.numel() * 27
