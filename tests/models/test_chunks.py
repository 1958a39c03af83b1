"""An MBConv recomputed in chunks, compared with its plain forward in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memsave.models import MBConv3d, blockwise
from memsave.models.mbconv import DepthwiseConv3d

pytestmark = pytest.mark.usefixtures("device")
SIZES = st.integers(1, 5)


def branch(channels=4, *, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    block = MBConv3d(channels, **options).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # also those of the norms
    return block


def volume(block, *size, batch=2, seed=1, last=True):
    weight = block.expand.weight
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x = torch.randn(batch, weight.shape[1], *size, dtype=weight.dtype, generator=generator)
    return x.to(memory_format=torch.channels_last_3d) if last else x


def plain(block, x, grad):
    """(value, gradients of x and of all parameters) of the forward, by autograd."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    value = block(x)
    return value.detach(), torch.autograd.grad(value, [x, *block.tensors()], grad)


def in_chunks(block, x, grad):
    torch.manual_seed(5)
    found = []
    by_x, by_tensors = block.differentiate(x, grad, found=found.append)
    return found[0], [by_x, *by_tensors]


def assert_equal_to_plain(block, x, **tolerance):
    grad = torch.randn_like(x)
    ours, stored = in_chunks(block, x, grad), plain(block, x, grad)
    torch.testing.assert_close(ours[0], stored[0], **tolerance)
    for one, other in zip(ours[1], stored[1], strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(SIZES, SIZES, SIZES),
    kernel=st.sampled_from([1, 3, 5]),
    shape=st.sampled_from([(2, 2, 1), (2, 2, 2), (3, 4, 2), (4, 4, 8), (8, 6, 4), (8, 6, 8)]),
    dropout=st.sampled_from([0.0, 0.4]),
    last=st.booleans(),
)
def test_value_and_gradients_equal_those_of_the_forward(batch, size, kernel, shape, dropout, last):
    channels, expansion, chunks = shape
    block = branch(channels, expansion=expansion, chunks=chunks, kernel_size=kernel, dropout=dropout)
    assert_equal_to_plain(block, volume(block, *size, batch=batch, last=last), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("elements, chunks", [(1, 4), (512, 8), (512, 1)])  # chunks of fewer and more channels than x
@pytest.mark.parametrize("size", [(7, 6, 5), (4, 4, 4), (8, 4, 4)])  # the last block is a part, the only one, whole
def test_several_blocks_of_voxels_are_exact(size, elements, chunks, dropout, monkeypatch):
    for device in blockwise.BLOCK:
        monkeypatch.setitem(blockwise.BLOCK, device, elements)
    block = branch(8, expansion=4, chunks=chunks, dropout=dropout)
    assert_equal_to_plain(block, volume(block, *size, batch=3), rtol=1e-10, atol=1e-10)


def test_a_fake_step_counts_the_products_of_all_blocks():
    block = branch(8, expansion=4, chunks=2)
    x = volume(block, 4, 4, 4)
    with FlopCounterMode(display=False) as real:
        block.differentiate(x, x, found=lambda value: None)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as fake:
        block.differentiate(x, x, found=lambda value: None)
    products = sum(flops for op, flops in real.get_flop_counts()["Global"].items() if "memsave" in str(op))
    places, channels, expanded = 2 * 4 * 4 * 4, 8, 32
    times = 1 + 1 + 1 / 2 + 2 + 3  # all expanded and projected, one chunk of two expanded again, and the gradients
    assert products == 2 * places * channels * (times * expanded + 2 * channels)  # the covariance and its gradient
    assert fake.get_total_flops() == real.get_total_flops()


def test_a_large_mean_costs_no_precision():
    block = branch(4, dtype=torch.float32, chunks=2)
    x = volume(block, 6, 6, 6) + 1000
    double = branch(4, chunks=2)
    double.load_state_dict(block.state_dict())
    error = block.evaluate(x).double() - double.evaluate(x.double())
    assert (
        error.norm() / double.evaluate(x.double()).norm() < 2e-3
    )  # float32 has seven digits, of which the mean takes three


def test_evaluate_and_differentiate_give_bit_identical_values():
    for dtype in (torch.float32, torch.float64):
        block = branch(8, chunks=4, dropout=0.3, dtype=dtype)
        x = volume(block, 5, 4, 3)
        torch.manual_seed(5)
        value = block.evaluate(x)
        assert torch.equal(value, in_chunks(block, x, torch.ones_like(x))[0])


def test_arguments_are_not_changed():
    block = branch(4, chunks=2)
    x, grad = volume(block, 3, 3, 3), torch.randn(2, 4, 3, 3, 3, dtype=torch.float64)
    before = x.clone(), grad.clone()
    value, gradients = in_chunks(block, x, grad)
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])
    storages = {each.untyped_storage()._cdata for each in (x, grad)}
    assert not storages & {each.untyped_storage()._cdata for each in (value, *gradients)}
    assert all(p.grad is None for p in block.parameters())


