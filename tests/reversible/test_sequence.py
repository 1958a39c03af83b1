"""A reversible sequence compared with stored activations, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.reversible import AdditiveCoupling, ReversibleSequence
from memsave.reversible.recompute_context import RecomputeContext
from tests.support.reversible_blocks import (
    assert_same,
    assert_same_as_stored,
    conv_branch,
    count_in,
    gradients,
    sequence,
    twin_of,
)

pytestmark = pytest.mark.usefixtures("device")


def image(batch=2, channels=4, size=6, dtype=torch.float64):
    return torch.randn(
        batch, channels, size, size, dtype=dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(3)
    )


def distance(ours, stored):
    """The relative distance of two sets of gradients as a whole: single entries may differ by one bfloat16 digit."""
    flat = [torch.cat([value.flatten().double() for value in each.values()]) for each in (ours, stored)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(1, 5),
    batch=st.integers(1, 3),
    half=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.3]),
    norm=st.sampled_from(["group", "batch", "none"]),
    channels_last=st.booleans(),
)
def test_gradients_equal_those_with_stored_activations(depth, batch, half, dropout, norm, channels_last):
    x = image(batch, 2 * half)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_same_as_stored(sequence(depth, 2 * half, dropout=dropout, norm=norm), x)


def test_forward_equals_the_composition_of_the_blocks():
    net, x = sequence(), image()
    y = x
    for block in net.blocks:
        y = block(y)
    assert torch.equal(net(x), y)


def test_inverse_of_forward_is_the_input():
    net, x = sequence(depth=5), image()
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-12, atol=1e-12)


def test_a_replay_has_the_memory_format_of_the_forward():
    layouts = []

    class Layout(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.conv(x)

    net = sequence(branch=Layout, channels=8)
    net(image(channels=8).to(memory_format=torch.channels_last)).sum().backward()
    assert len(layouts) == 12 and all(layouts)


def test_each_branch_is_evaluated_once_in_backward():
    net = sequence(depth=4)
    counters = count_in(net)
    net(image()).sum().backward()
    assert [c.calls for c in counters] == [2] * 8  # once in forward, once in backward


def test_the_random_state_after_a_step_is_that_with_stored_activations():
    net, x = sequence(dropout=0.5), image()
    after = []
    for model in (net, twin_of(net)):
        torch.manual_seed(5)
        model(x).sum().backward()
        after.append(torch.rand(4))
    assert torch.equal(*after)


def test_two_forwards_before_one_backward_are_exact():
    net = sequence(dropout=0.3)
    first, second = image(), 2 * image() + 1

    def two(model):
        torch.manual_seed(1)
        model.zero_grad()
        (model(first).square().mean() + model(second).sin().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert_same(two(net), two(twin_of(net)))


def test_autograd_grad_of_some_parameters_is_exact():
    net, x = sequence(), image().requires_grad_()
    twin = twin_of(net)
    for chosen in (slice(None), slice(0, 2), slice(-2, None)):
        ours = torch.autograd.grad(net(x).square().sum(), list(net.parameters())[chosen])
        stored = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters())[chosen])
        for one, other in zip(ours, stored, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_an_input_without_grad_is_exact():
    net, x = sequence(), image()
    twin = twin_of(net)
    for model in (net, twin):
        model(x).square().mean().backward()
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()})


@pytest.mark.parametrize(
    "before",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1).double()],
    ids=["relu", "relu in place", "conv"],
)
def test_a_layer_before_and_a_skip_around_the_sequence_are_exact(before):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.net = before.to(torch.get_default_device()), sequence()

        def forward(self, x):
            x = self.first(x * 1.5)
            return x * self.net(x)  # the caller reads x afterwards

    assert_same_as_stored(Skip(), image())


def test_retain_graph_and_double_backward_are_exact():
    net = sequence(depth=2, dropout=0.2)

    def second_order(model):
        torch.manual_seed(2)
        x = image().requires_grad_()
        loss = model(x).pow(3).mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        model.zero_grad()
        slope.square().sum().backward(retain_graph=True)
        loss.backward()
        return {"slope": slope.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    assert_same(second_order(net), second_order(twin_of(net)))


def test_checkpoints_inside_and_outside_are_exact():
    class Inside(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.body = conv_branch(channels, dropout=0.3)

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    net = sequence(branch=Inside)
    assert_same_as_stored(net, image())

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sequence(dropout=0.3)

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False) * 2

    assert_same_as_stored(Outside(), image())


def test_a_sequence_inside_a_branch_is_exact():
    net = sequence(depth=2, channels=8, branch=lambda c: sequence(depth=2, channels=c))
    assert_same_as_stored(net, image(channels=8))


def test_bfloat16_autocast_keeps_the_stream_in_float32():
    net, x = sequence(dtype=torch.float32, depth=8), image(dtype=torch.float32)

    def loss(y):
        assert y.dtype == torch.float32
        return y.square().mean()

    def step(model):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            torch.manual_seed(0)
            value = loss(model(x.clone().requires_grad_()))
        model.zero_grad()
        value.backward()  # outside autocast, as usual: the rebuild must enter autocast again
        return {"loss": value.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    ours, stored = step(net), step(twin_of(net))
    assert torch.equal(ours["loss"], stored["loss"])
    assert distance(ours, stored) < 0.01


def test_a_low_precision_network_carries_a_float32_stream():
    net, x = sequence(dtype=torch.bfloat16, depth=24), image(dtype=torch.bfloat16)
    assert net(x).dtype == torch.bfloat16
    ours, stored = gradients(net, x), gradients(twin_of(net), x)
    assert distance(ours, stored) < 1e-3  # 0.03 with a bfloat16 stream

    with torch.no_grad():  # the inverse also rounds only at its ends
        whole, rounded = net.inverse(net(x)), net(x)
        for block in reversed(net.blocks):
            rounded = block.inverse(rounded)
        assert (whole - x).norm() < 0.7 * (rounded - x).norm()


def test_no_grad_creates_no_recompute_context(monkeypatch):
    monkeypatch.setattr(RecomputeContext, "__init__", lambda self: pytest.fail("a context under no_grad"))
    with torch.no_grad():
        sequence()(image())
    with torch.inference_mode():
        sequence()(image())


def test_batchnorm_statistics_are_updated_once():
    net, x = sequence(norm="batch"), image()
    twin = twin_of(net)
    for model in (net, twin):
        model(x).sum().backward()
    for (name, ours), (_, stored) in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(ours, stored), name


def test_frozen_parameters_get_no_gradient():
    net = sequence()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("weight" not in name)
    assert_same_as_stored(net, image())


def test_an_output_changed_in_place_raises_an_error_with_the_block():
    y = sequence(depth=3)(image())
    with pytest.raises(RuntimeError, match=r"changed in place after blocks\.2\.g.*clone"):
        torch.relu_(y).sum().backward()


def test_a_parameter_changed_before_backward_raises_an_error():
    net = sequence()
    loss = net(image()).sum()
    with torch.no_grad():
        net.blocks[1].f[0].bias.add_(1)  # autograd does not save a bias; only the replay reads it
    with pytest.raises(RuntimeError, match=r"blocks\.1\.f was changed in place.*before the optimizer"):
        loss.backward()


def test_a_branch_that_saves_other_tensors_when_rebuilt_raises_an_error():
    class Fickle(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x.sin() if self.calls == 1 else x.sin().cos()

    net = sequence(branch=Fickle, depth=1)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.g saved 2 tensors .* and 1 .*recompute=False"):
        net(image().requires_grad_()).sum().backward()


def test_a_branch_that_changes_its_input_raises_an_error():
    net = sequence(branch=lambda c: nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="changed its input in place"):
        net(image())


def test_a_saved_tensor_changed_in_place_in_the_branch_raises_an_error():
    class Overwrites(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            hidden = x + 1
            value = hidden * self.scale  # saves hidden
            hidden.add_(1)
            return value

    for net in (sequence(branch=Overwrites), twin_of(sequence(branch=Overwrites))):
        with pytest.raises(RuntimeError, match=r"in ?place"):
            net(image().requires_grad_()).sum().backward()


def test_invalid_shapes_raise_errors():
    with pytest.raises(ValueError, match=r"even number of channels.*\(2, 3, 6, 6\)"):
        sequence()(image(channels=3))
    with pytest.raises(ValueError, match="must keep the shape"):
        ReversibleSequence([AdditiveCoupling(nn.Conv2d(2, 3, 1), nn.Identity())])(image(dtype=torch.float32))

    class Sub(AdditiveCoupling):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match=r"block 0 .* Sub, which overrides forward\(\) and not inverse\(\)"):
        ReversibleSequence([Sub(nn.Identity(), nn.Identity())])
    with pytest.raises(TypeError, match=r"block 0 .* Conv2d, .*wrap its two branches"):
        ReversibleSequence([nn.Conv2d(4, 4, 1)])


def test_replay_restores_the_buffers_of_spectral_norm():
    def branch(channels):
        return nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))

    assert_same_as_stored(sequence(branch=branch), image())
