"""The head without logits, against the head with them, in float64."""

import contextlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, head, linear_cross_entropy, logits
from memsave.profiler import MemoryRecorder
from memsave.reversible import AdditiveCoupling, ReversibleSequence
from tests.support.per_example_reference import assert_exact, by_clipper, by_loop

pytestmark = pytest.mark.usefixtures("device")

CLOSE = {"rtol": 1e-10, "atol": 1e-13}
ROUNDING = 1e-13  # of gradients: that of a loss of nearly zero is a difference of numbers of order 1 to 30


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small blocks, of which few sizes divide the vocabulary; no logits are stored without a budget."""
    monkeypatch.setattr(head, "KEPT", 0)
    monkeypatch.setattr(logits, "BLOCK", dict.fromkeys(logits.BLOCK, 50))
    monkeypatch.setattr(logits, "MIN_COLUMNS", 1)
    monkeypatch.setattr(logits, "TRIANGLE", 3)


class Speaker(nn.Module):
    """Returns the hidden states, not the logits."""

    def __init__(self, *, vocabulary=17, width=5, bias=False, tied=True, body=None, loud=1.0, cap=None):
        super().__init__()
        self.look, self.mix = nn.Embedding(vocabulary, width), body or nn.Linear(width, width)
        self.head, self.loud = nn.Linear(width, vocabulary, bias=bias), loud
        self.cap = cap
        if tied:
            self.head.weight = self.look.weight

    def forward(self, ids):
        return self.mix(self.look(ids)).tanh() * self.loud


def draw(batch=3, positions=6, *, vocabulary=17, ignored=0.3, seed=0):
    """Tokens and targets; one of several examples has no target."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    ids, targets = torch.randint(vocabulary, (2, batch, positions), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = -100
    if batch > 1:
        targets[-1] = -100
    return {"ids": ids, "targets": targets}


def chunked(model, batch):
    hidden, options = model(batch["ids"]), {"bias": model.head.bias, "soft_cap": model.cap}
    each = linear_cross_entropy(hidden, model.head.weight, batch["targets"], **options)
    return weighed(each, batch)


def with_logits(model, batch):
    scores = F.linear(model(batch["ids"]), model.head.weight, model.head.bias)
    if model.cap is not None:
        scores = model.cap * (scores / model.cap).tanh()
    return weighed(F.cross_entropy(scores.transpose(1, 2), batch["targets"], reduction="none"), batch)


def weighed(each, batch):
    """Give the tokens of an example different weights."""
    weights = torch.arange(1, each.shape[1] + 1, dtype=each.dtype)
    return (each * weights).sum(1) / (batch["targets"] != -100).sum(1).clamp(min=1)