def test_dropout_draws_the_random_numbers_of_the_forward():
    block = branch(4, chunks=2, dropout=0.5)
    x, after = volume(block, 3, 3, 3), []
    for run in (block, block.evaluate, lambda x: in_chunks(block, x, torch.ones_like(x))):
        torch.manual_seed(5)
        run(x)
        after.append(torch.rand(3))
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


def test_evaluation_mode_has_no_dropout():
    block = branch(4, chunks=2, dropout=0.5).eval()
    assert_equal_to_plain(block, volume(block, 3, 4, 5), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunks", [1, 4])
def test_bfloat16_autocast_is_as_accurate_as_in_the_forward(chunks):
    block = branch(8, dtype=torch.float32, chunks=chunks)
    x = volume(block, 8, 8, 8)
    grad = torch.randn_like(x)
    exact = plain(block, x, grad)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        value, gradients = in_chunks(block, x, grad)
        stored = plain(block, x, grad.bfloat16() if block(x).dtype == torch.bfloat16 else grad)
    assert value.dtype == torch.float32
    assert all(each.dtype == torch.float32 for each in gradients)
    for ours, theirs, true in zip([value, *gradients], [stored[0], *stored[1]], [exact[0], *exact[1]], strict=True):
        error, usual = ((each.float() - true).norm() / true.norm() for each in (ours, theirs))
        assert 0 < error < max(2 * usual, 0.01)  # not worse than the error of autocast in the forward
    assert (value - exact[0]).norm() > 1e-4 * exact[0].norm()  # its products are those of autocast


def test_a_bfloat16_branch_is_as_accurate_as_its_forward():
    block = branch(8, dtype=torch.bfloat16, chunks=2)
    x = volume(block, 6, 6, 6)
    grad = torch.randn_like(x)
    double = branch(8, chunks=2)
    double.load_state_dict(block.state_dict())
    (value, gradients), (true, slopes) = in_chunks(block, x, grad), plain(double, x.double(), grad.double())
    assert [each.dtype for each in gradients] == [torch.bfloat16] * len(gradients)
    for ours, exact in zip([value, *gradients], [true, *slopes], strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < 0.03


def test_chunks_that_split_groups_are_refused():
    with pytest.raises(ValueError, match="chunks is 3, but the norm of the 16 expanded channels has 8 groups"):
        MBConv3d(4, chunks=3)
    with pytest.raises(ValueError, match="chunks is 0"):
        MBConv3d(4, chunks=0)


def test_branches_that_cannot_be_recomputed_give_the_reason():
    assert branch().refusal() is None
    assert "squeeze-excitation reads all expanded channels" in branch(squeeze_excitation=0.5).refusal()
    parts = {
        "expand_norm": nn.InstanceNorm3d(16),
        "expand": nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 16, 1, bias=False)),
        "project": nn.Conv3d(16, 4, 1),
        "depthwise": DepthwiseConv3d(16, bias=True),
        "depthwise_norm": nn.GroupNorm(8, 16, affine=False),
        "project_norm": nn.Identity(),
    }
    words = [
        "is a InstanceNorm3d",
        "is a ParametrizedConv3d",
        "has other parameters than weight",
        "has other parameters than weight",
        "has other parameters than",
        "is a Identity",
    ]
    for (name, part), why in zip(parts.items(), words, strict=True):
        block = branch()
        setattr(block, name, part)
        assert f"its {name} {why}" in block.refusal()
    block = branch()
    block.expand = nn.Conv3d(4, 16, 1, bias=False, stride=2)
    assert "its expand is not a kernel_size=(1, 1, 1)" in block.refusal()
    block = branch(chunks=8)
    block.depthwise_norm = nn.GroupNorm(2, 16)
    assert block.refusal() == "8 chunks of 2 groups are not whole groups"

    class Other(MBConv3d):
        def forward(self, x):
            return super().forward(x) * 2

    assert Other(4).refusal() == "Other overrides forward()"
