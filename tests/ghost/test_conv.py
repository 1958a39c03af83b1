"""Convolutions against one backward per example, over dimensions, shapes and options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memsave.ghost import GhostClipper
from memsave.ghost.rule import registered_rule
from memsave.ghost.rules import conv
from memsave.models import ReversibleUNet3d
from memsave.models.mbconv import DepthwiseConv3d
from memsave.models.memory import MEMORY_MODES
from tests.ghost.test_layers import Head, draw, losses_of
from tests.support.per_example_reference import assert_exact

pytestmark = pytest.mark.usefixtures("device")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw_from):
    """(layer, shape of an input that it accepts)."""
    space, groups = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 3))

    def sizes(most):
        return tuple(draw_from(st.lists(st.integers(1, most), min_size=space, max_size=space)))

    kernel, dilation = sizes(3), sizes(2)
    padding = draw_from(st.sampled_from(["same", "valid", 0, 1, (1, 0, 2)[:space]]))
    stride = 1 if padding == "same" else sizes(2)
    inputs, outputs = groups * draw_from(st.integers(1, 2)), groups * draw_from(st.integers(1, 2))
    layer = CONVOLUTIONS[space](
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw_from(st.booleans()),
    )
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    space_sizes = [each + draw_from(st.integers(1, 3)) for each in reach]
    return layer, (draw_from(st.integers(1, 4)), inputs, *space_sizes)


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_convolutions_of_any_shape_are_exact(case):
    layer, shape = case
    torch.manual_seed(0)
    assert_exact(Head(layer, before=nn.PReLU()).double(), draw(*shape), losses_of)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 4)),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (3, 4, 5, 5)),
        (nn.Conv1d(3, 2, 4, padding="same", dilation=3), (3, 3, 8)),
        (nn.Conv2d(3, 4, 1), (3, 3, 4, 5)),
        (nn.Conv2d(3, 4, 1, padding=1), (3, 3, 4, 5)),
        (nn.Conv2d(3, 4, 1, stride=2), (3, 3, 4, 5)),
        (nn.Conv2d(4, 4, 1, groups=2), (3, 4, 4, 5)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 3, 4, 5)),
        (nn.Conv1d(3, 4, 3, padding="same", padding_mode="reflect"), (3, 3, 6)),
        (DepthwiseConv3d(3, bias=True), (2, 3, 3, 4, 3)),
    ],
    ids=[
        "depthwise",
        "multiplier",
        "uneven same",
        "pointwise",
        "padded",
        "strided",
        "grouped",
        "circular",
        "reflect",
        "own",
    ],
)
def test_all_options_of_convolutions_are_exact(layer, shape):
    assert_exact(Head(layer).double(), draw(*shape), losses_of)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_convolution_with_a_frozen_weight_or_bias_is_exact(frozen):
    layer = nn.Conv1d(3, 4, 3)
    layer.get_parameter(frozen).requires_grad_(False)
    assert_exact(Head(layer, before=nn.PReLU()).double(), draw(3, 3, 6), losses_of)


def test_a_convolution_used_twice_is_exact():
    layer = nn.Conv1d(3, 3, 3, padding=1)
    assert_exact(nn.Sequential(layer, nn.Tanh(), layer).double(), draw(4, 3, 6), losses_of)


def test_subclasses_have_no_rule_unless_registered_by_name():
    class Own(nn.Conv1d):
        pass

    assert registered_rule(Own(2, 2, 1)) is None
    assert registered_rule(DepthwiseConv3d(2)) is conv.conv


def test_inputs_without_a_batch_are_refused():
    layer = nn.Conv1d(3, 3, 1)
    GhostClipper(layer, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"\(Conv1d\) got an input of shape \(3, 5\).*give it 3 dimensions"):
        layer(torch.randn(3, 5))


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_the_reversible_unet_is_exact_in_each_memory_mode(memory):
    torch.manual_seed(0)
    net = ReversibleUNet3d(2, 3, channels=(4, 8), expansion=2, squeeze_excitation=0.5, dropout=0.1, memory=memory)
    assert_exact(net.double(), draw(3, 2, 4, 5, 4), losses_of)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_all_layers_of_the_reversible_unet_have_rules(memory):
    """What has none is followed operator by operator, in every step."""
    net = ReversibleUNet3d(2, 3, channels=(4, 8), expansion=2, memory=memory).double()
    clipper = GhostClipper(net, max_grad_norm=1.0)
    clipper.backward(losses_of(net, draw(3, 2, 4, 5, 4)))
    assert clipper._following.needed is False
