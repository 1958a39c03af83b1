"""Layers without a rule: replayed example by example, with the same outputs as in the batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact

pytestmark = pytest.mark.usefixtures("device")


class Own(nn.Module):
    """A layer with a parameter of its own."""

    def __init__(self, width=3):
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.rand(width))


class FirstIsSpecial(Own):
    """Its first row sees the second one."""

    def forward(self, x):
        return torch.cat([x[:1] + x[1:2].detach(), x[1:]]) * self.scale


class Counting(Own):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.scale * (1 + 0.1 * self.calls)


class FunctionalDropout(Own):
    def forward(self, x):
        return F.dropout(x * self.scale, 0.5, training=True)


class WritesItsInput(Own):
    def forward(self, x):
        return x.mul_(2.0) * self.scale


class Branches(Own):
    """Takes a branch that depends on the whole batch."""

    def forward(self, x):
        return x * self.scale if len(x) == 1 or x.sum() > 1e9 else x - self.scale


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layer", [FirstIsSpecial, Branches, Counting, FunctionalDropout, WritesItsInput])
def test_a_layer_whose_replay_differs_for_any_example_is_refused(layer, batch):
    if layer in (FirstIsSpecial, Branches) and batch == 1:
        pytest.skip("an example alone is the batch")
    model = nn.Sequential(nn.Linear(3, 3), layer()).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(batch, 20, 3))
    with pytest.raises(ValueError, match=rf"1 \({layer.__name__}\) gives an example another output in a replay"):
        clipper.backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_a_weight_that_changed_between_forward_and_backward_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(4, 3))
    model[1].weight.data.mul_(2)  # unseen by autograd's own check
    with pytest.raises(ValueError, match=r"1\.weight is a parameter that the forward changed|another output"):
        clipper.backward(losses)


class Gated(Own):
    """A table as long as the batch, behind a gate of zero: the output is the same if it is taken as examples."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, table):
        return x * self.scale + self.gate * table.mean(0)


class WithTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(3, 3), Gated()

    def forward(self, x):
        return self.layer(self.first(x), torch.arange(12.0, dtype=x.dtype).view(4, 3))


def test_ambiguous_batch_axes_are_refused_and_not_cached():
    model = WithTable().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(4, 3))
    with pytest.raises(ValueError, match=r"layer \(Gated\) gives the same output whether some argument of 4 rows"):
        clipper.backward(losses)
    clipper.close()
    with torch.no_grad():
        model.layer.gate += 0.3
    assert_exact(model, draw(4, 3), losses_of)  # now a table and examples give different outputs
    with torch.no_grad():
        model.layer.gate.zero_()
    assert_exact(model, draw(5, 3), losses_of)  # no argument is as long as the batch


class Masked(Own):
    """Takes lists and dicts of tensors, and a mask of all ones, which may be a table or examples."""

    def forward(self, pair, *, named):
        one, (two,) = pair
        return (one + two) * self.scale * named["mask"]


class TakesNested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.layer = nn.Linear(3, 3), nn.Linear(3, 3), Masked()

    def forward(self, x):
        return self.layer([self.first(x), (self.second(x),)], named={"mask": torch.ones(len(x), 1, dtype=x.dtype)})


@pytest.mark.parametrize("batch", [1, 3])
def test_tensor_arguments_in_lists_dicts_and_tuples_are_exact(batch):
    assert_exact(TakesNested().double(), draw(batch, 3), losses_of)


class Asks(Own):
    def forward(self, x):
        return x if x.abs().max().item() > 1e9 else x * self.scale


class Fills(Own):
    def forward(self, x):
        y = torch.zeros(x.shape, dtype=x.dtype)
        y[..., :] = x * self.scale
        return y


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(tuple(range(x.dim() - 1)))


class CustomFunction(Own):
    def forward(self, x):
        return Custom.apply(x, self.scale)


