"""The peak of the allocator, for allocations of known size."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.profiler import MemoryRecorder, allocator_peak


def test_the_peak_of_known_allocations_is_exact():
    def step():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(3 << 20, dtype=torch.uint8)
        del a
        c = torch.empty(2 << 20, dtype=torch.uint8)
        del b, c

    assert allocator_peak(step) == 5 << 20


@pytest.mark.parametrize("profiled_before", [False, True])
def test_older_memory_and_its_release_are_not_counted(profiled_before):
    box = []

    def fill():
        box.append(torch.empty(4 << 20, dtype=torch.uint8))

    def step():
        box[0].add_(1)
        box.clear()
        return torch.empty(5 << 20, dtype=torch.uint8)

    if profiled_before:
        allocator_peak(fill)
    else:
        fill()
    assert allocator_peak(step) == 5 << 20


def test_workspaces_of_operators_are_counted():
    net, x = torch.nn.Conv3d(8, 8, 3), torch.randn(1, 8, 12, 12, 12)

    def step():
        net(x).sum().backward()
        net.zero_grad()

    with MemoryRecorder(net) as recorder:
        step()
    report = recorder.report()
    assert allocator_peak(step) > report.peak_bytes - report.start_bytes


def test_fake_tensors_and_other_devices_give_none():
    ran = []
    with FakeTensorMode():
        assert allocator_peak(lambda: ran.append(torch.empty(10))) is None
    assert allocator_peak(lambda: ran.append(torch.empty(10, device="meta")), device="meta") is None
    assert len(ran) == 2


def test_measuring_on_the_cpu_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocator_peak(lambda: torch.empty(8 << 20, dtype=torch.uint8)) == 8 << 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_on_cuda_is_exact():
    assert allocator_peak(lambda: torch.empty(8 << 20, dtype=torch.uint8, device="cuda"), device="cuda") == 8 << 20
