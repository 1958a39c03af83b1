"""Layers and losses that mix examples are refused; tensors that only are as long as the batch are recognised."""

import logging

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from memsave.ghost.independence import layers_reached
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact

pytestmark = pytest.mark.usefixtures("device")


class Around(nn.Module):
    """Another function around a linear layer."""

    def __init__(self, around, layer=None):
        super().__init__()
        self.first, self.layer, self.around = nn.Linear(3, 3), layer or nn.Linear(3, 3), around

    def forward(self, x):
        return self.around(self.layer, self.first(x))


def time_first(layer, x):
    return layer(x.transpose(0, 1)).transpose(0, 1)


def centred(layer, x):
    return layer(x) - layer(x).mean(0)


def neighbours(layer, x):
    return layer(x) * x.roll(1, 0)


def halves(layer, x):
    one, other = layer(x).chunk(2)
    return torch.cat([one + other, one - other])


def by_two(layer, x):
    return layer(x) + layer(x).roll(2, 0)


def from_last_to_first(layer, x):
    y = layer(x)
    return torch.cat([y[:1] + y[-1:], y[1:]])


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("around", [centred, neighbours, halves, by_two, from_last_to_first])
def test_a_model_that_mixes_examples_is_refused_by_layer(around, passes):
    model = Around(around).double()
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    with pytest.raises(ValueError, match=r"examples are not independent at (first|layer): .*batch in dimension 0"):
        clipper.backward(losses_of(model, draw(4, 4, 3)))  # as many positions as examples
    assert all(p.grad is None for p in model.parameters())


def test_layers_with_time_first_are_exact_even_if_there_are_as_many_positions_as_examples():
    assert_exact(Around(time_first).double(), draw(4, 4, 3), losses_of)


def test_losses_that_mix_examples_are_refused():
    model = nn.Linear(3, 2).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(4, 3))
    with pytest.raises(ValueError, match="examples are not independent at the model"):
        clipper.backward(losses / losses.sum())


def test_positions_without_a_batch_are_exact_even_if_there_are_as_many_as_examples():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.look = nn.Embedding(4, 3)

        def forward(self, x):
            return x + self.look(torch.arange(x.shape[1]))

    model = Positions().double()
    for batch in (1, 2, 4):
        assert_exact(model, draw(batch, 4, 3), losses_of)


def test_an_embedding_of_one_index_for_each_example_is_exact():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.mix = nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, rows):
            return self.mix(self.look(rows))

    assert_exact(Classes().double(), torch.tensor([1, 3, 1, 0, 2]), losses_of)


class Table(nn.Module):
    """A layer whose second input has no batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 4))

    def forward(self, x, table, *, mask=None):
        y = x * (self.scale[: len(table)] @ table[: self.scale.shape[1]]).sin()
        return y if mask is None else y * mask[:, None, None]


class Tabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Table()

    def forward(self, x):
        return self.layer(x, draw(4, 4), mask=torch.arange(1, len(x) + 1, dtype=x.dtype))


@pytest.mark.parametrize("batch", [1, 3, 4])  # 4: as long as the table
def test_a_layer_without_a_rule_and_with_a_table_as_long_as_the_batch_is_exact(batch):
    torch.manual_seed(0)
    assert_exact(Tabled().double(), draw(batch, 4, 4), losses_of)


def test_a_table_as_long_as_a_later_batch_is_exact():
    torch.manual_seed(0)
    model = Tabled().double()
    clipper = GhostClipper(model, max_grad_norm=1e9)
    clipper.backward(losses_of(model, draw(3, 4, 4)))
    model.zero_grad()
    clipper.backward(losses_of(model, draw(4, 4, 4)))
    ours = model.layer.scale.grad.clone()
    clipper.close()
    model.zero_grad()
    losses_of(model, draw(4, 4, 4)).sum().backward()
    torch.testing.assert_close(ours, model.layer.scale.grad)


class Whitened(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return (x - x.mean(0)) * self.scale


class Random(Whitened):
    def forward(self, x):
        return x * torch.rand_like(x) * self.scale


def test_a_layer_without_a_rule_that_mixes_examples_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), Whitened().to(torch.get_default_device()))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = model(torch.randn(4, 3)).sum(1)
    with pytest.raises(ValueError, match="examples are not independent at 0"):
        clipper.backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_without_a_rule_that_draws_random_numbers_is_exact():
    assert_exact(nn.Sequential(nn.Linear(3, 3), Random()).double(), draw(4, 3), losses_of)


@pytest.mark.parametrize("frozen", [True, False])
def test_batchnorm_is_refused_while_it_uses_the_batchs_statistics(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[1].running_var.uniform_(0.5, 2)
    model[1].requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) makes .*GroupNorm.*eval mode"):
        GhostClipper(model, max_grad_norm=1.0)
    model.eval()
    assert_exact(model, draw(4, 3), losses_of)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) makes"):
        clipper.backward(losses_of(model.train(), draw(4, 3)))


def test_instancenorm_is_exact_and_refused_where_it_keeps_statistics():
    kept = nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True, track_running_stats=True))
    with pytest.raises(ValueError, match=r"1 \(InstanceNorm1d\) tracks .*track_running_stats=False"):
        GhostClipper(kept, max_grad_norm=1.0)
    own = nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.Conv1d(4, 2, 1)).double()
    assert_exact(own, draw(3, 2, 5), losses_of)


def test_auto_logs_which_passes_it_takes(caplog):
    from tests.ghost.test_clipper import Checkpointed, small

    caplog.set_level(logging.INFO, logger="memsave.ghost")
    for make, chosen in ((small, 1), (Checkpointed, 2)):
        model = make().double()
        clipper = GhostClipper(model, max_grad_norm=1.0)
        assert clipper.chosen_passes is None
        for _ in range(2):
            clipper.backward(losses_of(model, draw(2, 4)))
        assert clipper.chosen_passes == chosen
    messages = [record.getMessage() for record in caplog.records]
    assert [each.split(":")[0] for each in messages] == ["passes='auto' takes 1", "passes='auto' takes 2"]


def test_a_buffer_that_the_forward_changes_is_refused():
    class Tracking(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return super().forward(x)

    model = nn.Sequential(Tracking(), nn.Linear(3, 3))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"0\.mean is a buffer that the forward changed"):
        clipper.backward(model(torch.randn(4, 3)).sum(1))


def test_a_graph_with_many_paths_is_walked_once():
    model, x = nn.Linear(3, 3).double(), draw(4, 3)
    GhostClipper(model, max_grad_norm=1.0)
    y = model(x)
    for _ in range(50):
        y = y + y
    assert layers_reached(y) == {"the model"}
