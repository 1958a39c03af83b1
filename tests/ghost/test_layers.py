"""Every rule against one backward per example, over shapes and options."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memsave.ghost import GhostClipper, rules
from memsave.ghost.rule import registered_rule
from tests.support.per_example_reference import assert_exact, by_clipper

pytestmark = pytest.mark.usefixtures("device")

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=2)


class Head(nn.Module):
    """A layer under test, moved to the default device, after another layer."""

    def __init__(self, layer, *, before=None):
        super().__init__()
        self.before, self.layer = before or nn.Identity(), layer.to(torch.get_default_device())

    def forward(self, x):
        return self.layer(self.before(x))


def losses_of(model, batch):
    """Losses of different sizes, so that some examples are clipped."""
    y = model(batch)
    scale = torch.arange(1, len(y) + 1, dtype=y.dtype)
    return y.sin().flatten(1).sum(1) * scale


def draw(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(7)
    )


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 5), middle=SHAPES, d=st.integers(1, 9), p=st.integers(1, 9), bias=st.booleans())
def test_linear_layers_of_any_shape_are_exact(batch, middle, d, p, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, p, bias=bias)).double()
    assert_exact(model, draw(batch, *middle, d), losses_of, clippings=("flat", "automatic"))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    positions=st.integers(1, 8),
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    padding=st.booleans(),
    shared_ids=st.booleans(),
)
def test_embeddings_of_any_shape_are_exact(batch, positions, rows, width, padding, shared_ids):
    class Look(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(rows, width, padding_idx=0 if padding else None)
            self.positions = nn.Embedding(positions, width)

        def forward(self, ids):
            at = torch.arange(positions)[None]
            return (self.tokens(ids) * 2 + self.positions(at if shared_ids else at.expand(len(ids), -1))).tanh()

    torch.manual_seed(0)
    ids = torch.randint(rows, (batch, positions), generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    assert_exact(Look().double(), ids, losses_of)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 4),
    middle=SHAPES,
    width=st.sampled_from([2, 4, 6]),
    kind=st.sampled_from(["layer", "layer2", "rms", "plain layer"]),
)
def test_norms_over_the_last_dimensions_are_exact(batch, middle, width, kind):
    torch.manual_seed(0)
    shape = (*middle, width)
    layer = {
        "layer": lambda: nn.LayerNorm(width),
        "layer2": lambda: nn.LayerNorm(shape[-2:]),
        "rms": lambda: nn.RMSNorm(width),
        "plain layer": lambda: nn.LayerNorm(width, bias=False),
    }[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1, 0.3)
    assert_exact(Head(layer, before=nn.Linear(width, width)).double(), draw(batch, *shape), losses_of)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GroupNorm(2, 4), (3, 4, 5)),
        (nn.GroupNorm(2, 4), (3, 4, 3, 2, 2)),
        (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 5, 5)),
        (nn.Conv3d(4, 4, 3, padding=1, groups=4), (2, 4, 3, 4, 3)),
        (nn.PReLU(4), (3, 4, 5)),
        (nn.ConvTranspose2d(4, 2, 2, stride=2), (3, 4, 3, 3)),
    ],
    ids=str,
)
def test_layers_with_channels_and_layers_without_a_rule_are_exact(layer, shape):
    assert_exact(Head(layer, before=nn.Conv1d(4, 4, 1) if len(shape) == 3 else None).double(), draw(*shape), losses_of)


class Scale(nn.Module):
    """A custom layer with a keyword argument."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x, *, shift):
        return (x + shift) * self.scale


def test_a_custom_layer_is_exact():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Scale(4)

        def forward(self, x):
            return self.second(self.first(x), shift=x)

    assert_exact(Own().double(), draw(4, 3, 4), losses_of)


