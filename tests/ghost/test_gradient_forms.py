"""Each form of a per-example gradient against the gradient itself."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, gradient_products
from memsave.ghost.gradient_products import cheapest_form, inner_products
from memsave.ghost.gradients import FactoredGrad, PerSampleGrad, ViewGrad
from memsave.ghost.ledger import Ledger, add_sum
from tests.ghost.test_layers import Head, draw, losses_of
from tests.support.per_example_reference import assert_exact, by_clipper

pytestmark = pytest.mark.usefixtures("device")

BATCH, ROWS, WIDTH = 3, 5, 4
KINDS = ["per sample", "factored", "factored transposed", "one-hot", "one-hot transposed", "lazy", "lazy transposed"]


class Lazy:
    """Output gradients (B, T, p) behind the methods of those that are not stored."""

    gram = None

    def __init__(self, values):
        self.values, self.shape = values, tuple(values.shape)

    def pairwise_products(self, other):
        return self.values @ (other.values if isinstance(other, Lazy) else other).transpose(1, 2)

    def gather(self, index):
        one_hot = (index[..., None] == torch.arange(self.shape[2])).to(self.values.dtype)
        return self.values @ one_hot.transpose(1, 2)

    def per_sample(self, activations):
        return self.values.transpose(1, 2) @ activations

    def matmul(self, values):
        return self.values @ values

    def add_sum(self, total, activations):
        total += self.per_sample(activations).sum(0)

    def masked(self, mask):
        return Lazy(self.values * mask[:, None, None])


def form(kind, *, positions=6, seed=0):
    """(the form, the gradient (B, ROWS, WIDTH) that it represents), computed without the code under test."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    transposed = kind.endswith("transposed")
    p, d = (WIDTH, ROWS) if transposed else (ROWS, WIDTH)
    output_grads = torch.randn(BATCH, positions, p, dtype=torch.float64, generator=generator)
    if kind.startswith("one-hot"):
        activations = torch.randint(-1, d, (BATCH, positions), generator=generator)  # -1: a vector of zeros
        activations[:, 0] = -1
        vectors = (activations[..., None] == torch.arange(d)).to(output_grads.dtype)
    else:
        vectors = activations = torch.randn(BATCH, positions, d, dtype=torch.float64, generator=generator)
    full = torch.stack(
        [sum(torch.outer(g, a) for g, a in zip(*pair, strict=True)) for pair in zip(output_grads, vectors, strict=True)]
    )
    full = full.transpose(1, 2) if transposed else full
    if kind == "per sample":
        return PerSampleGrad(full.clone()), full
    num_embeddings = d if kind.startswith("one-hot") else None
    output_grads = Lazy(output_grads) if kind.startswith("lazy") else output_grads
    return FactoredGrad(output_grads, activations, transposed=transposed, num_embeddings=num_embeddings), full


