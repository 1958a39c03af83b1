"""Layers without a rule: the operators that use their parameters are followed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, PerSampleGrad, RuleOutput, register_rule
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
@pytest.mark.parametrize("layer", [Branches, FunctionalDropout, WritesItsInput])
def test_layers_whose_output_depends_on_the_batch_or_on_chance_are_exact(layer, batch):
    model = nn.Sequential(nn.Linear(3, 3), layer()).double()
    assert_exact(model, draw(batch, 20, 3), losses_of)


def test_rows_of_two_examples_that_are_added_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), FirstIsSpecial()).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"1\.scale .* rows could not be followed to their examples"):
        clipper.backward(losses_of(model, draw(4, 20, 3)))


class Gated(Own):
    """Adds the mean of a table, which may be as long as the batch, behind a gate."""

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


@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_a_table_as_long_as_the_batch_behind_a_gate_is_exact(gate):
    model = WithTable().double()
    nn.init.constant_(model.layer.gate, gate)
    for batch in (4, 5):
        assert_exact(model, draw(batch, 3), losses_of)


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


def test_an_autograd_function_of_examples_and_a_parameter_is_refused_unless_its_layer_has_a_rule():
    class WithRule(Own):
        def __init__(self):
            super().__init__()
            self.weight = self.scale  # the names that rules expect
            del self.scale

        def forward(self, x):
            return Custom.apply(x, self.weight)

    @register_rule(WithRule)
    def rule(layer, inputs):
        def per_example_grads(saved, grad):
            return {"weight": PerSampleGrad((saved[0] * grad).reshape(len(grad), -1, grad.shape[-1]).sum(1))}

        return RuleOutput(inputs.args, inputs.kwargs, (inputs.input,), per_example_grads)

    model = nn.Sequential(nn.Linear(3, 3), CustomFunction()).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(4, 7, 3))
    with pytest.raises(ValueError, match=r"1\.scale has a gradient that passed no norm hook.*register_rule"):
        clipper.backward(losses)
    assert_exact(nn.Sequential(nn.Linear(3, 3), WithRule()).double(), draw(4, 7, 3), losses_of)


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
        Spectral,
        *(lambda kind=kind: only_output(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    ],
    ids=["item", "in place", "complex", "LSTM", "GRU", "RNN"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layers_that_ask_write_or_return_tuples_are_exact(make):
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


class OfConstant(nn.Module):
    """Multiplies with what a layer makes of a constant vector."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x * self.layer(torch.ones(4, dtype=x.dtype))


def test_a_layer_of_a_constant_vector_is_exact():
    assert_exact(OfConstant().double(), draw(4, 4), losses_of)


class OneLookUp(nn.Module):
    """Adds one entry of a table to all positions of all examples."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x):  # (B, T, 4) + (1, 4)
        return self.layer(x + self.table(torch.tensor([3])))


def test_one_entry_of_a_table_for_all_examples_is_exact():
    assert_exact(OneLookUp().double(), draw(3, 5, 4), losses_of)


class Raising(Own):
    """Refuses to run on one example alone."""

    def forward(self, x):
        if len(x) == 1:
            raise TypeError("give me more")
        return x * self.scale


def test_a_layer_runs_on_the_whole_batch_only():
    assert_exact(nn.Sequential(nn.Linear(3, 3), Raising()).double(), draw(4, 3), losses_of)


def test_a_layer_that_drops_paths_is_exact():
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
    assert_exact(model, draw(6, 3), losses_of)


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


def test_a_layer_without_a_rule_under_autocast_gives_finite_norms():
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
