"""The memory of the fused engine is flat in depth, decreases with the number of chunks, and is freed after the step."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.profiler import MemoryRecorder
from memsave.reversible import Stream
from tests.reversible.test_fused import sequence, volume
from tests.reversible.test_memory import live_peak


def stack(depth, chunks, *, engine="fused"):
    return sequence(depth, 16, dtype=torch.float32, expansion=6, chunks=chunks, engine=engine)


def channels_last(*shape):
    """A fake tensor in channels_last_3d; fake tensors cannot be converted to a memory format."""
    strides = torch.empty(shape, device="meta", memory_format=torch.channels_last_3d).stride()
    return torch.empty_strided(shape, strides)


def test_live_bytes_are_flat_in_depth_and_decrease_with_the_number_of_chunks():
    x = volume(16, 16, 16, batch=1, channels=16, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    stream = x.numel() * x.element_size()
    for chunks, limit in {2: 12.5, 8: 6.5}.items():
        peaks = {live_peak(stack(depth, chunks), x) for depth in (2, 4)}
        assert len(peaks) == 1
        assert peaks.pop() <= limit * stream
    assert live_peak(stack(2, 1), x) < 0.9 * live_peak(stack(2, 1, engine="hooks"), x)


@pytest.mark.parametrize("autocast", [False, True])
def test_real_and_fake_tensors_take_the_same_bytes(autocast):
    x = volume(16, 16, 16, batch=1, channels=16, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        real = live_peak(stack(2, 2), x)
        with FakeTensorMode():
            assert live_peak(stack(2, 2), channels_last(*x.shape)) == real


def test_a_forward_without_gradients_uses_chunks():
    def peak(net):
        with torch.no_grad(), FakeTensorMode(), MemoryRecorder(net) as recorder:
            net(channels_last(1, 16, 16, 16, 16))
        return recorder.report().peak_bytes

    with FakeTensorMode():
        net, stored = stack(2, 8), stack(2, 8)  # deepcopy would read the data pointers of fake tensors
    stored.recompute = False
    assert peak(net) < 0.5 * peak(stored)


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_the_output_is_freed_when_backward_begins(engine):
    net, alive = sequence(2, engine=engine), []
    y = net(volume())
    reference = weakref.ref(y.untyped_storage())
    net.blocks[0].f.expand.weight.register_hook(lambda grad: alive.append(reference() is not None))
    loss = y.sum()
    del y
    loss.backward(retain_graph=True)
    loss.backward()
    assert alive == [True, False]


def test_a_backward_leaves_no_stream_while_the_graph_lives_on():
    """In a network of several sequences, each would hold the stream before its first step until the backward ends."""
    net, x = stack(2, 2), volume(16, 16, 16, batch=1, channels=16, dtype=torch.float32)
    net(x).sum().backward()  # creates the gradients
    with MemoryRecorder(net) as recorder:
        loss = net(x).sum()
        loss.backward()
    totals = recorder.report().timeline.totals()
    assert loss.grad_fn is not None and totals[-1] - totals[0] < x.numel()  # less than a quarter of the stream


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_the_first_stream_is_freed_before_the_last_one_is_merged(engine, monkeypatch):
    net, halves, alive = sequence(2, engine=engine), [], []
    split, merge = net.split, Stream.merge

    def watched_split(x):
        stream = split(x)
        halves.extend(weakref.ref(half.untyped_storage()) for half in stream.halves())
        return stream

    def watched_merge(stream):
        alive.extend(half() is not None for half in halves)
        return merge(stream)

    monkeypatch.setattr(net, "split", watched_split)
    monkeypatch.setattr(Stream, "merge", watched_merge)
    assert net(volume()).requires_grad and alive == [False, False]


def test_a_step_frees_everything_without_the_garbage_collector():
    net = sequence(dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            y = net(volume(dtype=torch.float32))
            reference = weakref.ref(y.untyped_storage())
            if backward:
                y.sum().backward()
            del y
            assert reference() is None
    finally:
        gc.enable()
