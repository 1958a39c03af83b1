"""An empty batch, as Poisson sampling draws it, gives zero gradients and leaves no cached decisions."""

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper, linear_cross_entropy
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import by_loop

norms_of_gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")

pytestmark = pytest.mark.usefixtures("device")


class Gemma(nn.Module):
    """A norm that scales by 1 + weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), norms_of_gemma.GemmaRMSNorm(8), nn.Linear(8, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("first", [(0, 5, 6), (4, 0, 6)], ids=["no examples", "no positions"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_batch_after_an_empty_batch_is_exact(first, passes):
    model, batch = Gemma().double(), draw(4, 5, 6)
    norms, sums = by_loop(model, batch, losses_of, max_grad_norm=1.0)
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    clipper.backward(losses_of(model, torch.zeros(first, dtype=torch.float64)))
    model.zero_grad()
    torch.testing.assert_close(clipper.backward(losses_of(model, batch)), norms, rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, sums[name], rtol=1e-5, atol=1e-8)


class Scaled(nn.Module):
    """A layer without a rule, with a table that may be as long as the batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, dtype=torch.float64))
        self.register_buffer("table", torch.rand(4, 3, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale + self.table.sum(0)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.look, self.at, self.head = nn.Embedding(9, 4), nn.Embedding(7, 4), nn.Linear(4, 9)

    def forward(self, ids):
        return self.head(self.look(ids) + self.at(torch.arange(ids.shape[1])[None]))


MODELS = {
    "linear": (lambda: nn.Linear(3, 3), (0, 3)),
    "layer norm": (lambda: nn.LayerNorm(3), (0, 3)),
    "group norm": (lambda: nn.GroupNorm(1, 3), (0, 3, 4)),
    "convolution": (lambda: nn.Conv1d(3, 3, 1), (0, 3, 4)),
    "generic": (Scaled, (0, 3)),
    "positions": (Positions, (0, 7)),
}


@pytest.mark.parametrize("passes", [1, 2, "auto", "direct"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_empty_batch_passes_and_gives_gradients_of_zero(kind, passes):
    make, shape = MODELS[kind]
    model = make().double()
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    batch = torch.zeros(shape, dtype=torch.long if kind == "positions" else torch.float64)
    norms = clipper.backward(model(batch).sum(tuple(range(1, len(shape) + (kind == "positions")))))
    assert norms.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_empty_batch_passes_per_layer_and_without_a_graph():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0, clipping="per_layer")
    clipper.backward(model(torch.zeros(0, 7, dtype=torch.long)).sum((1, 2)))
    clipper.backward(torch.zeros(0, dtype=torch.float64))
    assert not any(p.grad.any() for p in model.parameters())


def test_an_empty_batch_passes_the_head_without_logits():
    model = nn.Embedding(9, 4).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    ids = torch.zeros(0, 7, dtype=torch.long)
    clipper.backward(linear_cross_entropy(model(ids), model.weight, ids).mean(1))
    assert not model.weight.grad.any()
