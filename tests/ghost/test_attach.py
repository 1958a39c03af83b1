"""Refusals at attach or in the first forward: all in one error, by name, with the remedy."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from memsave.ghost import GhostClipper
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact, by_loop

pytestmark = pytest.mark.usefixtures("device")


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls it deprecated
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


OLD = {
    "weight_norm": (old_weight_norm, r"use torch\.nn\.utils\.parametrizations\.weight_norm"),
    "spectral_norm": (spectral_norm, r"parametrizations\.spectral_norm, and put it in eval mode"),
    "prune": (pruned, r"torch\.nn\.utils\.prune\.remove, or write the mask as a parametrization"),
}


@pytest.mark.parametrize("utility", OLD)
def test_weights_that_a_hook_computes_are_refused_at_attach(utility):
    apply, remedy = OLD[utility]
    model = nn.Sequential(apply(nn.Linear(4, 4)), nn.Linear(4, 2))
    words = rf"0 \(Linear\) has a weight that torch\.nn\.utils\.{utility} computes in a hook.*{remedy}"
    with pytest.raises(ValueError, match=words):
        GhostClipper(model, max_grad_norm=1.0)


class Mask(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("mask", (weight.abs() > 0.2).to(weight.dtype))

    def forward(self, weight):
        return weight * self.mask


def in_eval_mode(layer):
    layer = parametrizations.spectral_norm(layer)
    layer.parametrizations.eval()
    return layer


def masked(layer):
    parametrize.register_parametrization(layer, "weight", Mask(layer.weight.detach()))
    return layer


def removed(layer):
    return prune.remove(pruned(layer), "weight")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("remedy", [parametrizations.weight_norm, in_eval_mode, masked, removed])
def test_remedies_for_hook_computed_weights_are_exact(remedy, bias):
    torch.manual_seed(0)
    model = nn.Sequential(remedy(nn.Linear(4, 4, bias=bias).double()), nn.Linear(4, 2).double())
    assert_exact(model, draw(3, 5, 4), losses_of)


def test_spectral_norm_in_train_mode_is_refused():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4).double()))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"0\.parametrizations\.weight\.0\._u, .*the forward changed.*in eval mode"):
        clipper.backward(losses_of(model, draw(3, 4)))


class Several(nn.Module):
    """Several classes of layers that cannot be clipped."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(5)])
        self.tracks = nn.InstanceNorm1d(4, track_running_stats=True)

    def forward(self, x):
        return x


def test_attach_reports_all_refusals_in_one_error():
    with pytest.raises(ValueError) as refusal:
        GhostClipper(Several(), max_grad_norm=1.0)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "the model cannot be clipped exactly, for 2 reasons:"
    assert lines[1].startswith("- norms.0, norms.1, norms.2 and 2 more (BatchNorm1d): each makes every example's")
    assert lines[2].startswith("- tracks (InstanceNorm1d) tracks running statistics")


def test_a_forward_reports_all_refusals_in_one_error_at_its_end():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.look = nn.Embedding(9, 4, max_norm=1.0)
            self.one, self.two = (nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True) for _ in range(2))

        def forward(self, ids):
            return self.two(self.one(self.look(ids))[0])[0]

    model = Recurrent()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError) as refusal:
        model(torch.zeros(3, 5, dtype=torch.long))
    message = str(refusal.value)
    assert "4 reasons" in message  # the forward also changes the weight that it renormalises
    assert "look (Embedding) has max_norm" in message
    assert "one.bias_hh_l0, two.bias_hh_l0: each belongs to recurrent layers with dropout between them" in message
    with pytest.raises(ValueError, match="no forward"):
        clipper.backward(torch.zeros(3, requires_grad=True))
    with torch.no_grad():
        model(torch.zeros(3, 5, dtype=torch.long))  # without gradients there is nothing to refuse


def test_parameters_used_outside_their_module_are_exact():
    class Escapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return x @ self.one.weight.T @ self.two.weight.T

    assert_exact(Escapes().double(), draw(2, 3), losses_of)


@pytest.mark.parametrize("compiled", [lambda m: torch.compile(m, backend="eager"), nn.Module.compile])
def test_a_model_that_was_compiled_before_is_refused(compiled):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = compiled(model) or model
    with pytest.raises(ValueError, match=r"was compiled before the GhostClipper was attached.*compile after that"):
        GhostClipper(before, max_grad_norm=1.0)


