"""Layers without a rule that draw random numbers, keep weights, or get examples in arguments that are no tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from tests.ghost.test_followed_layers import Own
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact, by_loop

pytestmark = pytest.mark.usefixtures("device")


class Rezero(nn.Module):
    """A block behind a gate of zero, so that random numbers inside do not change the output."""

    def __init__(self, draw_mask, gate=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.inner, self.draw_mask = nn.Parameter(torch.full((1,), gate)), nn.Linear(3, 3), draw_mask

    def forward(self, x):
        return x + self.gate * self.draw_mask(self.inner(x).tanh())


def by_item(y):
    """Draws random numbers, and is not supported by vmap."""
    return F.dropout(y, 0.5) if y.abs().max().item() < 1e9 else y


@pytest.mark.parametrize("gate", [0.0, 1e-6])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("mask", [lambda y: F.dropout(y, 0.5), lambda y: y * torch.rand_like(y), by_item])
def test_random_numbers_inside_a_layer_are_exact(mask, batch, passes, gate):
    model = nn.Sequential(nn.Linear(3, 3), Rezero(mask, gate)).double()
    assert_exact(model, draw(batch, 20, 3), losses_of, passes=(passes,))


def test_dropout_of_probability_zero_draws_nothing():
    assert_exact(
        nn.Sequential(nn.Linear(3, 3), Rezero(lambda y: F.dropout(y, 0.0), 0.3)).double(), draw(4, 3), losses_of
    )


class Caches(Own):
    """Computes its weight once."""

    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.scale / self.scale.norm()
        return x * self.kept


@pytest.mark.parametrize("passes", [1, 2])
def test_a_weight_from_an_earlier_forward_is_exact_until_the_parameter_changes(passes):
    model = nn.Sequential(nn.Linear(3, 3), Caches()).double()
    clipper = GhostClipper(model, max_grad_norm=1e9, passes=passes)
    losses_of(model, draw(4, 3))
    clipper.backward(losses_of(model, draw(4, 3)))
    clipped = [p.grad for p in model.parameters()]
    clipper.close()
    model.zero_grad()
    model[1].kept = None
    losses_of(model, draw(4, 3)).sum().backward()
    for p, grad in zip(model.parameters(), clipped, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)
    clipper.attach()
    with torch.no_grad():
        model[1].scale.add_(1.0)
    losses = losses_of(model, draw(4, 3))
    with pytest.raises(ValueError, match=r"cannot be traced back.*compute it anew in each forward"):
        clipper.backward(losses)


def test_parametrisations_that_are_cached_are_exact():
    from torch.nn.utils import parametrizations, parametrize

    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3).double()))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with parametrize.cached():
        norms = clipper.backward(losses_of(model, draw(4, 3)))
        again = clipper.backward(losses_of(model, draw(4, 3)))
    clipper.close()
    expected, _ = by_loop(model, draw(4, 3), losses_of, max_grad_norm=1.0)
    for found in (norms, again):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


class Opaque:
    """Holds a tensor in an attribute."""

    def __init__(self, x):
        self.x = x


class TakesOpaque(Own):
    def forward(self, holder):
        return holder.x * self.scale


class PassesOpaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = TakesOpaque(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(Opaque(x)))


@pytest.mark.parametrize("batch", [1, 4])
def test_examples_in_an_argument_that_is_no_tensor_are_exact(batch):
    assert_exact(PassesOpaque().double(), draw(batch, 3), losses_of)


class TiedBesideAParameter(nn.Module):
    """A small language model whose positions are a separate parameter, with a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Parameter(torch.randn(6, 4))
        self.look, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.look.weight

    def forward(self, ids):
        return self.head(self.look(ids) + self.positions[: ids.shape[1]])


def test_a_parameter_with_two_names_inside_a_layer_is_exact():
    assert_exact(TiedBesideAParameter().double(), torch.randint(9, (4, 6)), losses_of)


def test_a_checkpoint_inside_a_layer_is_exact():
    class Block(Own):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) * self.scale

    assert_exact(nn.Sequential(nn.Linear(3, 3), Block()).double(), draw(4, 3), losses_of)


def test_a_parameter_that_a_rule_does_not_know_is_exact():
    class Scaled(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.layer, self.inside = nn.Linear(3, 3), inside
            self.layer.scale = nn.Parameter(torch.rand(3))

        def forward(self, x):
            return self.layer(x) if self.inside else self.layer(x) * self.layer.scale

    for inside in (True, False):
        assert_exact(Scaled(inside).double(), draw(4, 3), losses_of)


def test_a_linear_layer_whose_input_lost_its_batch_is_refused():
    model = nn.Sequential(nn.Linear(3, 8), nn.Flatten(0), nn.Linear(8, 1)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"2 \(Linear\) got an input of shape \(8,\), which has no batch"):
        clipper.backward(model(draw(1, 3)))


def test_sparse_bags_are_refused():
    model = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 2))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"0\.weight is used with max_norm, scale_grad_by_freq or sparse"):
        clipper.backward(model(torch.randint(9, (4, 6))).sum(1))
    assert_exact(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)).double(), torch.randint(9, (4, 6)), losses_of)


class Shifted(Own):
    """Adds a bias that a softmax over the positions cancels."""

    def forward(self, x):
        return x + self.scale


def test_a_gradient_that_cancels_to_zero_is_accepted():
    model = nn.Sequential(nn.Linear(3, 3), Shifted(), nn.Linear(3, 1)).double()
    assert_exact(model, draw(4, 20, 3), lambda m, b: m(b).squeeze(-1).log_softmax(1)[:, 0].neg(), passes=(1, 2))


def test_a_layer_that_computes_in_float32_inside_is_accepted():
    class Narrow(Own):
        def forward(self, x):
            return (x.float() * self.scale.float()).to(x.dtype)

    assert_exact(nn.Sequential(nn.Linear(3, 3), Narrow()).double(), draw(4, 20, 3), losses_of, rtol=1e-5)


def test_a_layer_with_a_cache_argument_is_exact():
    class GrowingCache:
        def __init__(self):
            self.calls = 0

    class UsesCache(Own):
        def forward(self, x, *, past):
            past.calls += 1
            return x * self.scale * past.calls

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(3, 3), UsesCache()

        def forward(self, x):
            return self.layer(self.first(x), past=GrowingCache())

    assert_exact(Model().double(), draw(4, 3), losses_of)


def test_a_layer_that_the_first_forward_skips_is_exact():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.own, self.skips = nn.Linear(3, 3), Own(), True

        def forward(self, x):
            y = self.first(x)
            return y if self.skips else self.own_scaled(y)

        def own_scaled(self, y):
            return y * self.own.scale

    model = Skipping().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, draw(4, 3)))
    model.skips = False
    norms, _ = by_loop(copy.deepcopy(model), draw(4, 3), losses_of, max_grad_norm=1.0)
    torch.testing.assert_close(clipper.backward(losses_of(model, draw(4, 3))), norms, rtol=1e-9, atol=0)
