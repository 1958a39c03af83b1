"""1x1x1 convolutions as matrix products: values and gradients are those of `conv3d`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from memsave.models import pointwise
from memsave.models.pointwise import PointwiseConv3d, pointwise_conv3d


@pytest.fixture(autouse=True)
def _always_fast(monkeypatch):
    monkeypatch.setattr(pointwise, "has_fast_product", lambda x: True)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    outputs=st.integers(1, 5),
    size=st.tuples(*[st.integers(1, 7)] * 3),
    last=st.booleans(),
)
def test_values_and_gradients_are_those_of_conv3d(device, batch, channels, outputs, size, last):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, channels, *size).double(), torch.randn(outputs, channels, 1, 1, 1).double()
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    upstream = torch.randn(batch, outputs, *size).double()
    found = []
    for function in (pointwise_conv3d, F.conv3d):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream)])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_gradient_can_be_differentiated(device):
    torch.manual_seed(0)
    leaves = [torch.randn(*size).double().requires_grad_() for size in ((2, 3, 2, 1, 3), (2, 3, 1, 1, 1))]
    assert torch.autograd.gradgradcheck(pointwise_conv3d, leaves)


def test_autocast_casts_as_conv3d(device):
    layer, x = PointwiseConv3d(3, 4), torch.randn(1, 3, 4, 4, 4)
    with torch.autocast(device, torch.bfloat16):
        found, expected = layer(x), F.conv3d(x, layer.weight)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=2e-2)
    found.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_only_cuda_takes_the_product(monkeypatch):
    monkeypatch.undo()
    assert not pointwise.has_fast_product(torch.empty(1, 2, 3, 3, 3, device="cpu"))


def test_the_parameters_are_those_of_conv3d():
    torch.manual_seed(0)
    ours = PointwiseConv3d(3, 4)
    torch.manual_seed(0)
    theirs = nn.Conv3d(3, 4, 1, bias=False)
    assert torch.equal(ours.state_dict()["weight"], theirs.state_dict()["weight"])
