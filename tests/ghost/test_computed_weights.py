"""Weights used by functions instead of layers, and weights computed from other parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from tests.support.examples_alone import assert_exact_alone, draw, draw_ids
from tests.support.large_table import ROWS, WIDTH, BesideTable, parameter

pytestmark = pytest.mark.usefixtures("device")


class Products(BesideTable):
    """`@`, `matmul` with a stack of heads, `einsum` and `bmm` with parameters."""

    def build(self):
        self.weight, self.heads = parameter(WIDTH, WIDTH), parameter(2, WIDTH, 4)
        self.query, self.single = parameter(WIDTH, 2, 4), parameter(1, WIDTH, WIDTH)

    def inside(self, x):
        x = torch.bmm(x @ self.weight.T, self.single.expand(len(x), -1, -1))
        values = torch.matmul(x[:, None], self.heads)  # (B, h, T, p)
        queries = torch.einsum("btd,dhe->bhte", x, self.query)
        return (values * queries).transpose(1, 2).flatten(2)


class Added(BesideTable):
    """`addmm` and `baddbmm` on folded rows, `addcmul`, `tensordot`, and a vector product."""

    def build(self):
        self.weight, self.bias, self.vector = parameter(WIDTH, WIDTH), parameter(WIDTH), parameter(WIDTH)
        self.last = parameter(WIDTH, WIDTH)

    def inside(self, x):
        y = torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(x.shape)
        y = torch.addcmul(y, x, self.vector) + (y @ self.vector)[..., None]
        return torch.tensordot(y, self.last, dims=([2], [0])) + torch.mv(y.flatten(0, 1), self.vector).view(
            len(x), -1, 1
        )


class Convolutions(BesideTable):
    def build(self):
        self.weight, self.bias = parameter(4, WIDTH, 3), parameter(4)
        self.depthwise, self.transposed = parameter(4, 1, 2), parameter(4, WIDTH, 2)

    def inside(self, x):
        x = F.conv1d(x.transpose(1, 2), self.weight, self.bias, padding="same")
        x = F.conv1d(x, self.depthwise, groups=4, padding=1, dilation=2)
        return F.conv_transpose1d(x, self.transposed, stride=2).transpose(1, 2)


class Images(nn.Module):
    """Convolutions in two dimensions with parameters, a standardised weight, and a modulated one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(1, 4, 3)
        self.weight, self.modulated = (nn.Parameter(torch.randn(4, 4, 3, 3)) for _ in range(2))
        self.style = nn.Linear(4, 4)

    def forward(self, x):  # (B, 1, 7, 7)
        x = self.first(x)
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        x = F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), padding=1)
        style = self.style(x.mean((2, 3)))  # (B, 4)
        weight = self.modulated * style[:, None, :, None, None]  # (B, 4, 4, 3, 3), as in StyleGAN 2
        y = F.conv2d(x.view(1, -1, *x.shape[2:]), weight.flatten(0, 1), groups=len(x))
        return y.view(len(x), 4, *y.shape[2:])


class Functions(BesideTable):
    """PReLU, bilinear products, and norms with parameters."""

    def build(self):
        self.slopes, self.pairs, self.bias = parameter(5), parameter(WIDTH, WIDTH, WIDTH), parameter(WIDTH)
        self.weights = nn.ParameterList(parameter(WIDTH) for _ in range(4))
        for weight in self.weights:
            nn.init.normal_(weight, 1, 0.3)

    def inside(self, x):
        x = F.bilinear(x, F.prelu(x, self.slopes), self.pairs, self.bias)
        x = F.layer_norm(x, (WIDTH,), self.weights[0], self.weights[1])
        x = F.group_norm(x.transpose(1, 2), 2, self.weights[2]).transpose(1, 2)
        return F.rms_norm(x, (WIDTH,), self.weights[3])


class Elementwise(BesideTable):
    """A weight that is a product of two, with a softplus and a sign."""

    def build(self):
        self.a, self.b, self.scale = parameter(WIDTH, WIDTH), parameter(WIDTH, WIDTH), parameter(WIDTH, 1)

    def inside(self, x):
        return F.linear(x, self.a * self.b * F.softplus(self.scale))


class LowRank(BesideTable):
    """The frozen weight of a child, a product of low rank, and a learned magnitude (DoRA)."""

    def build(self):
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.u, self.v, self.magnitude = parameter(WIDTH, 2), parameter(2, WIDTH), parameter(WIDTH, 1)

    def inside(self, x):
        weight = self.base.weight + self.u @ self.v
        weight = self.magnitude * weight / weight.norm(dim=1, keepdim=True)
        return F.linear(x, weight, self.base.bias) + x @ self.v.T @ self.u.T


class Kronecker(BesideTable):
    def build(self):
        self.a, self.b = parameter(2, 2), parameter(4, 4)

    def inside(self, x):
        return x @ torch.kron(self.a, self.b)


