"""Ways to use a parameter that following might miss: exact, or refused by memsave, never wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from tests.support.examples_alone import assert_exact_or_refused, draw, plain_losses, raised_by_memsave
from tests.support.operator_cases import BATCH, LENGTH, WIDTH, Use
from tests.support.per_example_reference import by_loop

ROW, SQUARE = (WIDTH,), (WIDTH, WIDTH)
TABLE = draw(9, WIDTH)


class Scale(torch.autograd.Function):
    """Examples and a parameter in one function."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


@torch.jit.script
def scripted(x, w):
    return x * w


def through_a_view(h, w):
    buffer = h.new_zeros(h.shape)
    for time in range(h.shape[1]):
        buffer[:, time].copy_(h[:, time])
    return h.sin() + buffer * w


def through_a_view_of_a_source(h, w):
    y = w.exp().expand(h.shape).clone()
    part = y[:, :2]
    part += h[:, :2]
    return y + h


def written_under_a_view(h, w):
    y = w.exp().expand(h.shape).clone()
    part = y[:, :2]
    y += h
    return h[:, :2] * part


def written_before_a_use(h, w):
    y = w.exp().expand(h.shape).clone()
    before = y * 2
    y.copy_(h)
    return before * h + y * w


def without_gradients(h, w):
    with torch.no_grad():
        scale = h * w
        constant = w * 2
    return h + scale * w + constant * h


