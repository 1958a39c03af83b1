"""The memory of a step on a sharded model: real processes hold what is predicted on a fake group, to the byte."""

from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.processes import process_count
from memsave.profiler import MemoryRecorder
from tests.support.processes import run_processes

WIDTH, BLOCKS = 64, 4


def recorded(fake):
    """(peak bytes, by category) of the second step of a sharded network."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (process_count(),))
    with FakeTensorMode() if fake else nullcontext():
        blocks = []
        for _ in range(BLOCKS):
            blocks.append(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)))
        model = nn.Sequential(*blocks, nn.Linear(WIDTH, 10))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in (*blocks, model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        x = torch.zeros(8, WIDTH)
        for _ in range(2):
            with MemoryRecorder(model, optimizer=optimizer) as recorder:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    report = recorder.report()
    return report.peak_bytes, report.peak_by_category


def recorded_on_fake(count):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    return recorded(fake=True)


def test_fake_processes_hold_what_real_ones_do():
    real = run_processes(2, recorded, False)
    ((peak, categories),) = run_processes(1, recorded_on_fake, 2, group=False)
    assert real == [(peak, categories)] * 2
    block = 4 * (2 * 4 * WIDTH * WIDTH + 5 * WIDTH)  # bytes of its parameters
    assert categories["parameter"] == pytest.approx(BLOCKS * block / 2, rel=0.02)
    assert categories["optimizer"] == pytest.approx(2 * categories["parameter"], rel=0.02)
    assert categories["gathered"] == pytest.approx(block, rel=0.03)  # one block at a time, and the last layer
    ((peak, categories),) = run_processes(1, recorded_on_fake, 8, group=False)
    assert categories["parameter"] == pytest.approx(BLOCKS * block / 8, rel=0.02)