class JoinedBias(BesideTable):
    """The biases of queries and values, with zeros for the keys (BEiT), and weights joined for one product."""

    def build(self):
        self.q_bias, self.v_bias = parameter(WIDTH), parameter(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def inside(self, x):
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class Hypernetwork(BesideTable):
    """The weight is the output of a child on a parameter, without a batch axis."""

    def build(self):
        self.code, self.make = parameter(WIDTH, 3), nn.Linear(3, WIDTH)

    def inside(self, x):
        return x @ self.make(self.code).tanh()


class Spectral(BesideTable):
    def build(self):
        self.filter = nn.Parameter(torch.randn(3, WIDTH, 2, dtype=torch.float64))

    def inside(self, x):  # (B, 5, d)
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")


class Double(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Learned(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.rand(WIDTH, 1))

    def forward(self, weight):
        return weight * self.shift


def weight_norm(layer):
    return parametrizations.weight_norm(layer)


def orthogonal(layer):
    return parametrizations.orthogonal(layer)


def spectral_norm(layer):
    layer = parametrizations.spectral_norm(layer)
    layer.parametrizations.eval()
    return layer


def symmetric(layer):
    register_parametrization(layer, "weight", Double())
    return layer


def learned(layer):
    register_parametrization(layer, "weight", Learned())
    return layer


class Parametrised(BesideTable):
    """A layer with a computed weight, called twice, beside a parameter."""

    def build(self, parametrise):
        self.scale = parameter(WIDTH)
        self.layer = parametrise(nn.Linear(WIDTH, WIDTH))

    def inside(self, x):
        return self.layer(self.layer(x).tanh() * self.scale)


class ParametrisedConvolution(BesideTable):
    """The positional convolution of wav2vec 2: weight norm over the kernel."""

    def build(self):
        self.conv = parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 4, padding=2, groups=2), dim=2)

    def inside(self, x):
        return x + self.conv(x.transpose(1, 2))[..., :-1].transpose(1, 2)


class UsedTwice(BesideTable):
    """A weight in two products, one of them transposed, and as an operand of a product by elements."""

    def build(self):
        self.weight, self.scale = parameter(WIDTH, WIDTH), parameter(WIDTH)

    def inside(self, x):
        y = (x @ self.weight * self.scale).tanh() @ self.weight.T
        return y * self.scale + x @ (self.weight * self.scale)


class Recurrent(BesideTable):
    """The same parameters at each step of a loop over time, without a layer."""

    def build(self):
        self.weight, self.bias = parameter(WIDTH, WIDTH), parameter(WIDTH)

    def inside(self, x):
        state, states = x.new_zeros(len(x), WIDTH), []
        for step in x.unbind(1):
            state = torch.tanh(step + state @ self.weight + self.bias)
            states.append(state)
        return torch.stack(states, 1)


MODELS = [
    *(Products, Added, Convolutions, Functions, Elementwise, LowRank, Kronecker, JoinedBias, Hypernetwork, Spectral),
    *(ParametrisedConvolution, UsedTwice, Recurrent),
]
PARAMETRISATIONS = [weight_norm, orthogonal, spectral_norm, symmetric, learned]


@pytest.mark.parametrize("model", MODELS)
def test_weights_used_by_functions_beside_large_children_are_exact(model):
    assert_exact_alone(model().double(), draw_ids(ROWS, 2, 5))


@pytest.mark.parametrize("batch", [1, 5])  # 5: as many examples as positions
@pytest.mark.parametrize("model", MODELS)
def test_weights_used_by_functions_are_exact_for_any_batch(model, batch):
    assert_exact_alone(model(rows=30).double(), draw_ids(30, batch, 5))


@pytest.mark.parametrize("rows", [30, ROWS])
@pytest.mark.parametrize("parametrise", PARAMETRISATIONS)
def test_parametrised_weights_are_exact(parametrise, rows):
    model = Parametrised(parametrise, rows=rows).double()
    if parametrise is spectral_norm:
        model.layer.parametrizations.eval()
    assert_exact_alone(model, draw_ids(rows, 3, 5))


@pytest.mark.parametrize("batch", [1, 4])
def test_weights_modulated_by_each_example_are_exact(batch):
    assert_exact_alone(Images().double(), draw(batch, 1, 7, 7))


class Einsum(nn.Module):
    """A product over given letters, between two layers."""

    def __init__(self, equation, shape):
        super().__init__()
        torch.manual_seed(5)
        self.equation, self.first = equation, nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return torch.einsum(self.equation, self.first(x), self.weight)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 4),
    sizes=st.fixed_dictionaries({"h": st.integers(1, 4), "e": st.integers(1, 4)}),
    weight=st.sampled_from(["dh", "hd", "dhe", "thd", "td", "t", "d", "h", "tdh"]),
)
def test_any_product_of_einsum_is_exact(batch, length, sizes, weight):
    known = {"t": length, "d": 4, **sizes}
    output = "b" + "".join(letter for letter in "thed" if letter in {"t", *weight} - {"d"})
    model = Einsum(f"btd,{weight}->{output}", [known[letter] for letter in weight])
    assert_exact_alone(model.double(), draw(batch, length, 4))


class Bias(nn.Module):
    """A parameter of a shape that broadcasts."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.bias, self.scale = nn.Linear(3, 3), parameter(*shape), parameter(*shape)
        for each in (self.bias, self.scale):
            nn.init.normal_(each)

    def forward(self, x):
        return self.first(x) * self.scale + self.bias


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 4), middle=st.lists(st.integers(1, 4), max_size=2), data=st.data())
def test_parameters_of_any_shape_that_broadcasts_are_exact(batch, middle, data):
    full = [1, *middle, 3]
    shape = [data.draw(st.sampled_from([1, size])) for size in full]
    shape = shape[data.draw(st.integers(0, len(shape) - 1)) :]
    assert_exact_alone(Bias(shape).double(), draw(batch, *middle, 3))