@pytest.fixture(params=[2**24, 1, 40], ids=["one tile", "a position a tile", "several tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(gradient_products, "TILE", request.param)


@pytest.mark.parametrize("positions", [1, 6, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_squared_norms_equal_those_of_the_full_gradients(kind, positions, tile):
    gradient, full = form(kind, positions=positions)
    expected = full.square().sum((1, 2))
    torch.testing.assert_close(inner_products(gradient, gradient), expected, rtol=1e-12, atol=0)
    for summed in (True, False):
        cheap = cheapest_form(gradient, summed=summed)
        torch.testing.assert_close(inner_products(cheap, cheap), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("batch", "positions", "p", "d", "summed", "formed"),
    [
        (8, 100, 768, 3072, True, False),  # Gram: few positions
        (2, 512, 768, 3072, True, True),  # formed: it replaces the sum's own product
        (2, 512, 768, 3072, False, False),  # ... and without that is not worth it
        (1, 1024, 768, 3072, False, True),
        (1, 100, 768, 3072, True, False),  # writing the gradient takes longer than Gram matrices
        (64, 1024, 768, 3072, True, True),
        (64, 512, 768, 3072, True, False),  # formed would be faster, but takes more memory
    ],
)
def test_the_cheapest_form_is_chosen_by_shape(batch, positions, p, d, summed, formed):
    with torch.device("meta"):
        gradient = FactoredGrad(torch.empty(batch, positions, p), torch.empty(batch, positions, d))
    assert isinstance(cheapest_form(gradient, summed=summed), PerSampleGrad) == formed


def test_layers_with_the_same_input_form_its_products_once(monkeypatch):
    monkeypatch.setattr(gradient_products, "TRIANGLE", 3)
    formed, gram_tiles = [], gradient_products._gram_tiles
    monkeypatch.setattr(gradient_products, "_gram_tiles", lambda a: (formed.append(a), gram_tiles(a))[1])

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x):  # (B, T, 8)
            y = self.o(x).tanh()
            return self.q(y) * torch.cat([self.k(y), self.v(y)], -1)

    torch.manual_seed(0)
    model, x = Attention().double(), draw(3, 7, 8)
    assert_exact(model, x, losses_of)
    formed.clear()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, x))
    assert len(formed) == 2  # of y, and of x


def test_the_gram_cache_notices_changed_activations():
    output_grads, activations = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    cache = gradient_products.ActivationGramCache()
    for change in (0.0, 1.0):
        activations += change
        gradient = FactoredGrad(output_grads, activations)
        torch.testing.assert_close(inner_products(gradient, gradient, gram_cache=cache), squared_norms(gradient))
    gradient = FactoredGrad(output_grads, activations.flip(1))
    torch.testing.assert_close(inner_products(gradient, gradient, gram_cache=cache), squared_norms(gradient))


def squared_norms(gradient):
    return gradient.per_sample().values.square().sum((1, 2))


def test_inner_products_of_many_float32_elements_are_exact_to_1e_5():
    gradient = PerSampleGrad(torch.rand(2, 6_000_000))
    exact = gradient.values.double().square().sum(1)
    torch.testing.assert_close(inner_products(gradient, gradient).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_inner_products_equal_those_of_the_full_gradients(kind, other, tile):
    """Any two uses of one parameter, at different numbers of positions."""
    (one, full), (two, other_full) = form(kind), form(other, positions=9, seed=1)
    expected = (full * other_full).sum((1, 2))
    torch.testing.assert_close(inner_products(one, two), expected, rtol=1e-10, atol=1e-12)


def test_products_of_positions_are_formed_tile_by_tile(monkeypatch):
    formed, original = [], gradient_products._pairwise_products

    def products(one, other):
        formed.append(original(one, other))
        return formed[-1]

    monkeypatch.setattr(gradient_products, "TILE", 60)
    monkeypatch.setattr(gradient_products, "_pairwise_products", products)
    inner_products(form("factored", positions=6)[0], form("factored", positions=9, seed=1)[0])
    assert len(formed) == 6 and max(each.numel() for each in formed) <= 60


def test_views_overlap_from_one_common_element_on():
    values = PerSampleGrad(torch.ones(1, 2, 2))
    first, touching, apart = (ViewGrad(values, (20,), (2, 2), (3, 1), offset) for offset in (0, 4, 5))
    assert first.last == 4
    assert first.overlaps(touching) and touching.overlaps(first)
    assert not first.overlaps(apart) and not apart.overlaps(first)


def view(kind, *, first, seed):
    """(a form of two rows of a parameter (6, ROWS * WIDTH // 2), from row `first`; the gradient of the parameter)."""
    gradient, full = form(kind, seed=seed)
    columns = ROWS * WIDTH // 2
    whole = torch.zeros(BATCH, 6, columns, dtype=torch.float64)
    whole[:, first : first + 2] = full.reshape(BATCH, 2, columns)
    return ViewGrad(gradient, (6, columns), (ROWS, WIDTH), (WIDTH, 1), first * columns), whole


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("first", [1, 2, 3], ids=["the same elements", "some of them", "others"])
def test_inner_products_of_views_equal_those_of_the_full_gradients(kind, first):
    (one, full), (two, other_full) = view(kind, first=1, seed=0), view("factored", first=first, seed=1)
    expected = (full * other_full).sum((1, 2))
    torch.testing.assert_close(inner_products(one, two), expected, rtol=1e-10, atol=1e-12)
    whole = PerSampleGrad(other_full.clone())
    torch.testing.assert_close(inner_products(one, whole), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inner_products(whole, one), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_weighted_sums_of_views_equal_those_of_the_full_gradients(kind):
    (gradient, full), weights = view(kind, first=3, seed=0), torch.tensor([0.7, 0.2, 1.3], dtype=torch.float64)
    expected = (weights[:, None, None] * full).sum(0)
    torch.testing.assert_close(gradient.weighted_sum(weights), expected, rtol=1e-12, atol=1e-14)
    total = torch.ones(7, *full.shape[1:], dtype=torch.float64)  # the sum is a part of a larger tensor
    gradient.weighted_sum(weights, add_to=total[2])
    torch.testing.assert_close(total[2], 1 + expected, rtol=1e-12, atol=1e-14)
    assert (total[[0, 1, 3, 4, 5, 6]] == 1).all()


def test_a_sum_takes_the_memory_of_its_gradient_only_if_it_may():
    gradient, weight = PerSampleGrad(torch.ones(1, 4), owns_values=True), torch.tensor([3.0])
    assert gradient.weighted_sum(weight).equal(torch.full((4,), 3.0)) and gradient.values.equal(torch.ones(1, 4))
    total = gradient.weighted_sum(weight, overwrite=True)
    assert total.data_ptr() == gradient.values.data_ptr() and total.equal(torch.full((4,), 3.0))


def test_the_gradient_of_one_example_becomes_the_sum_in_its_memory():
    parameter, values = nn.Parameter(torch.zeros(4)), torch.ones(1, 4)
    add_sum(parameter, PerSampleGrad(values, owns_values=True), torch.tensor([3.0]))
    assert parameter.grad.data_ptr() == values.data_ptr() and parameter.grad.equal(torch.full((4,), 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_sums_equal_those_of_the_full_gradients(kind):
    gradient, full = form(kind)
    weights = torch.tensor([0.7, 0.2, 1.3], dtype=torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(gradient.weighted_sum(weights), (weights[:, None, None] * full).sum(0), **close)
    total = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    assert gradient.weighted_sum(weights, add_to=total) is not None
    torch.testing.assert_close(total, 1 + (weights[:, None, None] * full).sum(0), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_examples_contribute_zero_even_if_they_are_nan(kind):
    gradient, full = form(kind)
    for part in ("values", "output_grads", "activations"):
        tensor = getattr(gradient, part, None)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor[1] = float("nan")
    kept = gradient.masked(torch.tensor([True, False, True]))
    torch.testing.assert_close(
        kept.weighted_sum(torch.ones(3, dtype=torch.float64)), full[0] + full[2], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_per_sample_gradients_equal_the_full_gradients(kind):
    gradient, full = form(kind)
    torch.testing.assert_close(gradient.per_sample().values, full, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4, eps=0.3), nn.RMSNorm(4, eps=0.3), nn.GroupNorm(2, 4, eps=0.3)])
def test_norm_layers_with_any_epsilon_are_exact(layer):
    assert_exact(Head(layer, before=nn.PReLU()).double(), draw(3, 4, 4), losses_of)


def test_layers_without_a_rule_and_with_an_argument_without_a_batch_are_exact():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x, table):
            return x * (self.scale * table).sin()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Mixed()

        def forward(self, x):
            return self.layer(x, torch.arange(4.0, dtype=x.dtype))

    assert_exact(Whole().double(), draw(3, 2, 4), losses_of)


def test_layers_that_draw_dropout_are_exact():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.dropout = nn.Parameter(torch.rand(4)), nn.Dropout(0.2)

        def forward(self, x):
            return self.dropout(x) * self.scale

    assert_exact(Noisy().double(), torch.randn(3, 4, dtype=torch.float64), losses_of)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_a_recomputation_counts_no_second_use_and_keeps_no_gradients(monkeypatch):
    kept, add = [], Ledger.add
    monkeypatch.setattr(Ledger, "add", lambda self, *args: (add(self, *args), kept.append(len(self.entries)))[0])
    by_clipper(Body().double(), draw(3, 4), losses_of, max_grad_norm=1.0, passes=2)
    assert kept == [0] * 4


def test_a_checkpoint_around_the_whole_model_is_exact():
    def losses(model, batch):
        return checkpoint(model, batch, use_reentrant=False).sin().sum(1)

    assert_exact(Body().body.double(), draw(3, 4), losses)


class Twice(nn.Module):
    """Two uses whose gradients almost cancel."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 4), kind

    def forward(self, x):  # (B, 2, 8)
        if self.kind == "uses":
            return self.layer(x[:, 0]) - self.layer(x[:, 1])
        y = self.layer(x)
        return y[:, 0] - y[:, 1]


@pytest.mark.parametrize("kind", ["uses", "positions"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0, 30000.0])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_norm_is_never_too_small_even_under_cancellation(kind, offset, passes):
    torch.manual_seed(0)
    model, x = Twice(kind), torch.randn(64, 2, 8) + offset
    clipper = GhostClipper(model, max_grad_norm=0.01, passes=passes)
    for each in x.split(1):
        model.zero_grad()
        clipper.backward(model(each).sum(1))
        clipped = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
        assert clipped <= 0.01 * (1 + 1e-5)
    if offset == 0:
        assert clipped > 0.00999