def assert_as_with_logits(model, batch, **options):
    """Values, ordinary gradients, norms and clipped sums."""
    torch.testing.assert_close(chunked(model, batch), with_logits(model, batch), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(chunked(model, batch), with_logits(model, batch), **CLOSE)
    parameters = list(model.parameters())
    one, other = (
        torch.autograd.grad(losses(model, batch).square().sum(), parameters) for losses in (chunked, with_logits)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item() + ROUNDING)
    free, _ = by_loop(model, batch, with_logits, max_grad_norm=1.0)
    bound = free.median().item() if free.median() > 1e-12 else 1.0  # a smaller one is refused
    norms, sums = by_loop(model, batch, with_logits, max_grad_norm=bound)
    for passes in (1, 2, "auto"):
        ours, our_sums = by_clipper(model, batch, chunked, max_grad_norm=bound, passes=passes, **options)
        torch.testing.assert_close(ours, norms, rtol=1e-9, atol=1e-12 * bound + ROUNDING)
        for name, total in sums.items():
            assert (our_sums[name] - total).norm() <= 1e-9 * total.norm() + 1e-12 * bound + ROUNDING, (name, passes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("budget", [0, 400, 10**6])  # none, some and all of the logits kept
@pytest.mark.parametrize("cap", [None, 0.8])
def test_losses_gradients_norms_and_sums_equal_those_with_logits(bias, tied, batch, budget, cap):
    torch.manual_seed(0)
    assert_as_with_logits(Speaker(bias=bias, tied=tied, cap=cap).double(), draw(batch), memory_budget=budget)


@pytest.mark.parametrize("block", [1, 7, 18, 100, 2**20])
def test_a_soft_cap_is_exact_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(logits, "BLOCK", dict.fromkeys(logits.BLOCK, block))
    torch.manual_seed(0)
    for tied in (True, False):
        assert_as_with_logits(Speaker(bias=True, tied=tied, cap=1.5).double(), draw(), memory_budget=600)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    positions=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 6),
    tied=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    loud=st.sampled_from([1.0, 30.0]),
    cap=st.sampled_from([None, 1.0, 30.0]),
)
@example(batch=1, positions=1, vocabulary=2, width=1, tied=True, ignored=0.0, loud=30.0, cap=None)
@example(batch=3, positions=4, vocabulary=11, width=3, tied=True, ignored=0.5, loud=30.0, cap=30.0)
def test_the_head_is_exact_for_any_shape(batch, positions, vocabulary, width, tied, ignored, loud, cap):
    torch.manual_seed(0)
    model = Speaker(vocabulary=vocabulary, width=width, tied=tied, loud=loud if cap is None else 3 * cap, cap=cap)
    model = model.double()
    assert_as_with_logits(model, draw(batch, positions, vocabulary=vocabulary, ignored=ignored))


def confident(dtype, *, scale):
    """Logits of about `scale`, and targets that are mostly the model's own choice."""
    torch.manual_seed(0)
    model, batch = Speaker(loud=scale).to(dtype), draw()
    with torch.no_grad():
        best = (model(batch["ids"]) @ model.head.weight.T).argmax(-1)
    batch["targets"][:2, ::2] = best[:2, ::2]
    return model, batch


@pytest.mark.parametrize("scale", [10.0, 30.0, 1e3])
def test_the_head_is_exact_for_confident_models(scale):
    model, batch = confident(torch.float64, scale=scale)
    assert_as_with_logits(model, batch)


