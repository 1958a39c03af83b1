"""A backward inside the backward is refused, because its norms would be lost."""

import pytest
import torch
from torch import nn

from memsave.ghost import GhostClipper
from tests.ghost.test_layers import draw, losses_of

pytestmark = pytest.mark.usefixtures("device")


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), which recomputes its activations and calls backward in its backward."""

    @staticmethod
    def forward(ctx, x, f, g, hold_grad):
        ctx.f, ctx.g = f, g
        x1, x2 = x.chunk(2, -1)
        with torch.enable_grad() if hold_grad else torch.no_grad():
            y1 = x1 + f(x2)
            y = torch.cat([y1, x2 + g(y1)], -1).detach()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        y1, y2 = y.chunk(2, -1)
        with torch.no_grad():
            x2 = y2 - ctx.g(y1)
            x1 = y1 - ctx.f(x2)
        x = torch.cat([x1, x2], -1).requires_grad_()
        with torch.enable_grad():
            x1, x2 = x.chunk(2, -1)
            y1 = x1 + ctx.f(x2)
            again = torch.cat([y1, x2 + ctx.g(y1)], -1)
        torch.autograd.backward(again, grad)
        return x.grad, None, None, None


class Model(nn.Module):
    def __init__(self, hold_grad):
        super().__init__()
        self.stem, self.f, self.g, self.head = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(4, 3)
        self.hold_grad = hold_grad

    def forward(self, x):
        return self.head(Reversible.apply(self.stem(x), self.f, self.g, self.hold_grad))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("hold_grad", [False, True])
def test_a_reversible_layer_that_calls_backward_is_refused_by_name(passes, hold_grad):
    torch.manual_seed(0)
    model = Model(hold_grad).double()
    clipper = GhostClipper(model, max_grad_norm=0.1, passes=passes)
    losses = losses_of(model, draw(3, 4))
    held, lost = (
        r"[fg] was differentiated by a backward inside",
        r"[fg] ran without grad in the forward .* backward inside",
    )
    with pytest.raises(ValueError, match=held if hold_grad else lost):
        clipper.backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_inside_the_backward_is_refused_for_one_example_too():
    model = Model(False).double()
    clipper = GhostClipper(model, max_grad_norm=0.1)
    with pytest.raises(ValueError, match="backward inside the backward"):
        clipper.backward(losses_of(model, draw(1, 4)))


def test_frozen_layers_differentiated_by_an_inner_backward_are_accepted():
    torch.manual_seed(0)
    model = Model(False).double()
    model.f.requires_grad_(False)
    model.g.requires_grad_(False)
    clipper = GhostClipper(model, max_grad_norm=1e9)
    batch = draw(3, 4)
    clipper.backward(losses_of(model, batch))
    ours = model.stem.weight.grad.clone()
    clipper.close()
    model.zero_grad()
    losses_of(model, batch).sum().backward()
    torch.testing.assert_close(ours, model.stem.weight.grad)


class ByHand(torch.autograd.Function):
    """Writes the gradient of a weight that autograd does not see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        ctx.weight.grad = (0 if ctx.weight.grad is None else ctx.weight.grad) + x.T @ grad
        return grad @ ctx.weight.detach().T, None


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return ByHand.apply(self.first(x), Holder(self.last.weight))


class Holder:
    """Hides a parameter from autograd."""

    def __init__(self, parameter):
        self.parameter = parameter

    @property
    def grad(self):
        return self.parameter.grad

    @grad.setter
    def grad(self, value):
        self.parameter.grad = value.detach()

    def detach(self):
        return self.parameter.detach()


def test_a_gradient_that_is_written_in_the_backward_is_refused_and_not_added_to():
    model = Owner().double()
    clipper = GhostClipper(model, max_grad_norm=0.1)
    batch = draw(3, 4)
    with pytest.raises(ValueError, match=r"the backward wrote the gradient of last\.weight by itself"):
        clipper.backward(losses_of(model, batch))
    with pytest.raises(ValueError, match=r"clear the gradients"):
        clipper.backward(losses_of(model, batch))


def test_more_uses_in_the_backward_than_in_the_forward_are_refused():
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, layer)
    clipper = GhostClipper(model, max_grad_norm=0.1)
    losses = losses_of(model, draw(3, 4))
    clipper._context.ledger.uses[layer.weight] = 1  # as if a recomputation took another branch
    with pytest.raises(ValueError, match="was used 2 times in the backward and 1 times in the forward"):
        clipper.backward(losses)