class Spectral(nn.Module):
    """A Fourier layer: complex weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x):  # (B, 7, 3)
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.weight, n=x.shape[1], dim=1)


def only_output(kind):
    class OnlyOutput(kind):
        def forward(self, x):
            return super().forward(x)[0]

    return OnlyOutput(3, 3, batch_first=True)


@pytest.mark.parametrize(
    "make",
    [
        Asks,
        Fills,
        CustomFunction,
        Spectral,
        *(lambda kind=kind: only_output(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    ],
    ids=["item", "in place", "autograd.Function", "complex", "LSTM", "GRU", "RNN"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_that_vmap_cannot_map_are_exact(make):
    model = nn.Sequential(nn.Linear(3, 3).double(), make(), nn.Linear(3, 2).double())
    for module in model:
        if not isinstance(module, Spectral):
            module.double()
    assert_exact(model, draw(4, 7, 3), losses_of)


def test_a_complex_linear_layer_is_exact():
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex128), nn.Linear(4, 2, dtype=torch.complex128))
    x = torch.complex(draw(4, 3), draw(4, 3).flip(0))
    assert_exact(model, x, lambda m, b: m(b).abs().sum(1) * torch.arange(1.0, len(b) + 1, dtype=torch.float64))
    clipper = GhostClipper(model, max_grad_norm=1e9, passes="direct")
    clipper.backward(model(x[:1]).abs().sum(1))
    assert model[0].weight.grad.is_complex()


class Raising(Own):
    """Refuses to run on one example alone."""

    def forward(self, x):
        if len(x) == 1:
            raise TypeError("give me more")
        return x * self.scale


def test_an_error_of_the_layer_itself_is_raised_with_the_layers_name():
    model = nn.Sequential(nn.Linear(3, 3), Raising()).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(4, 3))
    words = r"1 \(Raising\) cannot be differentiated example by example \(TypeError: give me more\); freeze it"
    with pytest.raises(ValueError, match=words):
        clipper.backward(losses)


def test_a_layer_that_drops_paths_is_refused_by_name():
    class DropPath(nn.Module):
        def forward(self, x):
            return x * x.new_empty(len(x), 1).bernoulli_(0.5)

    class Block(Own):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Linear(3, 3), DropPath()

        def forward(self, x):
            return x + self.drop(self.scale * self.inner(x))

    model = nn.Sequential(nn.Linear(3, 3), Block()).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(6, 3))
    with pytest.raises(ValueError, match=r"1 \(Block\) gives an example another output .* draws random numbers"):
        clipper.backward(losses)


class Latents(nn.Module):
    """Called with a number alone."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 2, 3))

    def forward(self, size):
        return self.latents.expand(size, -1, -1)


class Perceiver(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents, self.key, self.head = Latents(), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        scores = self.latents(len(x)) @ self.key(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ x)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_layer_whose_output_depends_on_no_example_is_exact(batch):
    assert_exact(Perceiver().double(), draw(batch, 5, 3), losses_of)


def test_the_replay_of_a_layer_under_autocast_gives_finite_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), only_output(nn.RNN).float(), nn.Linear(3, 2))
    model[1] = nn.Sequential(nn.Conv1d(5, 5, 3, padding=1, padding_mode="reflect"))
    model[2] = nn.Linear(8, 2)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        losses = losses_of(model, torch.randn(4, 5, 8)).float()
    assert clipper.backward(losses).isfinite().all()


def test_a_layer_without_a_rule_in_a_checkpoint_is_exact():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    assert_exact(Checkpointed().double(), draw(4, 3), losses_of)


class Inner(Own):
    """Has a child that others use, too."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child(x * self.scale).tanh()


class SharesTheChild(nn.Module):
    def __init__(self, first):
        super().__init__()
        if first:
            self.child = nn.Linear(3, 3)
            self.layer = Inner(self.child)
        else:
            self.layer = Inner(nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer.child(x)))


@pytest.mark.parametrize("first", [True, False])
def test_a_module_that_is_a_part_of_a_layer_and_called_from_outside_is_exact(first):
    assert_exact(SharesTheChild(first).double(), draw(4, 3), losses_of)
