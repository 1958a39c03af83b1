"""Mixtures of experts: tokens are folded, routed to experts, and put back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memsave.ghost import GhostClipper, verify
from tests.support.examples_alone import (
    assert_exact_alone,
    assert_exact_or_refused,
    draw,
    plain_losses,
    raised_by_memsave,
)
from tests.support.per_example_reference import by_loop

pytestmark = pytest.mark.usefixtures("device")

WIDTH, INNER, EXPERTS, TOP = 4, 4, 5, 2


class ParameterRouter(nn.Module):
    """A router with a raw parameter, and a bias in a buffer that only changes the choice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.register_buffer("correction", torch.randn(EXPERTS) * 0.1)

    def forward(self, tokens):  # (N, d)
        scores = F.linear(tokens, self.weight).sigmoid()
        chosen = (scores + self.correction).topk(TOP, dim=-1).indices  # (N, k)
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True)


class LinearRouter(nn.Module):
    """The router of Mixtral: the softmax over all experts, normalised over the chosen ones."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, tokens):
        weights, chosen = self.gate(tokens).softmax(-1).topk(TOP, dim=-1)
        return chosen, weights / weights.sum(-1, keepdim=True)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ListedExperts(nn.Module):
    """Modules in a list; each sees its own tokens, also if there are none."""

    skip_unused = False

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, tokens, chosen, weights):
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token) or not self.skip_unused:
                out.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        return out


class SkippedExperts(ListedExperts):
    """Experts without tokens do not run."""

    skip_unused = True


class SequencedExperts(ListedExperts):
    """Tokens sorted by expert, in one piece for each expert (DeepSeek)."""

    def forward(self, tokens, chosen, weights):
        order = chosen.flatten().argsort()
        pieces = tokens[order // TOP].split(torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist())
        out = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces, strict=True)])
        out = torch.empty_like(out).index_copy(0, order, out)
        return (out.view(*chosen.shape, -1) * weights[..., None]).sum(1)


class StackedExperts(nn.Module):
    """Weights of all experts in two parameters, as in transformers 5."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))

    def forward(self, tokens, chosen, weights):
        out = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)  # (E, k, N)
        for (number,) in mask.sum((-1, -2)).gt(0).nonzero():
            place, token = torch.where(mask[number])
            gate, up = F.linear(tokens[token], self.gate_up_proj[number]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[number])
            out.index_add_(0, token, y * weights[token, place, None])
        return out


class GatheredExperts(StackedExperts):
    """The weights of each token's experts are gathered, and multiplied by `bmm`."""

    def forward(self, tokens, chosen, weights):
        number = chosen.flatten()  # (N k,)
        rows = tokens.repeat_interleave(TOP, 0)
        gate, up = torch.bmm(self.gate_up_proj[number], rows[..., None])[..., 0].chunk(2, dim=-1)
        y = torch.bmm(self.down_proj[number], (F.silu(gate) * up)[..., None])[..., 0]
        return (y.view(*chosen.shape, -1) * weights[..., None]).sum(1)