def test_a_confident_model_has_no_cancellation_in_float32():
    """In float32, 1 - softmax would be zero; the gradient of the target's row is not."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    hidden = torch.tensor([[[30.0, 0.0]]], requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([[0]]))
    losses.sum().backward()
    rest = 2 * torch.tensor(-30.0, dtype=torch.float64).exp()
    torch.testing.assert_close(losses.double().squeeze(), rest.log1p(), rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad[0, 0].double(), -30 * rest / (1 + rest), rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad[0, 0, 0].double(), -rest / (1 + rest), rtol=1e-6, atol=0)


def test_a_saturated_soft_cap_has_no_cancellation_in_its_slope():
    """In float32, tanh is 1 here, and 1 - tanh^2 would be zero."""
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    losses = linear_cross_entropy(torch.tensor([[[20.0]]]), weight, torch.tensor([[0]]), soft_cap=2.0)
    losses.sum().backward()
    slope, others = torch.tensor(10.0, dtype=torch.float64).cosh() ** -2, torch.sigmoid(torch.tensor(-2.0).double())
    expected = torch.tensor([[-20 * others * slope], [20 * others]])
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=0)


def test_a_confident_model_under_a_soft_cap_has_no_cancellation():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    losses = linear_cross_entropy(torch.tensor([[[30.0, 0.0]]]), weight, torch.tensor([[0]]), soft_cap=30.0)
    losses.sum().backward()
    one = torch.ones((), dtype=torch.float64)
    rest, slope = 2 * (-30 * one.tanh()).exp(), one.cosh() ** -2
    torch.testing.assert_close(losses.double().squeeze(), rest.log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.grad[0, 0].double(), -30 * slope * rest / (1 + rest), rtol=1e-5, atol=0)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (30.0, None), (1e3, None), (1.0, 2.0), (30.0, 2.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_norm_is_never_too_small(passes, scale, cap, tied):
    torch.manual_seed(0)
    model, batch = Speaker(loud=scale, tied=tied, cap=cap), draw(8, 12)
    clipper = GhostClipper(model, max_grad_norm=1e-3, passes=passes)
    for row in range(7):
        model.zero_grad()
        one = {key: value[row : row + 1].expand(2, -1).clone() for key, value in batch.items()}
        one["targets"][1] = -100
        norms = clipper.backward(chunked(model, one))
        clipped = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
        assert clipped <= 1e-3 * (1 + 1e-5)
        assert norms[0] <= 1e-3 or clipped >= 0.999e-3


@pytest.mark.parametrize("tied", [True, False])
def test_two_uses_of_one_head_are_exact(tied):
    """At different numbers of positions, so in different blocks."""

    def losses(model, batch):
        hidden, targets = model(batch["ids"]), batch["targets"]
        parts = ((hidden, targets), (hidden[:, 1:4], targets[:, :3]))
        first, second = (
            linear_cross_entropy(h, model.head.weight, y, bias=model.head.bias, soft_cap=cap).sum(1)
            for (h, y), cap in zip(parts, (model.cap, None), strict=True)
        )
        return first + 2 * second

    torch.manual_seed(0)
    for cap in (None, 1.5):
        assert_exact(Speaker(tied=tied, bias=True, cap=cap).double(), draw(), losses)


class Both(Speaker):
    """Its head is also a module of the forward, at other positions."""

    def forward(self, ids):
        hidden = super().forward(ids)
        return hidden + self.head(hidden[:, :2]).sin().mean((1, 2))[:, None, None]


def test_a_head_that_is_also_a_layer_of_the_forward_is_exact():
    torch.manual_seed(0)
    for tied in (True, False):
        assert_exact(Both(tied=tied, bias=True).double(), draw(), chunked)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_head_with_a_frozen_weight_or_bias_is_exact(frozen):
    torch.manual_seed(0)
    model = Speaker(bias=True, tied=False, cap=1.5).double()
    model.head.get_parameter(frozen).requires_grad_(False)
    assert_exact(model, draw(), chunked)


class Under(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_the_head_is_exact_with_checkpoints_and_reversible_sequences():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert_as_with_logits(Speaker(width=4, body=Under(body)).double(), draw())
    branches = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)]
    pairs = zip(branches[::2], branches[1::2], strict=True)
    reversible = ReversibleSequence([AdditiveCoupling(f, g) for f, g in pairs])
    for cap in (None, 1.5):
        assert_as_with_logits(Speaker(width=4, body=reversible, cap=cap).double(), draw())


def test_a_checkpoint_around_model_and_head_is_exact():
    torch.manual_seed(0)
    assert_exact(Speaker().double(), draw(), lambda m, b: checkpoint(chunked, m, b, use_reentrant=False))


def test_under_autocast_norms_are_those_of_the_summed_gradients():
    """Matrix products are in bfloat16; the norms are those of the summed gradients."""
    torch.manual_seed(0)
    model, batch = Speaker(vocabulary=40, width=8), draw(4, 8, vocabulary=40, ignored=0.1)

    def losses(m, b):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            return chunked(m, b)

    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert chunked(model, batch).dtype == torch.float32
        torch.testing.assert_close(chunked(model, batch), with_logits(model, batch), rtol=2e-2, atol=2e-2)
    norms, _ = by_loop(model, batch, losses, max_grad_norm=1e9)
    for passes in (1, 2):
        ours, sums = by_clipper(model, batch, losses, max_grad_norm=1e-3, passes=passes)
        torch.testing.assert_close(ours, norms, rtol=1e-2, atol=1e-6)
        for row in range(3):
            one = {key: value[[row, -1]] for key, value in batch.items()}
            _, sums = by_clipper(model, one, losses, max_grad_norm=1e-3, passes=passes)
            total = torch.cat([each.double().flatten() for each in sums.values()]).norm()
            torch.testing.assert_close(total.item(), 1e-3, rtol=2e-3, atol=0)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_an_example_that_is_not_finite_adds_zero(passes, cap):
    torch.manual_seed(0)
    model, batch = Speaker(bias=True, cap=cap).double(), draw(4, ignored=0.0)
    factors = torch.tensor([1.0, float("nan"), 1.0, 1.0], dtype=torch.float64)

    def losses(m, b):
        hidden = m(b["ids"]) * factors[:, None, None]
        return linear_cross_entropy(hidden, m.head.weight, b["targets"], bias=m.head.bias, soft_cap=cap).sum(1)

    clipper = GhostClipper(model, max_grad_norm=0.5, passes=passes)
    clipper.backward(losses(model, batch))
    ours = [p.grad.clone() for p in model.parameters()]
    assert clipper.nonfinite == 1
    clipper.close()
    factors[1] = 1.0
    batch["targets"][1] = -100
    _, sums = by_loop(model, batch, losses, max_grad_norm=0.5)
    for one, other in zip(ours, sums.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.slow
def test_fake_tensors_have_the_memory_peak_of_real_ones(passes):
    peaks = []
    for fake in (False, True):
        with FakeTensorMode() if fake else contextlib.nullcontext():
            model, batch = Speaker(vocabulary=60), draw(4, 8, vocabulary=60, ignored=0.0)
            batch["targets"] = batch["ids"].clone()  # none is ignored, because fake targets have no values
            if fake:
                batch = {key: torch.zeros(4, 8, dtype=torch.long) for key in batch}
            clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
            for _ in range(2):
                model.zero_grad()
                with MemoryRecorder(model) as recorder:
                    clipper.backward(chunked(model, batch))
            peaks.append(recorder.report().peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("cap", [None, 1.5])
def test_few_logits_are_stored_without_a_budget(cap, monkeypatch):
    """The results are exact, and the products with the weight are not repeated."""
    monkeypatch.setattr(head, "KEPT", logits.KEPT)
    calls = []
    real = logits.logits_of
    monkeypatch.setattr(logits, "logits_of", lambda *args, **kwargs: calls.append(args[3]) or real(*args, **kwargs))
    assert_as_with_logits(Speaker(bias=True, cap=cap).double(), draw())
    assert len(calls) > 1
    model, batch = Speaker(bias=True, cap=cap).double(), draw()
    clipper, count = GhostClipper(model, max_grad_norm=1.0), len(calls)
    losses = chunked(model, batch)
    blocks = len(calls) - count
    clipper._independence.next_check = lambda *, unchecked: ""
    clipper.backward(losses)
    assert len(calls) - count == blocks


def test_a_confident_block_before_a_larger_logit_is_scaled_down(monkeypatch):
    """The stored exponentials of each block have the largest logit up to this block as their unit."""
    monkeypatch.setattr(head, "KEPT", logits.KEPT)
    assert_as_with_logits(Speaker(loud=200.0).double(), draw())


def test_logits_are_stored_only_within_the_memory_budget(monkeypatch):
    """Without a budget, no logits are stored; ignored positions take no memory."""
    monkeypatch.setattr(logits, "BLOCK", dict.fromkeys(logits.BLOCK, 10_000))
    monkeypatch.setattr(logits, "MIN_COLUMNS", 1)
    torch.manual_seed(0)
    model, whole = Speaker(vocabulary=3000, width=4), draw(4, 50, vocabulary=3000, ignored=0.0)
    whole["targets"] = whole["ids"]
    first = {**whole, "targets": whole["targets"].clone()}
    first["targets"][:, 5:] = -100
    one = 4 * 50 * (3000 + 60) * 4  # and a number for each token and block
    clipper = GhostClipper(model, max_grad_norm=1.0)
    peaks = {}
    for budget in (0, one):
        clipper.memory_budget = budget
        for ignored, batch in ((False, whole), (True, first)):
            with MemoryRecorder(model) as recorder:
                clipper.backward(chunked(model, batch))
            model.zero_grad()
            peaks[budget, ignored] = recorder.report().peak_bytes
    assert peaks[0, False] < one / 4
    assert one < peaks[one, False] < 1.2 * one
    assert peaks[one, True] < one / 4


def test_the_head_of_a_bfloat16_model_has_bfloat16_gradients_of_weight_and_bias():
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 5), torch.randn(17, 5), torch.randn(17)]
    targets = torch.tensor([[1, 2, -100], [3, 4, 16]])
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, bias = (each.to(torch.bfloat16).to(dtype).requires_grad_() for each in values)
        linear_cross_entropy(hidden, weight, targets, bias=bias).sum().backward()
        assert {each.grad.dtype for each in (hidden, weight, bias)} == {dtype}
        found.append([each.grad.float() for each in (hidden, weight, bias)])
    for rounded, exact in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_a_batch_of_no_examples_has_losses_of_shape_zero():
    weight = torch.randn(17, 5, requires_grad=True)
    losses = linear_cross_entropy(torch.randn(0, 3, 5), weight, torch.zeros(0, 3, dtype=torch.long))
    assert losses.shape == (0, 3)
    losses.sum().backward()
    assert not weight.grad.any()


def test_errors_name_the_value_and_the_remedy():
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden \(6, 4\).*give \(B, T, d\)"):
        linear_cross_entropy(hidden.flatten(0, 1), weight, targets)
    with pytest.raises(ValueError, match=r"a bias \(4,\) for 5 rows"):
        linear_cross_entropy(hidden, weight, targets, bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"the target 5, but the weight has 5 rows.*ignore_index=-100"):
        linear_cross_entropy(hidden, weight, targets + 5)
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"soft_cap={cap}; give a positive number, or None"):
            linear_cross_entropy(hidden, weight, targets, soft_cap=cap)
    with pytest.raises(RuntimeError, match=r"no double backward.*compute the logits"):
        losses = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
        torch.autograd.grad(losses.sum(), hidden, create_graph=True)
    model, batch = Speaker(), draw()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="linear_cross_entropy was called outside"):
        linear_cross_entropy(torch.zeros(1, 6, 5), model.head.weight, batch["targets"][:1])
    model(batch["ids"])
    with pytest.raises(ValueError, match="targets for 1 rows, but the model saw a batch of 3"):
        linear_cross_entropy(torch.zeros(1, 6, 5), model.head.weight, batch["targets"][:1])
    clipper.close()
    linear_cross_entropy(torch.zeros(1, 6, 5), model.head.weight, batch["targets"][:1]).sum().backward()


def test_a_loss_that_mixes_examples_is_refused():
    model, batch = Speaker().double(), draw(ignored=0.0)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="examples are not independent at linear_cross_entropy"):
        losses = chunked(model, batch)
        clipper.backward(losses / losses.sum())


@pytest.mark.parametrize(("rows", "width"), [(0, 1000), (1, 1000), (20, 50), (21, 47), (100, 10), (5000, 10)])
def test_blocks_of_the_vocabulary_have_a_minimal_width(monkeypatch, rows, width):
    monkeypatch.setattr(logits, "BLOCK", dict.fromkeys(logits.BLOCK, 1000))
    monkeypatch.setattr(logits, "MIN_COLUMNS", 10)
    found = list(logits.vocabulary_blocks(rows, torch.empty(107, 1)))
    assert [place for part in found for place in range(part.start, part.stop)] == list(range(107))
    assert {part.stop - part.start for part in found[:-1]} <= {width}


@pytest.mark.parametrize("flags", [[], [True], [False, False], [False, True, True, False, True]])
def test_positions_are_found_without_waiting_for_a_gpu(flags, monkeypatch, device):
    flags = torch.tensor(flags, dtype=torch.bool)
    expected = flags.nonzero()[:, 0]
    monkeypatch.setattr(head, "is_slow_to_read", lambda tensor: True)
    assert torch.equal(head._true_indices(flags, int(flags.sum())), expected)
