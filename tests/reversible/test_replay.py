"""A replay reads the state of the first evaluation, or raises an error if that state is lost."""

import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from memsave.reversible.recompute_context import RecomputeContext
from tests.reversible.test_sequence import image
from tests.support.reversible_blocks import assert_same, assert_same_as_stored, conv_branch, sequence, twin_of

pytestmark = pytest.mark.usefixtures("device")


class Scaled(nn.Module):
    """sin(x) times a parameter and two buffers."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1))
        self.register_buffer("table", torch.rand(1, channels, 1, 1))
        self.register_buffer("mask", torch.tensor([True, False]).repeat(channels)[:channels].view(1, -1, 1, 1))

    def forward(self, x):
        return (x * self.weight).sin() * (self.table + self.mask)


def replace_parameter(branch):
    branch.weight = nn.Parameter(torch.full_like(branch.weight, 3.0))


def replace_float_buffer(branch):
    branch.table = branch.table + 5


def replace_bool_buffer(branch):
    branch.mask = ~branch.mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [replace_parameter, replace_float_buffer, replace_bool_buffer])
def test_replaced_tensors_are_restored_for_the_replay(change, training):
    def step(net):
        net.train(training)
        x = image().requires_grad_()
        first = list(net.parameters())
        loss = net(x).square().mean()
        for block in net.blocks:
            change(block.f)
        loss.backward()
        return {"x": x.grad, **{str(n): p.grad for n, p in enumerate(first)}}

    net = sequence(branch=Scaled)
    twin = twin_of(net)
    assert_same(step(net), step(twin))
    for (name, ours), (_, stored) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(ours, stored), name  # the replacement is restored after the replay


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda branch: branch.weight.mul_(2),
        lambda branch: branch.table.mul_(2),
        lambda branch: branch.mask.zero_(),
        lambda branch: setattr(branch.weight, "data", branch.weight.data.clone()),
    ],
    ids=["parameter", "float buffer", "bool buffer", "parameter by .data ="],
)
def test_tensors_changed_in_place_raise_an_error(change, training):
    net = sequence(branch=Scaled, channels=8196).train(training)  # buffers too large to be copied
    loss = net(image(batch=1, channels=8196, size=1).requires_grad_()).sum()
    with torch.no_grad():
        change(net.blocks[1].f)
    with pytest.raises(RuntimeError, match=r"changed in place between forward and backward"):
        loss.backward()


def test_a_branch_whose_saved_tensors_depend_on_requires_grad_is_exact():
    class Exponential(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(1, channels, 1, 1))

        def forward(self, x):
            return (x * self.weight.exp()).sin()  # the product saves exp(w) only if x requires a gradient

    net, x = sequence(branch=Exponential), image()
    twin = twin_of(net)
    for model in (net, twin):
        model(x).square().mean().backward()
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()})


def test_a_frozen_parameter_changed_in_place_raises_an_error():
    class Frozen(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1), requires_grad=False)

        def forward(self, x):
            return x * self.scale

    net = sequence(branch=Frozen)
    loss = net(image().requires_grad_()).sum()
    net.blocks[0].f.scale.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


class OwnGenerator(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(5)

    def forward(self, x):
        return self.conv(x).sin() * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)

    def __deepcopy__(self, memo):
        twin = OwnGenerator(self.conv.in_channels).double()
        twin.load_state_dict(self.state_dict())
        return twin


class PythonNumbers(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.conv(x).sin() * random.random() * np.random.rand()


class OwnNumbers(nn.Module):
    """Stores generators of NumPy and Python in attributes and in a list."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.new, self.old = np.random.default_rng(1), np.random.RandomState(2)
        self.others = [random.Random(3), {"torch": torch.Generator(torch.get_default_device()).manual_seed(4)}]

    def forward(self, x):
        python, kept = self.others
        factors = self.new.random(), self.old.rand(), python.random()
        return self.conv(x).sin() * np.prod(factors) * torch.rand(1, generator=kept["torch"], dtype=x.dtype)

    def __deepcopy__(self, memo):
        twin = OwnNumbers(self.conv.in_channels).double()
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("branch", [OwnGenerator, OwnNumbers, PythonNumbers])
def test_every_random_generator_is_replayed_and_continues_as_with_stored_activations(branch):
    net = sequence(branch=branch)

    def step(model):
        random.seed(1)
        np.random.seed(1)
        model.zero_grad()
        model(image()).square().mean().backward()
        after = torch.tensor([random.random(), np.random.rand()])
        own = [m.generator.get_state() for m in model.modules() if isinstance(m, OwnGenerator)]
        return {**{n: p.grad for n, p in model.named_parameters()}, "after": after, **dict(enumerate(own))}

    twin = twin_of(net)
    assert_same(step(net), step(twin))


def test_training_flags_may_change_before_backward():
    def step(net):
        torch.manual_seed(0)
        x = image().requires_grad_()
        loss = net(x).square().mean()
        net.eval()
        loss.backward()
        assert not net.blocks[0].f.training
        return {"x": x.grad}

    net = sequence(dropout=0.4)
    twin = twin_of(net)
    assert_same(step(net), step(twin))


