"""Estimates of mixed memory modes against recorded steps of the same mixtures."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.planning.parts import REST, mixed_peak, mixed_seconds, trace_of
from memsave.profiler import MemoryRecorder
from memsave.profiler.seconds import OTHER, TimeModel
from memsave.profiler.work import WorkCounter

PARTS = ("0", "1", "2")
TIMES = TimeModel({OTHER: (1e-6, 1e-9, 1e-9)}, host=1e-6)


class Level(nn.Module):
    def __init__(self, width, *, on):
        super().__init__()
        self.layers = nn.Sequential(*(each for _ in range(3) for each in (nn.Linear(width, width), nn.Sigmoid())))
        self.on = on

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False) if self.on else self.layers(x)


def part_of(module):
    found = (module or "").partition(".")[0]
    return found if found in PARTS else REST


class Net(nn.Module):
    def __init__(self, modes):
        super().__init__()
        for name, width, on in zip(PARTS, (64, 32, 16), modes, strict=True):
            self.add_module(name, Level(width, on=on))
        self.down = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 16)])

    def forward(self, x):
        for name, down in zip(PARTS, self.down):
            x = down(self.get_submodule(name)(x))
        return self.get_submodule(PARTS[-1])(x)


def recorded(modes):
    net, counter = Net(modes), WorkCounter(part_of)
    x = torch.ones(500, 64)
    for _ in range(2):  # gradients exist in the second step
        counter.reset()
        with MemoryRecorder(net, observe=counter) as recorder:
            net(x).sum().backward()
    return recorder.report(), counter.totals


@pytest.fixture(scope="module")
def traces():
    return [trace_of(*recorded([on] * 3), part_of) for on in (False, True)]


@pytest.mark.parametrize("modes", list(product((0, 1), repeat=3)))
def test_a_mixture_is_estimated_from_steps_of_one_mode(traces, modes):
    report, work = recorded([bool(mode) for mode in modes])
    by_part = dict(zip(PARTS, modes, strict=True))
    assert mixed_peak(traces, by_part) == pytest.approx(report.peak_bytes, rel=0.02)
    assert mixed_seconds(traces, by_part, TIMES) == pytest.approx(TIMES.seconds_of(work.values()), rel=0.03)


def test_the_modes_differ(traces):
    stored, checked = (mixed_peak(traces, dict.fromkeys(PARTS, mode)) for mode in (0, 1))
    assert stored > 1.1 * checked
    slower = [mixed_seconds(traces, dict.fromkeys(PARTS, mode), TIMES) for mode in (0, 1)]
    assert slower[1] > 1.1 * slower[0]