def under_autocast(h, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (h.float() @ w.float()).float() + h


USES = {
    "a function of both": (lambda h, w: Scale.apply(h, w), ROW),
    "scripted": (lambda h, w: scripted(h, w), ROW),
    "scripted, of the parameter": (lambda h, w: h * scripted(w, w), ROW),
    "vmap over examples": (lambda h, w: torch.func.vmap(lambda row: row * w)(h), ROW),
    "vmap over parameters": (lambda h, w: torch.func.vmap(lambda v: h @ v)(w).sum(0), (2, *SQUARE)),
    "aten": (lambda h, w: torch.ops.aten.mul.Tensor(h, w), ROW),
    "aten product": (lambda h, w: torch.ops.aten.mm.default(h.flatten(0, 1), w).view_as(h), SQUARE),
    "by keyword": (lambda h, w: torch.matmul(other=w, input=h), SQUARE),
    "added by keyword": (lambda h, w: torch.addmm(input=h[:, 0], mat1=h[:, 1], mat2=w), SQUARE),
    "out": (lambda h, w: h + torch.mul(h.detach(), w.detach(), out=torch.empty_like(h)) * w, ROW),
    "data": (lambda h, w: h * w.data + h.data * w, ROW),
    "detached": (lambda h, w: h * w.detach() + h.detach() * w, ROW),
    "without gradients": (without_gradients, ROW),
    "under autocast": (under_autocast, SQUARE),
    "examples through a view": (through_a_view, ROW),
    "through a view of a source": (through_a_view_of_a_source, ROW),
    "written before a use": (written_before_a_use, ROW),
    "checkpoint": (lambda h, w: checkpoint(lambda x: (x * w).sin(), h, use_reentrant=False), ROW),
    "checkpoint with the parameter": (lambda h, w: checkpoint(torch.mul, h, w, use_reentrant=False), ROW),
    "sparse": (lambda h, w: torch.sparse.mm(torch.eye(BATCH).double().to_sparse(), h[:, 0]) * w, ROW),
    "by distance": (lambda h, w: torch.cdist(h, w), (2, WIDTH)),
    "flipped": (lambda h, w: torch.flipud(torch.flipud(h) * w), ROW),
    "negative index": (lambda h, w: (h[torch.tensor([-1, 0, 1])] * w)[torch.tensor([1, 2, 0])], ROW),
    "embedding with scaled gradients": (
        lambda h, w: h + F.embedding((h.detach()[..., 0] > 0).long(), w, scale_grad_by_freq=True),
        (2, WIDTH),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_a_use_is_exact_or_refused(name):
    call, *shapes = USES[name]
    tolerance = 2e-2 if "autocast" in name else 1e-9
    assert_exact_or_refused(Use(call, *shapes), draw(BATCH, LENGTH, WIDTH), rtol=tolerance)


def test_a_view_of_what_is_written_later():
    assert_exact_or_refused(Use(written_under_a_view, ROW), draw(BATCH, LENGTH, WIDTH))


def by_time(h, w):
    """A constant table by position, through a layer: as long as the batch in some batches."""
    return h * F.linear(TABLE[: h.shape[1]], w)


def by_position(h, w):
    return TABLE[(h.detach()[..., 0] > 0).long()] * w * h


def time_first(h, w):
    return (h.transpose(0, 1) * w).transpose(0, 1)


def lengths(h, w):
    return h * (torch.linalg.vector_norm(h.transpose(0, 1), dim=-1) * w[0]).t()[..., None]


def layout_by_length(h, w):
    return time_first(h, w) if h.shape[1] == h.shape[0] else h * w


CHANGING = {
    "by time": by_time,
    "by position": by_position,
    "time first": time_first,
    "lengths": lengths,
    "layout by length": layout_by_length,
    "later": lambda h, w: h * w if h.shape[1] == 3 else h,
}
SIZES = [[(3, 4), (4, 4), (3, 3), (2, 5)], [(1, 4), (4, 4), (1, 1), (3, 4)], [(3, 3), (3, 4), (4, 3)]]


def assert_each_exact_or_refused(model, sizes):
    """One clipper for batches of several sizes (B, T)."""
    plain = copy.deepcopy(model)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    for place, (batch, length) in enumerate(sizes):
        x = draw(batch, length, WIDTH, seed=place)
        norms, sums = by_loop(plain, x, plain_losses, max_grad_norm=1.0)
        model.zero_grad()
        try:
            ours = clipper.backward(plain_losses(model, x))
        except ValueError as refusal:
            assert raised_by_memsave(refusal)
            continue
        torch.testing.assert_close(ours, norms, rtol=1e-9, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, sums[name], rtol=1e-8, atol=1e-12)
    clipper.close()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CHANGING)
def test_batches_of_several_sizes(name, sizes):
    assert_each_exact_or_refused(Use(CHANGING[name], SQUARE if name == "by time" else ROW), sizes)


def test_equal_rows_of_a_constant_as_long_as_a_later_batch():
    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()

        def forward(self, x):
            y = self.first(x)
            return y * self.first(y.new_ones(y.shape[1], WIDTH))

    torch.manual_seed(0)
    assert_each_exact_or_refused(Ones(), [(3, 4), (4, 4), (3, 3)])


def test_a_cached_weight():
    class Cached(Use):
        cache = None

        def forward(self, x):
            self.cache = self.own[0] * 2 if self.cache is None else self.cache
            return self.first(x) * self.cache

    assert_each_exact_or_refused(Cached(None, ROW), [(3, 4), (3, 4)])


def test_frozen_and_then_unfrozen():
    model, x = Use(lambda h, w: h * w, ROW), draw(BATCH, LENGTH, WIDTH)
    model.own[0].requires_grad_(False)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(plain_losses(model, x))
    model.own[0].requires_grad_(True)
    model.zero_grad()
    norms, _ = by_loop(copy.deepcopy(model), x, plain_losses, max_grad_norm=1.0)
    torch.testing.assert_close(clipper.backward(plain_losses(model, x)), norms, rtol=1e-9, atol=0)


def test_a_tensor_kept_as_an_attribute():
    model = Use(lambda h, w: h * w, ROW)

    def keep(h, w):
        model.kept = h * w
        return model.kept.sin()

    model.call = keep
    clipper = GhostClipper(model, max_grad_norm=1.0)
    x = draw(BATCH, LENGTH, WIDTH)

    def losses(each):
        return plain_losses(each, x) + each.kept.square().sum((1, 2))

    ours = clipper.backward(losses(model))
    clipper.close()
    norms, _ = by_loop(model, x, lambda each, _: losses(each), max_grad_norm=1.0)
    torch.testing.assert_close(ours, norms, rtol=1e-9, atol=0)


def test_two_forwards_before_one_backward():
    model, x = Use(lambda h, w: h * w, ROW), draw(BATCH, LENGTH, WIDTH)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = plain_losses(model, x) + plain_losses(model, x.flip(1))
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        clipper.backward(losses)
    assert raised_by_memsave(refusal.value)
