"""RecastConv3d: a convolution that keeps no narrow copy of an input which something else keeps."""

import weakref

import pytest
import torch

from memsave.models.recast import RecastConv3d
from memsave.offload import ActivationOffload
from memsave.profiler import MemoryRecorder

pytestmark = pytest.mark.usefixtures("device")


def layer(*, kept=True):
    torch.manual_seed(0)
    conv = RecastConv3d(4, 6, 3, stride=2, padding=1)
    conv.input_is_kept = kept
    return conv


def volume(*, requires_grad=True, side=6):
    torch.manual_seed(1)
    return torch.randn(2, 4, side, side, side + 1).requires_grad_(requires_grad)


def autocast(dtype):
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


def gradients(conv, x, dtype, *, order=1):
    with autocast(dtype):
        value = conv(x).float().square().sum()
    inputs = [x, *conv.parameters()]
    found = torch.autograd.grad(value, inputs, create_graph=order == 2)
    return found if order == 1 else torch.autograd.grad(sum(each.square().sum() for each in found), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_those_of_the_plain_layer_bit_for_bit(dtype, order):
    found = [gradients(layer(kept=kept), volume(), dtype, order=order) for kept in (True, False)]
    assert all(torch.equal(*pair) and pair[0].abs().sum() > 0 for pair in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", ["weight", "bias", "x", "all"])
def test_frozen_tensors(frozen):
    def found(kept):
        conv = layer(kept=kept)
        tensors = {"x": volume(), **dict(conv.named_parameters())}
        for name in ("weight", "bias") if frozen == "all" else (frozen,):
            tensors[name].requires_grad_(False)
        with autocast(torch.bfloat16):
            conv(tensors["x"]).float().square().sum().backward()
        return [each.grad for each in tensors.values() if each.requires_grad]

    assert all(torch.equal(*pair) for pair in zip(found(True), found(False), strict=True))


def test_a_layer_that_saves_no_input_does_not_hold_it():
    conv, x = layer(), volume() * 1
    conv.weight.requires_grad_(False)
    reference = weakref.ref(x.untyped_storage())
    with autocast(torch.bfloat16):
        y = conv(x)
    del x
    assert y.requires_grad and reference() is None


def test_the_graph_can_be_differentiated_again():
    conv, x = layer(), volume()
    with autocast(torch.bfloat16):
        value = conv(x).sum()
    first = torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(value, x))


def test_no_narrow_copy_is_alive_after_the_forward():
    def added_bytes(kept):
        conv, x = layer(kept=kept), volume(side=32)
        with MemoryRecorder(conv) as recorder, autocast(torch.bfloat16):
            y = conv(x)
        assert y.requires_grad
        totals = recorder.report().timeline.totals()
        return totals[-1] - totals[0]

    assert added_bytes(False) - added_bytes(True) == volume(side=32).numel() * 2


def test_an_input_that_is_changed_in_place_is_refused():
    conv, x = layer(), volume(requires_grad=False)
    with autocast(torch.bfloat16):
        value = conv(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_weight_that_is_changed_in_place_is_refused():
    """Without the copy in bfloat16 that autocast makes of a parameter, autograd saves the parameter itself."""
    conv, x = layer().bfloat16(), volume()
    with autocast(torch.bfloat16):
        value = conv(x).sum()
    with torch.no_grad():
        conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        value.backward()


def test_the_input_is_offloaded_in_the_place_of_its_copy():
    conv, x = layer(), volume(side=32)
    plain = gradients(conv, x, torch.bfloat16)
    offload, wide = ActivationOffload(conv, min_bytes=1), x * 1
    reference = weakref.ref(wide.untyped_storage())
    with offload(), autocast(torch.bfloat16):
        value = conv(wide).float().square().sum()
    del wide
    assert reference() is None
    found = torch.autograd.grad(value, [x, *conv.parameters()])
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_without_autocast_it_is_the_plain_layer():
    conv, x = layer(), volume()
    assert torch.equal(conv(x), torch.nn.functional.conv3d(x, conv.weight, conv.bias, stride=2, padding=1))
