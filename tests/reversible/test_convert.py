"""Finished models made reversible in place: what is found, that they train as stored, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from memsave.profiler import MemoryRecorder
from memsave.reversible import make_reversible

pytestmark = pytest.mark.usefixtures("device")


class Residual(nn.Module):
    def __init__(self, width, *, stride=1, dropout=0.0):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv1d(width, width, 3, stride=stride, padding=1)
        self.drop = nn.Dropout(dropout)
        self.last = nn.GroupNorm(1, width)
        self.stride = stride

    def forward(self, x, scale=None):
        y = self.last(self.drop(torch.tanh(self.conv(self.norm(x)))))
        y = y if scale is None else y * scale
        return x[..., :: self.stride] + y


class Plain(nn.Module):
    """A block without a way around it."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Blocks in a Sequential, and blocks that a loop calls with another argument."""

    def __init__(self, depth=4, **options):
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, padding=1)
        self.first = nn.Sequential(*(Residual(6, **options) for _ in range(depth)))
        self.down = Residual(6, stride=2)
        self.second = nn.ModuleList(Residual(6, **options) for _ in range(3))
        self.plain = nn.Sequential(Plain(6), Plain(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.down(self.first(self.stem(x)))
        scale = torch.ones(1, device=x.device, dtype=x.dtype)
        for block in self.second:
            x = block(x, scale)
        return self.head(self.plain(x).mean(-1))


def made(**options):
    torch.manual_seed(0)
    return Net(**options).double()


def draw(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(1)
    )


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_rows_are_found_and_train_as_stored():
    model, x = made(dropout=0.2), draw(3, 2, 8)
    names = list(model.state_dict())
    conversion = make_reversible(model, x)
    assert [row.names for row in conversion.rows] == [
        [f"first.{number}" for number in range(4)],
        [f"second.{number}" for number in range(3)],
    ]
    assert "first.0 to 3: 4 blocks of Residual are reversible" in str(conversion)
    assert list(model.state_dict()) == names
    rebuilt = gradients(model, x)
    conversion.recompute(False)
    stored = gradients(model, x)
    assert rebuilt.keys() == stored.keys() and all(each.abs().sum() > 0 for each in stored.values())
    for name, each in stored.items():
        torch.testing.assert_close(rebuilt[name], each, rtol=0, atol=1e-10)
    assert conversion.verify(x).ok


def test_the_function_is_the_midpoint_rule_and_can_be_undone():
    model, x = made(), draw(3, 2, 8)
    before = model(x)
    conversion = make_reversible(model, x)
    assert not torch.allclose(model(x), before)
    h = model.stem(x)
    one = other = h  # the midpoint rule, written out
    blocks = [conversion.rows[0].originals[number] for number in range(4)]
    assert blocks == [None] * 4
    for number, block in enumerate(conversion.rows[0].blocks):
        added = 2 * (Residual.forward(block, other if number % 2 == 0 else one) - (other if number % 2 == 0 else one))
        one, other = (one + added, other) if number % 2 == 0 else (one, other + added)
    torch.testing.assert_close(model.first(h), (one + other) / 2, rtol=0, atol=1e-12)
    conversion.undo()
    assert torch.equal(model(x), before)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_activations_are_not_kept():
    def peak(convert):
        model, x = made(depth=12).float(), draw(8, 2, 256).float()
        if convert:
            make_reversible(model, x)
        with MemoryRecorder(model) as recorder:
            model(x).square().sum().backward()
        return recorder.report().peak_bytes

    assert peak(True) < 0.5 * peak(False)


def test_a_copy_has_rows_of_its_own():
    model, x = made(), draw(3, 2, 8)
    make_reversible(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    before = model(x)
    assert torch.equal(model(x), before) and not twin(x).any()
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_accumulate_over_two_forwards_before_the_backward():
    model, x, other = made(), draw(3, 2, 8), draw(2, 2, 8)
    conversion = make_reversible(model, x)
    found = []
    for recompute in (True, False):
        conversion.recompute(recompute)
        model.zero_grad()
        first, second = model(x), model(other)
        (first.sum() + second.square().sum()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Residual(2)

    def forward(self, x):
        return self.block(self.block(x))


class Alternating(nn.Module):
    """Blocks that get masks in turn."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(2) for _ in range(4))

    def forward(self, x):
        masks = [torch.ones(1, device=x.device, dtype=x.dtype), torch.zeros(1, device=x.device, dtype=x.dtype)]
        for number, block in enumerate(self.blocks):
            x = block(x, masks[number // 2])
        return x


def test_what_cannot_be_converted_is_said():
    x = draw(3, 2, 8)
    shared = make_reversible(Shared().double(), x)
    assert not shared.rows and "shared parameters" in str(shared)
    assert (
        str(make_reversible(nn.Sequential(nn.Conv1d(2, 2, 1)).double(), x)) == "the model has no row of residual blocks"
    )
    turns = make_reversible(Alternating().double(), x)
    assert [row.names for row in turns.rows] == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]


def test_blocks_that_run_in_another_order_are_refused():
    model, x = made(), draw(3, 2, 8)
    make_reversible(model, x)
    with pytest.raises(RuntimeError, match="did not get the output of first"):
        model.first[2](draw(3, 6, 8))
    with pytest.raises(ValueError, match="has reversible rows already"):
        make_reversible(model, x)
    turns = Alternating().double()
    make_reversible(turns, x)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    y = turns.blocks[0](x, one)
    with pytest.raises(RuntimeError, match="other arguments"):
        turns.blocks[1](y, zero)
