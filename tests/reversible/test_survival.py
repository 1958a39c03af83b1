"""Reversible sequences in training code: used twice, shared, hooked, accumulated, wrapped, compiled."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from memsave.profiler import MemoryRecorder
from memsave.reversible import AdditiveCoupling, AffineCoupling, ReversibleSequence, verify
from tests.reversible.test_sequence import distance, image
from tests.support.reversible_blocks import (
    Twice,
    assert_same,
    assert_same_as_stored,
    conv_branch,
    gradients,
    sequence,
    twin_of,
)

pytestmark = pytest.mark.usefixtures("device")


def test_a_sequence_used_twice_in_a_graph_is_exact():
    assert_same_as_stored(Twice(sequence(dropout=0.3)), image())


def test_parameters_shared_between_blocks_are_exact():
    torch.manual_seed(0)
    f, g = conv_branch(2, dropout=0.2), conv_branch(2)
    block = AdditiveCoupling(f, g)
    net = ReversibleSequence([block, AdditiveCoupling(g, f), block]).double()
    assert_same_as_stored(net, image())


def test_gradients_accumulate_over_two_steps():
    net = sequence(dropout=0.3)

    def three(model):
        torch.manual_seed(0)
        model.zero_grad()
        for scale in (1.0, 0.5, 2.0):
            model(scale * image()).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert_same(three(net), three(twin_of(net)))


def test_a_second_backward_after_a_partial_one_is_exact():
    net = sequence(dropout=0.3)

    def steps(model):
        torch.manual_seed(0)
        x = image().requires_grad_()
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward(inputs=[model.blocks[1].g[0].weight], retain_graph=True)
        part = model.blocks[1].g[0].weight.grad.clone()
        loss.backward(retain_graph=True)
        loss.backward()
        return {"part": part, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}

    assert_same(steps(net), steps(twin_of(net)))


def test_a_loss_of_a_slice_of_the_output_is_exact():
    net, x = sequence(), image()
    for part in (lambda y: y[:, :2], lambda y: y[:, 2:], lambda y: y[:1, :, ::2]):
        assert_same_as_stored(net, x, loss=lambda y, part=part: part(y).square().sum())


def test_hooks_on_inner_modules_that_change_values_and_gradients_are_exact():
    def hooked(net):
        calls = []
        conv = net.blocks[1].f[0]
        conv.register_forward_hook(lambda module, args, out: out * 1.5)
        conv.register_full_backward_hook(lambda module, down, up: (2 * down[0],))
        conv.weight.register_hook(lambda grad: calls.append("weight") or 3 * grad)
        return net, calls

    net = sequence()
    twin = twin_of(net)
    (ours, calls), (stored, expected) = hooked(net), hooked(twin)
    x = image().requires_grad_()
    results = []
    for model in (ours, stored):
        model.zero_grad()
        (grad,) = torch.autograd.grad(model(x).square().mean(), x, retain_graph=True)
        model(x).square().mean().backward()
        results.append({"x": grad, **{n: p.grad for n, p in model.named_parameters()}})
    assert_same(*results)
    assert calls == expected == ["weight"]  # a hook of a parameter runs once in both cases


def test_a_checkpoint_around_the_sequence_frees_the_output():
    torch.manual_seed(0)
    net = sequence(depth=4, channels=8, dtype=torch.float32)
    x = torch.randn(1, 8, 32, 32, requires_grad=True)

    def held(model):
        with MemoryRecorder(net) as recorder:
            loss = model(x).mean()
        loss.backward()
        return recorder.report().timeline.totals()[-1] - recorder.report().start_bytes

    plain, under = held(net), held(lambda x: checkpoint(net, x, use_reentrant=False))
    size = x.numel() * x.element_size()
    assert plain >= size > under  # the output that the context keeps is recomputed, too


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_checkpoint_around_anchors_is_exact(every):
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ReversibleSequence(sequence(depth=4, dropout=0.3).blocks, anchor_every=every)

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False) * 2

    assert_same_as_stored(Outside(), image())


def test_parameters_frozen_between_forward_and_backward_are_exact():
    net = sequence()
    results = []
    for model in (net, twin_of(net)):
        x = image().requires_grad_()
        loss = model(x).square().mean()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        results.append({"x": torch.autograd.grad(loss, x)[0]})
        assert not any(p.requires_grad for p in model.parameters())
    assert_same(*results)


def test_a_branch_that_calls_backward_in_its_forward_raises_an_error():
    class Energy(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.conv(x).square().sum(), x, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r"blocks\.0\.f calls backward inside its own forward.*recompute=False"):
        sequence(branch=Energy)(image())


def test_anchors_keep_only_their_inputs():
    torch.manual_seed(0)
    size = 4 * 8 * 32 * 32
    peaks = {}
    for every in (None, 4, 2):
        x = torch.randn(1, 8, 32, 32, requires_grad=True)
        net = ReversibleSequence(sequence(depth=8, channels=8, dtype=torch.float32).blocks, anchor_every=every)
        with MemoryRecorder(net) as recorder:
            net(x).sum().backward()
        peaks[every] = recorder.report().peak_bytes
    assert peaks[4] - peaks[None] <= 1.1 * size
    assert peaks[2] - peaks[None] <= 3.1 * size


def test_anchors_stop_the_drift():
    def branch(channels, gain=3.0):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(conv.weight, std=gain / (9 * channels) ** 0.5)
        return nn.Sequential(conv, nn.ReLU())

    net = sequence(depth=12, branch=branch, dtype=torch.float32)
    x = image(dtype=torch.float32)
    stored = gradients(twin_of(net), x)
    errors, drift = {}, {}
    for every in (None, 4, 1):
        net.anchor_every = every
        errors[every] = distance(gradients(net, x), stored)
        drift[every] = max(verify(net, x).drift[""])
    assert errors[1] < 1e-5 < errors[4] < errors[None]
    assert 10 * drift[1] < drift[4] < drift[None] / 10


@pytest.mark.parametrize("low", [False, True])
def test_a_stream_on_a_grid_is_rebuilt_exactly(low):
    blocks = sequence(depth=32, dtype=torch.float32, dropout=0.1).blocks
    net = ReversibleSequence(blocks, grid=2**-14)
    x = image(dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16, enabled=low):
        report = verify(net, x)
        assert report.ok, str(report)
        assert report.gradient == 0
        assert set(report.drift[""]) == {0.0}
        assert max(verify(ReversibleSequence(blocks), x).drift[""]) > 0  # without the grid there is drift
    y = net(x)
    assert torch.equal(y * 2**14, (y * 2**14).round())
    net.eval()
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), (x * 2**14).round() / 2**14)


def test_a_grid_is_refused_for_affine_couplings():
    blocks = [AffineCoupling(nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1))]
    with pytest.raises(TypeError, match="block 0 is a AffineCoupling, which is not exactly invertible on a grid"):
        ReversibleSequence(blocks, grid=2**-14)
    for grid in (0.1, 0.0, -0.5):
        with pytest.raises(ValueError, match="give a power of two"):
            ReversibleSequence([], grid=grid)


def _worker(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    net = sequence(dropout=0.0)
    wrapped = DistributedDataParallel(net)
    x = image(batch=4)[2 * rank : 2 * rank + 2]
    wrapped(x).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in net.named_parameters()}, results)
    torch.distributed.barrier()
    os._exit(0)  # gloo's tear-down sometimes waits forever for the other process


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    mp.spawn(_worker, args=(tmp_path / "meet", tmp_path / "gradients"), nprocs=2)
    with torch.device("cpu"):  # of gloo
        twin = twin_of(sequence(dropout=0.0))
        twin(image(batch=4)).square().mean().backward()
    assert_same(torch.load(tmp_path / "gradients"), {name: p.grad for name, p in twin.named_parameters()})


def test_a_compiled_model_has_a_graph_break_at_the_sequence():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.net, self.head = nn.Conv2d(4, 4, 1), sequence(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.head(self.net(self.stem(x)).relu()).sin()

    torch.manual_seed(0)
    net = Net().double()
    twin, compiled, x = twin_of(net), torch.compile(net, backend="aot_eager"), image()
    compiled(x).square().mean().backward()
    twin(x).square().mean().backward()
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()})
    torch._dynamo.reset()
