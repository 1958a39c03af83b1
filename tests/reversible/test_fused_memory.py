"""What the fused engine holds: flat in depth, less with more chunks, and gone after the step."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.profiler import MemoryRecorder
from tests.reversible.test_fused import sequence, volume
from tests.reversible.test_memory import live_peak


def stack(depth, chunks, *, engine="fused"):
    return sequence(depth, 16, dtype=torch.float32, expansion=6, chunks=chunks, engine=engine)


def channels_last(*shape):
    """A fake tensor of that layout, which cannot be converted to."""
    strides = torch.empty(shape, device="meta", memory_format=torch.channels_last_3d).stride()
    return torch.empty_strided(shape, strides)


def test_live_bytes_are_flat_in_depth_and_fall_with_the_chunks():
    x = volume(16, 16, 16, batch=1, channels=16, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    stream = x.numel() * x.element_size()
    for chunks, limit in {2: 12.5, 4: 8.5, 8: 6.5}.items():
        peaks = {live_peak(stack(depth, chunks), x) for depth in (4, 64 if chunks == 2 else 8)}
        assert len(peaks) == 1
        assert peaks.pop() <= limit * stream
    assert live_peak(stack(4, 1), x) < 0.9 * live_peak(stack(4, 1, engine="hooks"), x)


def test_real_tensors_take_the_bytes_of_fake_ones():
    x = volume(16, 16, 16, batch=1, channels=16, dtype=torch.float32).to(memory_format=torch.channels_last_3d)
    real = live_peak(stack(2, 2), x)
    with FakeTensorMode():
        assert live_peak(stack(2, 2), channels_last(*x.shape)) == real


def test_a_forward_without_gradients_takes_chunks_too():
    def peak(net):
        with torch.no_grad(), FakeTensorMode(), MemoryRecorder(net) as recorder:
            net(channels_last(1, 16, 16, 16, 16))
        return recorder.report().peak_bytes

    with FakeTensorMode():
        net, stored = stack(2, 8), stack(2, 8)  # not a copy: that would read the data pointers of fake tensors
    stored.recompute = False
    assert peak(net) < 0.5 * peak(stored)


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_the_output_is_let_go_of_when_backward_begins(engine):
    net, alive = sequence(2, engine=engine), []
    y = net(volume())
    reference = weakref.ref(y.untyped_storage())
    net.blocks[0].f.expand.weight.register_hook(lambda grad: alive.append(reference() is not None))
    loss = y.sum()
    del y
    loss.backward(retain_graph=True)
    loss.backward()
    assert alive == [True, False]


def test_nothing_outlives_a_step_without_the_collector():
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
