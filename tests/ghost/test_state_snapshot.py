"""Buffers and parameters that a forward changes would be released without noise: they are refused by name."""

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper, snapshot
from memsave.ghost.late_checks import LateChecks
from tests.ghost.test_layers import draw, losses_of

pytestmark = pytest.mark.usefixtures("device")


class Keeps(nn.Module):
    """Writes information about the examples into one of its tensors."""

    def __init__(self, kind, write, size=8):
        super().__init__()
        self.layer, self.write = nn.Linear(size, size), write
        if kind == "buffer":
            self.register_buffer("kept", torch.zeros(size))
        else:
            self.kept = nn.Parameter(torch.zeros(size), requires_grad=False)

    def forward(self, x):
        self.write(self, x.detach().mean(0))
        return self.layer(x) + self.kept


def in_place(self, seen):
    self.kept += seen


def through_data(self, seen):
    self.kept.data.mul_(0.9).add_(seen)


def one_value_through_data(self, seen):
    self.kept.data[3] = seen[3]


def another_tensor(self, seen):
    self.kept.data = self.kept.data + seen


@pytest.mark.parametrize("passes", [1, 2, "direct"])
@pytest.mark.parametrize("write", [in_place, through_data, one_value_through_data, another_tensor])
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_a_tensor_that_the_forward_changes_is_refused_by_name(kind, write, passes):
    model = nn.Sequential(nn.Linear(8, 8), Keeps(kind, write)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    with pytest.raises(ValueError, match=rf"1\.kept is a {kind} that the forward changed.*released without noise"):
        clipper.backward(losses_of(model, draw(1, 8)))
    assert all(p.grad is None for p in model.parameters())


def test_a_trainable_parameter_that_the_forward_changes_is_refused():
    class Renormalised(nn.Linear):
        def forward(self, x):
            self.weight.data /= self.weight.data.norm() * x.detach().norm()
            return super().forward(x)

    model = nn.Sequential(Renormalised(4, 4)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"0\.weight is a parameter that the forward changed"):
        clipper.backward(losses_of(model, draw(3, 4)))


@pytest.mark.parametrize("passes", [1, "direct"])
def test_batchnorm_in_train_mode_is_refused_whatever_the_passes(passes):
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) makes"):
        GhostClipper(model, max_grad_norm=1.0, passes=passes)
    clipper = GhostClipper(model.eval(), max_grad_norm=1.0, passes=passes)
    model.train()
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) makes"):
        clipper.backward(losses_of(model, torch.randn(1, 2, 5)))


def test_unchanged_tensors_are_accepted_and_may_change_between_forwards():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)).double()
    model[1].running_mean[0] = float("nan")  # not finite, and the same
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("nothing", torch.zeros(0))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for _ in range(3):
        clipper.backward(losses_of(model, draw(3, 4)))
        model.count += 1
        with torch.no_grad():
            model[2].weight.mul_(0.5)


def test_large_tensors_of_any_layout_are_compared():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)
            self.kept = nn.Parameter(torch.randn(64, 32, 5, 5), requires_grad=False)
            self.kept.data = self.kept.data.to(memory_format=torch.channels_last)

        def forward(self, x):
            self.kept.data.mul_(0.99)
            return self.layer(x)

    model = Large()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="kept is a parameter that the forward changed"):
        clipper.backward(losses_of(model, torch.randn(2, 3, 4, 4)))


class Fills(nn.Module):
    """Fills an empty buffer, or registers a new one."""

    def __init__(self, new, persistent=True):
        super().__init__()
        self.layer, self.new, self.persistent = nn.Linear(4, 4), new, persistent
        if not new:
            self.register_buffer("mean", None, persistent=persistent)

    def forward(self, x):
        if self.new and "mean" not in self._buffers:
            self.register_buffer("mean", x.detach().mean(0), persistent=self.persistent)
        self.mean = x.detach().mean(0)
        return self.layer(x)


@pytest.mark.parametrize("new", [True, False])
def test_a_buffer_that_the_forward_fills_or_registers_is_refused(new):
    model = nn.Sequential(Fills(new)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"0\.mean is a buffer that the forward changed"):
        clipper.backward(losses_of(model, draw(3, 4)))


def test_a_change_is_refused_before_anything_is_added_to_grad():
    model = nn.Sequential(nn.Linear(8, 8), Keeps("buffer", through_data)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"1\.kept is a buffer that the forward changed"):
        output = model(draw(3, 8))  # where values can be read without waiting for a GPU, the forward raises already
        assert output.device.type == "cuda"
        clipper.backward(output.square().sum(1))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("passes", "clipping"),
    [("auto", "flat"), (2, "flat"), ("direct", "flat"), ("auto", "per_layer"), ("direct", "per_layer")],
)
def test_a_change_of_values_on_a_gpu_is_refused_before_anything_is_added_to_grad(passes, clipping, monkeypatch):
    monkeypatch.setattr("memsave.ghost.late_checks.is_slow_to_read", lambda tensor: True)
    model = nn.Sequential(nn.Linear(8, 8), Keeps("parameter", through_data)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes, clipping=clipping)
    losses = model(draw(1, 8)).square().sum(1)
    with pytest.raises(ValueError, match=r"1\.kept is a parameter that the forward changed"):
        clipper.backward(losses)
    assert all(p.grad is None for p in model.parameters())
    assert not clipper.unfinished


def test_a_parameter_whose_type_the_forward_changes_is_refused():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer.to(torch.float32)(x.float()).to(x.dtype)

    model = nn.Sequential(nn.Linear(4, 4), Casts(), nn.Linear(4, 2)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"1\.layer\.weight, 1\.layer\.bias: each is a parameter that the forward"):
        clipper.backward(losses_of(model, draw(3, 4)))


def test_nan_equals_nan_and_nothing_else():
    nan = float("nan")
    one, other = torch.tensor([1.0, nan, nan, 1.0, 2.0]), torch.tensor([1.0, nan, 1.0, nan, 3.0])
    assert snapshot._equal(one, other).tolist() == [True, True, False, False, False]


def test_a_change_in_place_is_found_beside_the_elements_that_are_compared():
    layer = nn.Linear(500, 500)
    found = snapshot.StateSnapshot(layer.named_modules())
    with torch.no_grad():
        layer.weight[0, 1] += 1
    assert [each.name for each in found.changes(LateChecks())] == ["weight"]
