"""Gradients of what is computed from parameters: views, chains, look-ups, hooks."""

import pytest
import torch
from torch.nn import functional as F

from memsave.ghost.gradient_products import inner_products
from memsave.ghost.gradients import FactoredGrad, PerSampleGrad, ViewGrad
from memsave.ghost.parameter_source import Source
from tests.support.examples_alone import assert_exact_or_refused, draw, plain_losses
from tests.support.operator_cases import BATCH, LENGTH, WIDTH, Use
from tests.support.per_example_reference import assert_exact, by_clipper, by_loop

SHAPE = (4, 5, 6)
VIEWS = {
    "slice": lambda w: w[1],
    "transposed slice": lambda w: w[2].t(),
    "columns": lambda w: w[1, :, 2:5],
    "overlapping rows": lambda w: w[1, 2:],
    "across slices": lambda w: w[:, 1],
    "across slices, transposed": lambda w: w[:, 3].t(),
    "whole": lambda w: w.reshape(20, 6),
    "permuted": lambda w: w.permute(2, 0, 1),
    "vector": lambda w: w[1, 2],
    "steps": lambda w: w[::2, 1, ::3],
}


def of_view(view, parameter, *, factored):
    """(a form of random gradients of a view, the parameter's gradients by autograd)."""
    part = view(parameter)
    if factored and part.dim() == 2:
        form = FactoredGrad(draw(2, 3, part.shape[0]), draw(2, 3, part.shape[1], seed=8))
        values = form.per_sample().values
    else:
        values = draw(2, *part.shape, seed=part.numel())
        form = PerSampleGrad(values)
    found = Source.of_tensor(part, {"w": parameter}, is_view=True).gradients(form)["w"]
    return found, torch.stack([torch.autograd.grad(part, parameter, g, retain_graph=True)[0] for g in values])


def formed(gradient):
    return gradient.values if isinstance(gradient, PerSampleGrad) else gradient.per_sample().values


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_has_the_gradient_of_autograd(name, contiguous, factored):
    values = draw(*SHAPE) if contiguous else draw(*reversed(SHAPE)).permute(2, 1, 0)
    parameter = torch.nn.Parameter(values)
    found, expected = of_view(VIEWS[name], parameter, factored=factored)
    assert isinstance(found, ViewGrad) or not contiguous or name in ("whole", "permuted")
    torch.testing.assert_close(formed(found), expected)
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    total = torch.einsum("b,b...->...", weights, expected)
    torch.testing.assert_close(found.weighted_sum(weights), total)
    before = draw(*SHAPE, seed=9)
    torch.testing.assert_close(found.weighted_sum(weights, add_to=before.clone()), total + before)
    column_major = before.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(found.weighted_sum(weights, add_to=column_major), total + before)
    only = found.masked(torch.tensor([False, True]))
    torch.testing.assert_close(formed(only), expected * torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1))


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("other", VIEWS)
def test_inner_products_of_two_views(name, other, factored):
    parameter = torch.nn.Parameter(draw(*SHAPE))
    one, one_expected = of_view(VIEWS[name], parameter, factored=factored)
    two, two_expected = of_view(VIEWS[other], parameter, factored=not factored)
    expected = (one_expected * two_expected).sum((1, 2, 3))
    torch.testing.assert_close(inner_products(one, two), expected, atol=1e-12, rtol=1e-9)


class Reverse(torch.autograd.Function):
    """A view with the reversed gradient."""

    @staticmethod
    def forward(ctx, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def hooked(tensor, factor=3):
    tensor.register_hook(lambda grad: factor * grad)
    return tensor


def looked_up(w):
    return F.embedding(torch.tensor([0, 2, 2, 1]), w)


SQUARE, ROW = (WIDTH, WIDTH), (WIDTH,)
CHAINS = {
    "a product of two": (lambda h, v, w: h @ (v @ w), (WIDTH, 2), (2, WIDTH)),
    "a softmax": (lambda h, w: h * w.softmax(0) + (h @ w.softmax(0)).unsqueeze(-1), ROW),
    "a normalised weight": (lambda h, w, g: h @ (g * w / w.norm(dim=0)), SQUARE, ROW),
    "a function of one": (lambda h, w: h @ Square.apply(w), SQUARE),
    "a reversed gradient": (lambda h, w: h @ Reverse.apply(w), SQUARE),
    "a view of a reversed gradient": (lambda h, w: h @ Reverse.apply(w)[1].t(), (2, *SQUARE)),
    "a view and itself": (lambda h, w: (h @ w[1]).sin() @ w[1].t() + h @ w[0], (2, *SQUARE)),
    "a hook on a view": (lambda h, w: h @ hooked(w[1]), (2, *SQUARE)),
    "a hook on what is expanded": (lambda h, w: h + hooked(w.expand(LENGTH, WIDTH)), ROW),
    "a hook on a chain": (lambda h, w: h * hooked(w.exp()), ROW),
    "a look-up": (lambda h, w: h + 2 * looked_up(w), (3, WIDTH)),
    "a look-up and its table": (lambda h, w: h + looked_up(w) * w.mean(0), (3, WIDTH)),
    "a look-up, written": (lambda h, w: h + looked_up(w).mul_(2), (3, WIDTH)),
    "two look-ups": (lambda h, w: h + looked_up(w) * looked_up(w).flip(0), (3, WIDTH)),
    "real parts": (lambda h, w: h * torch.view_as_complex(w).abs(), (WIDTH, 2)),
    "written after its use": (lambda h, w: _written_later(h, w), ROW),
    "moved, then written": (lambda h, w: _moved_and_written(h, w), ROW),
}


def _written_later(h, w):
    v = w + 1
    y = h + v
    v.mul_(2)
    return y.sin() + h + v


def _moved_and_written(h, w):
    v = w.flip(0)
    y = h + v
    v.mul_(2)
    return y.sin() + h + v


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_exact(name):
    call, *shapes = CHAINS[name]
    assert_exact(Use(call, *shapes), draw(BATCH, LENGTH, WIDTH), plain_losses)


def test_a_hook_on_a_view_of_which_a_view_is_taken():
    model = Use(lambda h, w: h @ hooked(w[1]).t(), (2, *SQUARE))
    assert_exact_or_refused(model, draw(BATCH, LENGTH, WIDTH))


def test_complex_parameters():
    model = Use(lambda h, w: torch.view_as_real(h @ torch.complex(w, w.sin())).flatten(2), SQUARE)
    model.own[0] = torch.nn.Parameter(torch.complex(draw(*SQUARE), draw(*SQUARE, seed=2)))
    model.call = lambda h, w: torch.view_as_real(h.to(w.dtype) @ w).flatten(2) * w.abs().sum()
    assert_exact_or_refused(model, draw(BATCH, LENGTH, WIDTH))


def test_bfloat16_parameters():
    model, batch = Use(lambda h, w: h * w.softmax(0), ROW).bfloat16(), draw(BATCH, LENGTH, WIDTH).bfloat16()
    norms, sums = by_loop(model, batch, plain_losses, max_grad_norm=1.0)
    for passes in (1, 2):
        ours, our_sums = by_clipper(model, batch, plain_losses, max_grad_norm=1.0, passes=passes)
        torch.testing.assert_close(ours, norms.float(), rtol=2e-2, atol=0)
        for name, expected in sums.items():
            assert (our_sums[name] - expected).norm() <= 3e-2 * expected.norm()