class DenseExperts(nn.Module):
    """Every expert sees every token, with biases, as in the training of GPT-OSS."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER))
        self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, tokens, chosen, weights):
        rows = tokens.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)  # (E, N, d)
        inner = torch.bmm(rows, self.gate_up_proj) + self.gate_up_bias[:, None]
        gate, up = inner[..., ::2], inner[..., 1::2]
        y = torch.bmm((up + 1) * gate * gate.sigmoid(), self.down_proj) + self.down_bias[:, None]
        scores = torch.zeros(len(tokens), EXPERTS, dtype=tokens.dtype).scatter(1, chosen, weights)
        return (y * scores.t()[..., None]).sum(0)


class EinsumExperts(StackedExperts):
    """Every expert sees every token, by `einsum`."""

    def forward(self, tokens, chosen, weights):
        gate, up = torch.einsum("nd,eid->nei", tokens, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("nei,edi->ned", F.silu(gate) * up, self.down_proj)
        scores = torch.zeros(len(tokens), EXPERTS, dtype=tokens.dtype).scatter(1, chosen, weights)
        return torch.einsum("ned,ne->nd", y, scores)


class GroupedExperts(StackedExperts):
    """Tokens sorted by expert, in one product over groups."""

    def forward(self, tokens, chosen, weights):
        order = chosen.flatten().argsort()
        ends = torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0).int()
        inner = F.grouped_mm(tokens[order // TOP], self.gate_up_proj.transpose(1, 2), offs=ends)
        gate, up = inner.chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        y = (y * weights.flatten()[order, None])[order.argsort()]
        return y.view(*chosen.shape, -1).sum(1)


class SharedExpert(nn.Module):
    """An expert for all tokens, behind a sigmoid gate of its own (Qwen 2)."""

    def __init__(self):
        super().__init__()
        self.expert, self.gate = Expert(), nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x):
        return self.gate(x).sigmoid() * self.expert(x)


class Mixture(nn.Module):
    """A layer before the mixture, so that its input depends on parameters, and a head."""

    def __init__(self, router, experts, *, shared=False):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.router, self.experts = router(), experts()
        self.shared = SharedExpert() if shared else None
        self.chosen = None

    def forward(self, x):  # (B, T, d)
        x = x + self.first(x)
        y = self.norm(x)
        tokens = y.reshape(-1, WIDTH)
        chosen, weights = self.router(tokens)
        self.chosen = chosen.view(*x.shape[:2], TOP)
        y = self.experts(tokens, chosen, weights).view(x.shape) + (self.shared(y) if self.shared is not None else 0)
        return self.head(x + y)


ROUTERS = [LinearRouter, ParameterRouter]
KINDS = [ListedExperts, SkippedExperts, SequencedExperts, StackedExperts, GatheredExperts, DenseExperts, EinsumExperts]


@pytest.mark.parametrize(("batch", "length"), [(1, 4), (4, 3), (3, 3)])
@pytest.mark.parametrize("experts", KINDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_mixtures_of_experts_are_exact(router, experts, batch, length):
    assert_exact_alone(Mixture(router, experts).double(), draw(batch, length, WIDTH))


@pytest.mark.parametrize("experts", KINDS)
def test_shared_experts_are_exact(experts):
    assert_exact_alone(Mixture(LinearRouter, experts, shared=True).double(), draw(3, 4, WIDTH))


def experts_by_token(model, x):
    with torch.no_grad():
        model(x)
    return model.chosen


@pytest.mark.parametrize("experts", KINDS)
def test_an_expert_without_tokens_is_exact(experts):
    class Router(LinearRouter):
        def forward(self, tokens):
            logits = self.gate(tokens) - 1e4 * F.one_hot(torch.tensor(1), EXPERTS)
            weights, chosen = logits.softmax(-1).topk(TOP, dim=-1)
            return chosen, weights / weights.sum(-1, keepdim=True)

    model, x = Mixture(Router, experts).double(), draw(3, 4, WIDTH)
    assert (experts_by_token(model, x) != 1).all()
    assert_exact_alone(model, x)


@pytest.mark.parametrize("experts", KINDS)
def test_an_expert_with_the_tokens_of_one_example_alone_is_exact(experts):
    class Router(LinearRouter):
        def forward(self, tokens):
            distance = (tokens.detach().view(-1, 4, WIDTH)[:, :1] - mark).abs().amax(-1)  # (B, 1)
            mine = (distance < 1e-6).expand(-1, 4).reshape(-1, 1)
            choice = F.one_hot(torch.tensor(2), EXPERTS) * torch.where(mine, 1e4, -1e4)
            weights, chosen = (self.gate(tokens) + choice).softmax(-1).topk(TOP, dim=-1)
            return chosen, weights + self.gate(tokens).gather(1, chosen)

    model, x = Mixture(Router, experts).double(), draw(3, 4, WIDTH)
    with torch.no_grad():
        mark = model.norm(x + model.first(x))[1, 0].clone()
    chosen = experts_by_token(model, x)
    assert (chosen[1] == 2).any(-1).all()
    assert (chosen[[0, 2]] != 2).all()
    assert_exact_alone(model, x)


@pytest.mark.parametrize("frozen", ["router", "experts", "first"])
@pytest.mark.parametrize("experts", [ListedExperts, StackedExperts, DenseExperts])
def test_mixtures_with_a_frozen_part_are_exact(experts, frozen):
    model = Mixture(ParameterRouter, experts).double()
    getattr(model, frozen).requires_grad_(False)
    assert_exact_alone(model, draw(3, 4, WIDTH))


def test_one_mixture_used_by_two_layers_is_exact():
    class Twice(Mixture):
        def forward(self, x):
            return super().forward(x + super().forward(x).repeat(1, 1, 2))

    assert_exact_alone(Twice(LinearRouter, StackedExperts).double(), draw(3, 4, WIDTH))


def test_grouped_products_are_exact_or_refused():
    model, x = Mixture(LinearRouter, GroupedExperts), draw(3, 4, WIDTH).float()
    try:
        by_loop(model, x, plain_losses, max_grad_norm=1.0)
    except RuntimeError as error:
        pytest.skip(f"no grouped product on this device: {error}")
    assert_exact_or_refused(model, x, rtol=2e-3)


class Dispatched(ListedExperts):
    """Tokens are dispatched by a product with a one-hot matrix (Mesh, GShard), with room for all of them."""

    def forward(self, tokens, chosen, weights):
        used = F.one_hot(chosen, EXPERTS).to(tokens.dtype)  # (N, k, E)
        mask = used.sum(1)
        place = F.one_hot((mask.cumsum(0) * mask).long(), len(tokens) + 1)[..., 1:].to(tokens.dtype)  # (N, E, N)
        rows = torch.einsum("nec,nd->ecd", place, tokens)
        y = torch.stack([expert(row) for expert, row in zip(self.experts, rows, strict=True)])
        return torch.einsum("nec,ne,ecd->nd", place, (used * weights[..., None]).sum(1), y)


def test_dispatch_by_one_hot_products_is_exact_or_refused():
    assert_exact_or_refused(Mixture(LinearRouter, Dispatched).double(), draw(3, 4, WIDTH))


class Balanced(nn.Module):
    """Returns the output and the probabilities of the router (B, T, E)."""

    def __init__(self, experts):
        super().__init__()
        self.mixture = Mixture(LinearRouter, experts)

    def forward(self, x):
        y = self.mixture(x)
        hidden = self.mixture.norm(x + self.mixture.first(x))
        return y, self.mixture.router.gate(hidden).softmax(-1)


def balance(model, probabilities, over):
    """E times the sum over experts of the share of tokens and the mean probability."""
    chosen = F.one_hot(model.mixture.chosen, EXPERTS).to(probabilities.dtype).sum(2)
    return EXPERTS * (chosen.mean(over) * probabilities.mean(over)).sum(-1)


def losses_with_balance_of_the_batch(model, x):
    y, probabilities = model(x)
    return y.sin().flatten(1).sum(1) + balance(model, probabilities, (0, 1))


def losses_with_balance_of_each_example(model, x):
    y, probabilities = model(x)
    return y.sin().flatten(1).sum(1) + balance(model, probabilities, 1)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("experts", [ListedExperts, StackedExperts])
def test_a_balancing_loss_over_the_batch_is_refused_and_reported(experts, passes):
    model, x = Balanced(experts).double(), draw(4, 3, WIDTH)
    assert not verify(model, x, losses_with_balance_of_the_batch, passes=passes).ok
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    with pytest.raises(ValueError) as refusal:
        clipper.backward(losses_with_balance_of_the_batch(model, x))
    assert raised_by_memsave(refusal.value)
    assert all(p.grad is None for p in model.parameters())


def test_a_balancing_loss_of_shares_alone_is_reported():
    """The share of tokens has no gradient, so that only a comparison with other batches finds it."""

    def losses(model, x):
        y, probabilities = model(x)
        share = F.one_hot(model.mixture.chosen, EXPERTS).to(y.dtype).sum(2).mean((0, 1))
        return y.sin().flatten(1).sum(1) + EXPERTS * (share * probabilities.mean(1)).sum(-1)

    report = verify(Balanced(StackedExperts).double(), draw(4, 3, WIDTH), losses)
    assert not report.ok


@pytest.mark.parametrize("experts", [ListedExperts, StackedExperts])
def test_a_balancing_loss_of_each_example_is_exact(experts):
    assert_exact_alone(Balanced(experts).double(), draw(3, 4, WIDTH), losses_with_balance_of_each_example)
