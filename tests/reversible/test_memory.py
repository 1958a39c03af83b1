"""The memory of a reversible sequence does not grow with its depth."""

import gc
import weakref

import torch
from torch import nn

from memsave.profiler import MemoryRecorder
from tests.support.reversible_blocks import sequence, twin_of


def live_peak(net, x):
    """The peak of all bytes except parameters and their gradients."""
    with MemoryRecorder(net) as recorder:
        net(x).square().mean().backward()
        net.zero_grad()
    timeline = recorder.report().timeline
    held = timeline.by_category()
    return max(map(sum, zip(*(sizes for name, sizes in held.items() if name not in ("parameter", "gradient")))))


def test_live_activation_bytes_are_flat_in_depth():
    x = torch.randn(1, 16, 32, 32)
    peaks = {depth: live_peak(sequence(depth, 16, dtype=torch.float32), x) for depth in (4, 64)}
    assert peaks[4] == peaks[64]
    assert live_peak(twin_of(sequence(16, 16, dtype=torch.float32)), x) > 5 * peaks[64]


def test_activations_are_freed_by_reference_counts_alone():
    freed = []

    class MemoryMonitor(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            hidden = self.conv(x)
            freed.append(weakref.ref(hidden.untyped_storage()))
            return hidden.sin()  # sin saves hidden

    net = sequence(depth=3, branch=MemoryMonitor, dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        y = net(torch.randn(1, 4, 8, 8))
        assert all(reference() is None for reference in freed)  # the forward frees all tensors of branches
        y.sum().backward()
        del y
        assert all(reference() is None for reference in freed)
    finally:
        gc.enable()


def test_an_output_dropped_without_backward_frees_its_context():
    net, x = sequence(dtype=torch.float32), torch.randn(1, 4, 8, 8)
    gc.collect()
    gc.disable()
    try:
        y = net(x)
        reference = weakref.ref(y.untyped_storage())
        del y
        assert reference() is None
    finally:
        gc.enable()