@pytest.mark.parametrize("positions", [2, 30])
def test_parameters_used_several_times_are_exact(positions):
    class Shared(nn.Module):
        """One linear layer twice, and its weight again as an embedding."""

        def __init__(self):
            super().__init__()
            self.look, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.look.weight

        def forward(self, ids):
            return self.head(self.mix(self.mix(self.look(ids)).tanh()))

    torch.manual_seed(0)
    ids = torch.randint(7, (4, positions), generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    assert_exact(Shared().double(), ids, losses_of)


def test_an_empty_batch_adds_zeros():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    assert clipper.backward(model(draw(0, 2, 4)).sum((1, 2))).shape == (0,)
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


def test_frozen_and_unused_parameters_are_exact():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)
            self.used.weight.requires_grad_(False)  # BiTFiT: biases alone

        def forward(self, x):
            return self.frozen(self.used(x).tanh())

    model = Part().double()
    assert_exact(model, draw(3, 2, 4), losses_of)
    _, sums = by_clipper(model, draw(3, 2, 4), losses_of, max_grad_norm=1.0)
    assert sums["unused.weight"].abs().max() == 0


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_contributes_zero_and_is_counted(passes, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    batch = draw(3, 2, 4)
    broken = batch.clone()
    broken[1, 0, 2] = value
    clipper = GhostClipper(model, max_grad_norm=0.5, passes=passes)
    norms = clipper.backward(losses_of(model, broken))
    assert clipper.nonfinite == 1
    assert norms.isfinite().tolist() == [True, False, True]
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    clipper.backward(losses_of(model, batch) * torch.tensor([1.0, 0.0, 1.0]))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("passes", [1, 2])
def test_norms_are_float32_inside_and_outside_autocast(passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
    x = torch.randn(4, 5, 64)
    results = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            losses = model(x).float().square().sum((1, 2))
            if inside:
                norms = clipper.backward(losses)
        if not inside:
            norms = clipper.backward(losses)
        assert norms.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        results.append([norms, *(p.grad.clone() for p in model.parameters())])
    for outside, within in zip(*results, strict=True):
        torch.testing.assert_close(within, outside, rtol=1e-5, atol=1e-6)


def test_two_passes_sum_the_measured_gradients_under_autocast():
    """Weighted losses would be rounded to bfloat16 anew, and a clipped gradient exceed its bound."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())))

    def losses(model, x):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            return model(x).float().square().sum(1)

    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(1, 64)
        sums = [by_clipper(model, x, losses, max_grad_norm=0.037, passes=passes)[1] for passes in (1, 2)]
        for once, twice in zip(*(each.values() for each in sums), strict=True):
            torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-9)
        for each in sums:
            assert torch.stack([value.double().norm() for value in each.values()]).norm() <= 0.037 * (1 + 1e-6)


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=str)
def test_in_place_operations_after_a_layer_are_exact(after):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), after, nn.LayerNorm(4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert_exact(model.double(), draw(4, 3), losses_of)


def test_a_layer_with_a_frozen_weight_saves_no_input():
    """BitFit saves memory, because bias gradients need no inputs."""
    alive = []

    class MemoryMonitor(nn.Module):
        def forward(self, x):
            y = x * 1.0
            alive.append(weakref.ref(y))
            return y

    for trainable, expected in ((True, True), (False, False)):
        model = nn.Sequential(MemoryMonitor(), nn.Linear(3, 4))
        model[1].weight.requires_grad_(trainable)
        clipper = GhostClipper(model, max_grad_norm=1.0)
        losses = model(torch.randn(2, 3)).sum(1)
        assert (alive.pop()() is not None) == expected
        clipper.backward(losses)


def test_bfloat16_parameters_have_float32_norms_and_bfloat16_sums():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.PReLU(64), nn.Linear(64, 8)).bfloat16()
    x = torch.randn(4, 64).bfloat16()
    norms, sums = by_clipper(model, x, lambda m, b: m(b).float().square().sum(1), max_grad_norm=1.0)
    assert norms.dtype == torch.float32
    assert {each.dtype for each in sums.values()} == {torch.bfloat16}


def test_layers_without_a_rule_under_autocast_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.PReLU(4), nn.GroupNorm(2, 4))

    def losses(model, x):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            return model(x).float().sin().sum((1, 2))

    assert_exact(model, torch.randn(3, 2, 8), losses, rtol=2e-2)


@pytest.mark.parametrize(
    "kind", ["llama.Llama", "t5.T5", "gemma.Gemma", "gpt_oss.GptOss", "mistral.Mistral", "qwen3.Qwen3"]
)
def test_rmsnorms_of_hugging_face_take_their_own_rule_and_are_exact(kind):
    model, name = kind.split(".")
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    layer = getattr(module, f"{name}LayerNorm" if name == "T5" else f"{name}RMSNorm")(6)
    assert registered_rule(layer) is rules.norm.hugging_face
    nn.init.normal_(layer.weight, 1, 0.3)
    assert_exact(Head(layer, before=nn.Linear(6, 6)).double(), draw(3, 5, 6), losses_of, rtol=1e-6)


def test_an_rmsnorm_is_exact_even_if_its_first_example_is_zero():
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(6)
    x = draw(3, 5, 6)
    x[0] = 0
    assert_exact(Head(gemma).double(), x, lambda m, b: m(b).sin().sum((1, 2)), rtol=1e-6)


def test_a_gated_rmsnorm_has_no_rule():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    assert registered_rule(modeling.MambaRMSNormGated(6, 3)) is None