def test_a_model_with_a_replaced_forward_is_exact_and_keeps_it_after_close():
    """As accelerate does in mixed precision, and TRL."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    original, calls = model.forward, []

    def wrapped(*args):
        calls.append(args)
        return original(*args)

    model.forward = wrapped
    norms, _ = by_loop(model, draw(4, 3), losses_of, max_grad_norm=1.0)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    torch.testing.assert_close(clipper.backward(losses_of(model, draw(4, 3))), norms, rtol=1e-9, atol=0)
    clipper.close()
    assert model.forward is wrapped
    assert calls


def test_a_layer_with_a_replaced_forward_is_exact():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    scaled = partial(type(model[0]).forward, model[0])
    model[0].forward = lambda x: 3 * scaled(x).tanh()
    batch = draw(4, 3)
    norms, sums = by_loop(model, batch, losses_of, max_grad_norm=0.1)
    clipper = GhostClipper(model, max_grad_norm=0.1)
    torch.testing.assert_close(clipper.backward(losses_of(model, batch)), norms, rtol=1e-9, atol=0)
    torch.testing.assert_close(model[0].weight.grad, sums["0.weight"], rtol=1e-9, atol=1e-14)


def test_a_forward_that_is_replaced_after_attaching_stays_when_the_clipper_is_closed():
    model = nn.Linear(3, 2).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    ours, batch = model.forward, draw(4, 3)
    model.forward = lambda x: 2 * ours(x)
    clipper.backward(losses_of(model, batch))
    clipper.close()
    torch.testing.assert_close(model(batch), 2 * (batch @ model.weight.T + model.bias))
    losses_of(model, batch).sum().backward()


def test_a_second_clipper_is_refused_until_the_first_is_closed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3))
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(
        ValueError,
        match=r"0\.weight, 0\.bias, 1\.weight: each has another GhostClipper attached; close\(\) that one first",
    ):
        GhostClipper(model, max_grad_norm=1.0)
    clipper.close()
    GhostClipper(model, max_grad_norm=1.0).close()


def test_functional_call_is_exact_with_the_models_own_parameters_and_refused_with_others():
    model, batch = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), draw(4, 3)
    norms, _ = by_loop(model, batch, losses_of, max_grad_norm=1.0)

    def losses_with(parameters):
        return losses_of(partial(torch.func.functional_call, model, parameters), batch)

    clipper = GhostClipper(model, max_grad_norm=1.0)
    torch.testing.assert_close(clipper.backward(losses_with(dict(model.named_parameters()))), norms)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"0\.weight, .*has another tensor in its place \(torch\.func"):
        losses_with(others)
    torch.testing.assert_close(clipper.backward(losses_of(model, batch)), norms)


def test_functional_call_of_a_part_of_the_model_is_refused():
    class Swaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            twice = {"weight": 2 * self.layer.weight}
            return torch.func.functional_call(self.layer, twice, (x,))

    model = Swaps().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"layer \(Linear\) has another tensor in the place of its weight"):
        clipper.backward(losses_of(model, draw(4, 3)))


def test_a_layer_that_has_no_shape_yet_is_refused():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias: each has no shape yet; run the model once"):
        GhostClipper(model, max_grad_norm=1.0)


def test_prompt_tuning_p_tuning_and_prefix_tuning_are_exact():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def adapted(kind):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config).eval()
        return peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()

    ids = torch.randint(40, (4, 7), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    for kind in (peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig):
        assert_exact(
            adapted(kind).eval(),
            ids,
            lambda m, b: m(input_ids=b, attention_mask=torch.ones_like(b)).logits[:, -7:].square().mean((1, 2)),
        )


@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_long_t5_is_exact(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    attention = {"local_radius": 3, "global_block_size": 4, "encoder_attention_type": kind}
    config = transformers.LongT5Config(vocab_size=40, dropout_rate=0, decoder_start_token_id=0, **sizes, **attention)
    model = transformers.LongT5ForConditionalGeneration(config).double()
    ids = torch.randint(1, 40, (4, 9), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    assert_exact(model, ids, lambda m, b: m(input_ids=b, labels=b).logits.square().mean((1, 2)), rtol=1e-7)


class Lists(nn.Module):
    """Keeps its parameters in lists and dictionaries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3, 3)) for _ in range(2)])
        self.scales = nn.ParameterDict({"one": nn.Parameter(torch.rand(3))})

    def forward(self, x):
        return (x @ self.weights[0]).tanh() @ self.weights[1] * self.scales["one"]


def test_parameters_in_lists_and_dictionaries_belong_to_the_module_that_has_these():
    assert_exact(nn.Sequential(nn.Linear(3, 3), Lists()).double(), draw(4, 3), losses_of)


def test_a_copy_of_an_attached_model_has_no_clipper():
    model, batch = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3), nn.Linear(3, 2)).double(), draw(4, 3)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    norms = clipper.backward(losses_of(model, batch))
    twin = copy.deepcopy(model)
    twin.zero_grad()
    losses_of(twin, batch).sum().backward()  # a plain backward
    assert twin[0].weight.grad.any()
    twin.zero_grad()
    torch.testing.assert_close(GhostClipper(twin, max_grad_norm=1.0).backward(losses_of(twin, batch)), norms)
    torch.testing.assert_close(clipper.backward(losses_of(model, batch)), norms)  # the first is what it was


def test_losses_of_another_model_are_refused():
    model, other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    model(draw(4, 3))
    with pytest.raises(ValueError, match="depend on no trainable layer of the model's last forward"):
        clipper.backward(losses_of(other, draw(4, 3)))


def test_a_bound_whose_square_float32_does_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"max_grad_norm is 1e-25; give a positive bound.*at least 1e-15"):
        GhostClipper(nn.Linear(3, 2), max_grad_norm=1e-25)
