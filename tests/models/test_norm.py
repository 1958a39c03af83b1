"""GroupNorm with its own path on CUDA: values and gradients are those of PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from memsave.models import norm
from memsave.models.norm import GroupNorm, group_norm


@pytest.fixture(autouse=True)
def _always_fast(monkeypatch):
    monkeypatch.setattr(norm, "has_fast_forward", lambda x, groups: x.numel() > 0)


def gradients(function, tensors, upstream):
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream, create_graph=False)]


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    size=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    last=st.booleans(),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_values_and_gradients_are_those_of_pytorch(device, batch, groups, per_group, size, last, offset):
    torch.manual_seed(0)
    channels = groups * per_group
    x = torch.randn(batch, channels, *size, dtype=torch.float64) + offset
    if last and len(size) == 3:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    tensors = [x, torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)]
    upstream = torch.randn_like(x)
    ours = gradients(lambda x, w, b: group_norm(x, groups, w, b, eps=1e-5), tensors, upstream)
    theirs = gradients(lambda x, w, b: F.group_norm(x, groups, w, b, 1e-5), tensors, upstream)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-8 * max(1.0, offset))


def test_a_gradient_can_be_differentiated(device):
    torch.manual_seed(0)
    tensors = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 4, 3, 2), (4,), (4,))]
    assert torch.autograd.gradgradcheck(lambda x, w, b: group_norm(x, 2, w, b, eps=1e-5), tensors)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_is_frozen_gets_no_gradient(device, frozen):
    layer = GroupNorm(2, 4).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=frozen != "input")
    if frozen != "input":
        getattr(layer, frozen).requires_grad_(False)
    layer(x).square().sum().backward()
    assert [p.grad is None for p in (layer.weight, layer.bias, x)] == [
        frozen == each for each in ("weight", "bias", "input")
    ]


def test_autocast_computes_in_float32(device):
    layer, x = GroupNorm(2, 4), torch.randn(2, 4, 6)
    with torch.autocast(device, torch.bfloat16):
        found = layer(x.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found.float(), F.group_norm(x.bfloat16().float(), 2), atol=2e-2)


def test_the_path_is_chosen_by_device_and_size(monkeypatch):
    monkeypatch.undo()
    large = torch.empty(1, 16, 64, 64, 64, device="meta")
    assert not norm.has_fast_forward(large, 8)

    class OnCuda:
        device = torch.device("cuda")
        dim, shape = large.dim, large.shape

        def __init__(self, elements):
            self.numel = lambda: elements

    assert norm.has_fast_forward(OnCuda(2**22), 8)
    assert not norm.has_fast_forward(OnCuda(2**10), 8)
    assert not norm.has_fast_forward(OnCuda(2**30), 512)


def test_a_state_dict_is_that_of_pytorch():
    assert GroupNorm(2, 4).state_dict().keys() == nn.GroupNorm(2, 4).state_dict().keys()