def test_functional_call_with_other_parameters_is_exact():
    net, x = sequence(), image()
    twin = twin_of(net)
    others = {name: (p.detach() * 1.5).requires_grad_() for name, p in net.named_parameters()}
    results = [
        torch.autograd.grad(torch.func.functional_call(model, others, (x,)).square().sum(), list(others.values()))
        for model in (net, twin)
    ]
    for ours, stored in zip(*results, strict=True):
        torch.testing.assert_close(ours, stored, rtol=1e-9, atol=1e-12)


def test_lazy_layers_and_inference_tensors_are_exact():
    assert_same_as_stored(sequence(branch=lambda c: nn.Sequential(nn.LazyConv2d(c, 1), nn.Tanh())), image())

    class Cached(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.register_buffer("table", None)

        def forward(self, x):
            if self.table is None:
                self.table = torch.ones(1, dtype=x.dtype)
            return x.sin() + self.table

    net = sequence(branch=Cached)
    with torch.inference_mode():
        net(image())
    net(image().requires_grad_()).sum().backward()


def test_a_tensor_stored_elsewhere_in_a_replay_raises_an_error():
    class Aside(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            self.aside = self.conv(x).sin()
            return self.aside

    net = sequence(branch=Aside)
    net(image()).sum().backward()
    with pytest.raises(RuntimeError, match="stored elsewhere while its activations were rebuilt"):
        net.blocks[0].f.aside.sum().backward()


def test_constant_tables_are_not_copied():
    class Table(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.register_buffer("table", torch.ones(1, channels, 128, 128))

        def forward(self, x):
            return (x * self.table).sin()

    net, held = sequence(depth=4, branch=Table, dtype=torch.float32), []
    clone = torch.Tensor.clone

    def watched(tensor, *args, **options):
        copy = clone(tensor, *args, **options)
        if tensor.shape[-1] == 128 and not tensor.requires_grad:
            held.append(weakref.ref(copy))
        return copy

    torch.Tensor.clone = watched
    try:
        y = net(torch.randn(1, 4, 128, 128, requires_grad=True))
    finally:
        torch.Tensor.clone = clone
    assert held and all(reference() is None for reference in held)
    y.sum().backward()


def test_a_saved_tensor_opened_twice_costs_one_more_evaluation():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            (x,), (again,) = ctx.saved_tensors, ctx.saved_tensors
            return grad * (x + again).div(2).cos()

    calls = []

    class Branch(nn.Module):
        def __init__(self, channels):
            super().__init__()

        def forward(self, x):
            calls.append(1)
            return Twice.apply(x)

    for depth in (4, 16):
        calls.clear()
        net = sequence(depth, branch=Branch)
        assert_same_as_stored(net, image())
        # forward, rebuild, reopened handle; and the forward with stored activations
        assert len(calls) == (3 + 1) * 2 * depth


def test_a_backward_after_a_failed_one_is_exact(monkeypatch):
    net, x = sequence(depth=3, branch=conv_branch), image().requires_grad_()
    twin = twin_of(net)
    y = net(x)
    failing = net.blocks[1].g[2]
    original = failing.forward
    monkeypatch.setattr(failing, "forward", lambda value: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        y.sum().backward(retain_graph=True)
    monkeypatch.setattr(failing, "forward", original)
    net.zero_grad()
    x.grad = None
    y.sum().backward()
    ours = x.grad
    (stored,) = torch.autograd.grad(twin(x).sum(), x)
    torch.testing.assert_close(ours, stored, rtol=1e-9, atol=1e-12)


class OnTheCpu(nn.Module):
    """Computes a part of the branch on the CPU, whose nodes autograd runs in another thread than those of a GPU."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1, device="cpu"))

    def forward(self, x):
        return self.conv(x.sin()) + (self.scale.exp() * x.cpu().cos()).to(x.device)


def test_a_branch_on_two_devices_is_exact():
    assert_same_as_stored(sequence(branch=OnTheCpu), image())


@pytest.mark.parametrize("several", [True, False])
def test_a_late_handle_of_another_device_is_opened_after_autograd_has_freed_the_output(several, monkeypatch):
    contexts = []
    original = RecomputeContext.run

    def run(context, step, stream):
        after = original(context, step, stream)
        context.several_devices = several
        contexts.append(context)
        return after

    monkeypatch.setattr(RecomputeContext, "run", run)
    net, x = sequence(branch=Scaled), image().requires_grad_()
    net(x).sum().backward()
    last = len(contexts[0].records) - 1
    if several:
        assert isinstance(contexts[0].open(last, 0), torch.Tensor)
    else:
        with pytest.raises(RuntimeError, match="freed"):
            contexts[0].open(last, 0)


def test_parameters_frozen_between_forward_and_backward_are_exact():
    net, x = sequence(branch=Scaled), image().requires_grad_()
    found = []
    for model in (net, twin_of(net)):
        loss = model(x).square().mean()
        model.requires_grad_(False)
        found.append(torch.autograd.grad(loss, x))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(*found)
