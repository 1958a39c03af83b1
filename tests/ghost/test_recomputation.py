"""Two passes under checkpoints: the summed gradients must be those whose norms were measured."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact

pytestmark = pytest.mark.usefixtures("device")


class Block(nn.Module):
    def __init__(self, *, own_generator=False):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(0) if own_generator else None

    def forward(self, x):
        if self.generator is None:
            return self.layer(F.dropout(x, 0.5))
        mask = torch.empty_like(x).bernoulli_(0.5, generator=self.generator)
        return self.layer(x * mask)


class Checkpointed(nn.Module):
    def __init__(self, *, preserve=True, own_generator=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block, self.head = nn.Linear(4, 8), Block(own_generator=own_generator), nn.Linear(8, 3)
        self.preserve = preserve

    def forward(self, x):
        y = checkpoint(self.block, self.stem(x), use_reentrant=False, preserve_rng_state=self.preserve)
        return self.head(y)


def test_dropout_in_checkpoints_that_keep_the_random_state_is_exact():
    assert_exact(Checkpointed().double(), draw(5, 4), losses_of)


@pytest.mark.parametrize(
    "options",
    [{"preserve": False}, {"own_generator": True}],
    ids=["state", "generator"],
)
@pytest.mark.parametrize("passes", [2, "auto"])
def test_other_activations_in_the_second_pass_are_refused(options, passes):
    model = Checkpointed(**options).double()
    clipper = GhostClipper(model, max_grad_norm=0.01, passes=passes)
    with pytest.raises(ValueError, match=r"block\.layer got other activations in the second pass"):
        clipper.backward(losses_of(model, draw(5, 4)))
    with pytest.raises(ValueError, match=r"clear the gradients \(optimizer\.zero_grad\(\)\)"):
        clipper.backward(losses_of(model, draw(5, 4)))


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_one_pass_is_within_the_bound_whatever_was_drawn(clipping):
    model = Checkpointed(preserve=False).double()
    passes = 1 if clipping == "flat" else "auto"
    clipper = GhostClipper(model, max_grad_norm=0.01, passes=passes, clipping=clipping)
    clipper.backward(losses_of(model, draw(1, 4)))
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    assert norm <= 0.01 * (1 + 1e-9)


def test_an_example_that_is_not_finite_counts_as_the_same_in_both_passes():
    model = Checkpointed().double()
    batch = draw(3, 4)
    batch[1, 0] = float("nan")
    clipper = GhostClipper(model, max_grad_norm=0.01, passes=2)
    clipper.backward(losses_of(model, batch))
    assert clipper.nonfinite == 1
    batch[1, 0] = float("inf")
    clipper.backward(losses_of(model, batch))
    assert clipper.nonfinite == 2


class Changing(nn.Module):
    """Is another function when it is recomputed."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=False)

    def inside(self, x):
        self.calls += 1
        return self.layer(x).tanh().sin() if self.calls == 1 else self.layer(x)


def test_a_checkpoint_that_recomputes_other_operators_is_refused():
    model = Changing().double()
    clipper = GhostClipper(model, max_grad_norm=0.01, passes=1)
    with pytest.raises(ValueError, match="a checkpoint recomputed something else than in the forward"):
        clipper.backward(losses_of(model, draw(5, 4)))


class BetweenLayers(nn.Module):
    """Recomputes no layer, only dropout between two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = checkpoint(self.between, self.first(x), use_reentrant=False, preserve_rng_state=False)
        return self.last(y)

    def between(self, y):
        return F.dropout(y.tanh(), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_random_numbers_between_layers_are_refused(dtype):
    model = BetweenLayers().to(dtype)
    clipper = GhostClipper(model, max_grad_norm=0.01, passes=2)
    with pytest.raises(ValueError, match="first got other activations in the second pass"):
        clipper.backward(losses_of(model, draw(5, 4).to(dtype)))
