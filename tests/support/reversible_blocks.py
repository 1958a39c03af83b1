"""Small branches, and the comparison with stored activations, for the tests of this folder."""

import copy

import torch
from torch import nn

from memsave.reversible import AdditiveCoupling, ReversibleSequence


def conv_branch(channels, *, dropout=0.0, norm="group"):
    norms = {"group": nn.GroupNorm(1, channels), "batch": nn.BatchNorm2d(channels), "none": nn.Identity()}
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norms[norm], nn.SiLU(), nn.Dropout(dropout))


def sequence(depth=3, channels=4, *, branch=conv_branch, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    blocks = [
        AdditiveCoupling(branch(channels // 2, **options), branch(channels // 2, **options)) for _ in range(depth)
    ]
    return ReversibleSequence(blocks).to(dtype)


def twin_of(net):
    """A copy of the network with stored activations."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, ReversibleSequence):
            module.recompute = False
    return twin


def gradients(net, x, *, seed=1, loss=lambda y: y.square().mean()):
    """The loss of one step, and the gradients of the input and every parameter."""
    torch.manual_seed(seed)
    net.zero_grad()
    x = x.clone().requires_grad_()
    value = loss(net(x))
    value.backward()
    return {"loss": value.detach(), "x": x.grad, **{n: p.grad for n, p in net.named_parameters()}}


def assert_same(ours, stored, *, rtol=1e-9, atol=1e-12):
    assert ours.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_as_stored(net, x, **options):
    twin = twin_of(net)  # before the step, which may update buffers
    assert_same(gradients(net, x, **options), gradients(twin, x, **options))


class Twice(nn.Module):
    """Applies one network twice."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(self.net(x).tanh())


class Counting(nn.Module):
    """Counts its forward calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def count_in(net):
    """Wrap every branch of the network's sequences in a counter; returns the counters."""
    counters = []
    for module in net.modules():
        if isinstance(module, AdditiveCoupling):
            module.f, module.g = Counting(module.f), Counting(module.g)
            counters += [module.f, module.g]
    return counters
