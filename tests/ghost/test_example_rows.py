"""Examples of several rows: norms and clipped sums are those of each example alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memsave.ghost import GhostClipper, example_rows, verify
from memsave.ghost.head import linear_cross_entropy

VOCABULARY, WIDTH, LENGTH, CHUNKS = 11, 6, 5, 3


class Chunks(nn.Module):
    """A tied embedding, positions without a batch axis, and a layer norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH))

    def forward(self, ids):
        hidden = self.embedding(ids) + self.positions(torch.arange(ids.shape[1])[None]) * self.scale
        return self.layers(hidden)  # (R, T, d)


def chunked_losses(model, batch, *, head):
    """(B,): the mean over the chunks of each example that exist, (B, K, T)."""
    exists = batch["exists"]
    rows = exists.flatten().nonzero()[:, 0]
    owner, ids = rows // exists.shape[1], batch["ids"].flatten(0, 1)[rows]
    with example_rows(owner.tolist(), examples=len(exists)):
        hidden = model(ids)
        targets = ids.masked_fill(ids == 0, -100)
        if head == "chunked":
            losses = linear_cross_entropy(hidden, model.embedding.weight, targets)
        else:
            losses = (hidden * targets[..., None]).sin().sum(-1)
    sums = losses.new_zeros(len(exists)).index_add(0, owner, losses.sum(1))
    return sums / exists.sum(1).clamp(min=1)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("head", ["chunked", "own"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_norms_and_sums_equal_those_of_each_example_alone(head, passes, data):
    batch_size = data.draw(st.integers(1, 4))
    counts = data.draw(st.lists(st.integers(0, CHUNKS), min_size=batch_size, max_size=batch_size).filter(any))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.randint(0, VOCABULARY, (batch_size, CHUNKS, LENGTH))
    batch = {"ids": ids, "exists": torch.arange(CHUNKS) < torch.tensor(counts)[:, None]}
    model = Chunks().double()
    if not counts[0]:  # the bound of `verify` is the norm of the first example
        batch = {key: value.flip(0) for key, value in batch.items()}
    report = verify(model, batch, lambda *each: chunked_losses(*each, head=head), passes=passes)
    assert report.ok, report.findings


def test_rows_in_any_order():
    torch.manual_seed(0)
    model, ids = Chunks().double(), torch.randint(0, VOCABULARY, (4, LENGTH))
    clipper = GhostClipper(model, max_grad_norm=1e9)
    found = []
    for order in ([0, 0, 1, 1], [1, 0, 1, 0]):
        rows = torch.tensor(order).argsort(stable=True).argsort()  # row r of this order is row rows[r] of the first
        with example_rows(order, examples=2):
            hidden = model(ids[rows])
            losses = linear_cross_entropy(hidden, model.embedding.weight, ids[rows]).sum(1)
        norms = clipper.backward(losses.new_zeros(2).index_add(0, torch.tensor(order), losses))
        found.append((norms, {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1])


def test_contexts_nest():
    torch.manual_seed(0)
    model, ids = Chunks().double(), torch.randint(1, VOCABULARY, (5, LENGTH))
    clipper, found = GhostClipper(model, max_grad_norm=1e9), []
    with example_rows([0, 0, 0, 1, 1], examples=2):
        losses = model(ids).sin().sum((1, 2))
    found.append(clipper.backward(losses.new_zeros(2).index_add(0, torch.tensor([0, 0, 0, 1, 1]), losses)))
    with example_rows([0, 0, 1], examples=2):  # documents of persons
        with example_rows([0, 0, 1, 2, 2], examples=3):  # chunks of documents
            losses = model(ids).sin().sum((1, 2))
        with pytest.raises(ValueError, match=r"got 2 examples inside another .* names the examples of 3 rows"):
            example_rows([0, 1], examples=2).__enter__()
    found.append(clipper.backward(losses.new_zeros(2).index_add(0, torch.tensor([0, 0, 0, 1, 1]), losses)))
    torch.testing.assert_close(found[0], found[1])


def test_ordinary_batches_before_and_after():
    model, ids = Chunks().double(), torch.randint(1, VOCABULARY, (4, LENGTH))
    clipper = GhostClipper(model, max_grad_norm=1e9)
    plain = clipper.backward(model(ids).sin().sum((1, 2)))
    plain = clipper.backward(model(ids).sin().sum((1, 2)))
    with example_rows([0, 1, 2, 3], examples=4):
        alone = clipper.backward(model(ids).sin().sum((1, 2)))
    with example_rows([0, 0, 1, 1], examples=2):
        pairs = clipper.backward(model(ids).sin().sum((1, 2)).view(2, 2).sum(1))
    torch.testing.assert_close(plain, alone)
    assert pairs.shape == (2,) and not torch.allclose(pairs, plain[::2])


def test_numbers_that_do_not_match_are_refused():
    model, ids = Chunks().double(), torch.randint(1, VOCABULARY, (4, LENGTH))
    GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="got the example 2, but there are 2"), example_rows([0, 2], examples=2):
        pass
    with example_rows([0, 1], examples=2), pytest.raises(ValueError, match="got 4 rows, but example_rows names"):
        model(ids)


def test_rows_that_mix_examples_are_refused():
    model, ids = Chunks().double(), torch.randint(1, VOCABULARY, (4, LENGTH))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with example_rows([0, 0, 1, 1], examples=2):
        losses = model(ids).sin().sum((1, 2))
    with pytest.raises(ValueError, match="independent"):
        clipper.backward(losses.view(2, 2).sum(0))  # the rows of two examples
