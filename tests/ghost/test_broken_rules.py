"""Each layer rule, and the arithmetic that all rules share, broken by a factor of 1.01 or an exchange: found."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from memsave.ghost import rule
from memsave.ghost.gradients import FactoredGrad, PerSampleGrad, ViewGrad
from memsave.ghost.parameter_source import Lookup
from memsave.ghost.rows import RowSplit
from tests.support.examples_alone import draw, draw_ids, plain_losses
from tests.support.operator_cases import BATCH, LENGTH, WIDTH, Use
from tests.support.per_example_reference import assert_exact

LAYERS = {
    "linear": (lambda: nn.Linear(WIDTH, 3), (BATCH, LENGTH, WIDTH)),
    "conv1d of transformers": (lambda: Conv1D(3, WIDTH), (BATCH, LENGTH, WIDTH)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (BATCH, 4, WIDTH)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (BATCH, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding="same"), (BATCH, 2, 2, 3, 2)),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), (BATCH, LENGTH, WIDTH)),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), (BATCH, LENGTH, WIDTH)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (BATCH, 4, WIDTH)),
    "embedding": (lambda: nn.Embedding(9, WIDTH, padding_idx=2), None),
    "rms norm of transformers": (lambda: LlamaRMSNorm(WIDTH), (BATCH, LENGTH, WIDTH)),
}


def larger(gradient, factor=1.01):
    """The gradient, too large or too small by a factor."""
    if isinstance(gradient, PerSampleGrad):
        return PerSampleGrad(gradient.values * factor)
    return replace(gradient, output_grads=gradient.output_grads * factor)


def assert_layer_exact(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    model = layer().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5)
    tolerance = 1e-5 if "norm of transformers" in name else 1e-9  # it computes in float32 inside
    batch = draw_ids(9, BATCH, LENGTH) if shape is None else draw(*shape)
    assert_exact(model, batch, plain_losses, rtol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_broken_layer_rule_is_found(name, which, factor, monkeypatch):
    layer, _ = LAYERS[name]
    if which not in dict(layer().named_parameters()):
        pytest.skip("has no such parameter")
    found = rule.registered_rule(layer())
    calls = []

    def wrong(module, inputs):
        output = found(module, inputs)
        calls.append(output)

        def per_example_grads(saved, grad):
            gradients = output.per_example_grads(saved, grad)
            gradients[which] = larger(gradients[which], factor)
            return gradients

        return replace(output, per_example_grads=per_example_grads)

    assert_layer_exact(name)
    monkeypatch.setattr("memsave.ghost.attach.registered_rule", lambda _: wrong)
    with pytest.raises(AssertionError):
        assert_layer_exact(name)
    assert calls


def time_first(h, w):
    return torch.roll(h.transpose(0, 1) * w, 1, 0).transpose(0, 1)


def routed(h, w):
    rows = h.flatten(0, 1)
    order = rows.detach()[:, 0].argsort()
    return (rows[order] @ w)[order.argsort()].view(BATCH, LENGTH, -1)


def positions(h, w):
    return h + torch.nn.functional.embedding(torch.tensor([0, 3, 3, 1]), w)


def experts(h, w):
    return torch.cat([h @ w[0], h @ w[2]], -1)


def exchanged(function):
    """The function, with the values of the first two examples exchanged."""

    def wrong(self, *args):
        found = function(self, *args)
        order = list(range(len(found)))
        order[:2] = reversed(order[:2])
        return found[order]

    return wrong


def wrong_sum(self, weights, **options):
    return RIGHT.weighted_sum(self, weights * 1.01, **options)


def wrong_lookup(self, of_output):
    return larger(RIGHT.lookup(self, of_output))


RIGHT = SimpleNamespace(weighted_sum=ViewGrad.weighted_sum, lookup=Lookup.gradient)
BROKEN = {
    "copies of rows": (RowSplit, "reduced", exchanged(RowSplit.reduced), time_first, (WIDTH,)),
    "stacked rows": (RowSplit, "stacked", exchanged(RowSplit.stacked), routed, (WIDTH, 3)),
    "look-up": (Lookup, "gradient", wrong_lookup, positions, (5, WIDTH)),
    "sum of a view": (ViewGrad, "weighted_sum", wrong_sum, experts, (4, WIDTH, 3)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_arithmetic_is_found(name, monkeypatch):
    owner, method, wrong, call, *shapes = BROKEN[name]
    model, batch = Use(call, *shapes), draw(BATCH, LENGTH, WIDTH)
    assert_exact(model, batch, plain_losses)
    monkeypatch.setattr(owner, method, wrong)
    with pytest.raises(AssertionError):
        assert_exact(model, batch, plain_losses)


def test_the_factored_gradient_of_a_view_is_larger():
    grads, inputs = draw(2, 3, 4), draw(2, 3, 5)
    wrong = larger(FactoredGrad(grads, inputs)).per_sample().values
    torch.testing.assert_close(wrong, 1.01 * FactoredGrad(grads, inputs).per_sample().values)
