"""memory_report: the predicted bytes are those of a real step, for models that were not written for memsave."""

import copy

import pytest
import torch
from torch import nn

from memsave import memory_report
from memsave.planning.any_model import MODES
from memsave.profiler import MemoryRecorder
from memsave.reversible import make_reversible
from tests.reversible.test_convert import Net, Plain


def step_on(x):
    return lambda model: model(x).square().sum().backward()


def peak(model, x):
    with MemoryRecorder(model) as recorder:
        step_on(x)(model)
    return recorder.report().peak_bytes


def test_the_peaks_are_those_of_a_real_step():
    torch.manual_seed(0)
    model, x = Net(depth=8), torch.randn(4, 2, 256)
    before = copy.deepcopy(model.state_dict())
    table = memory_report(model, step_on(x), budget="700KiB")
    assert list(table.reports) == list(MODES)
    stored = peak(copy.deepcopy(model), x)
    assert table.reports["stored"].peak_bytes == stored
    make_reversible(converted := copy.deepcopy(model), x)
    assert table.reports["reversible"].peak_bytes == peak(converted, x)
    reversible, checkpoint = (table.reports[mode].peak_bytes for mode in ("reversible", "checkpoint"))
    assert max(reversible, checkpoint) < 0.6 * stored
    assert (table.fits("stored"), table.fits("reversible")) == (stored <= 700 * 1024, reversible <= 700 * 1024)
    text = str(table)
    assert "11 blocks in 2 rows, by the midpoint rule" in text and "predicted on fake tensors" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_state_of_the_optimizer_counts():
    model, x = Net(), torch.randn(4, 2, 16)
    plain = memory_report(model, step_on(x)).reports["stored"]
    adam = memory_report(model, step_on(x), optimizer=lambda parameters: torch.optim.Adam(parameters, foreach=False))
    assert adam.reports["stored"].peak_by_category["optimizer"] > 2 * sum(p.numel() for p in model.parameters()) * 4
    assert plain.peak_by_category.get("optimizer", 0) == 0


def test_a_model_without_rows_says_so():
    table = memory_report(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), step_on(torch.randn(2, 3)))
    assert list(table.reports) == ["stored"]
    assert "checkpoint: the model has no row of blocks" in str(table) and "no row of residual blocks" in str(table)
    only = memory_report(nn.Sequential(Plain(2), Plain(2)), step_on(torch.randn(2, 2, 8)))
    assert list(only.reports) == ["stored", "checkpoint"]


def test_a_step_that_reads_values_is_refused():
    with pytest.raises(ValueError, match=r"avoid \.item\(\)"):
        memory_report(nn.Linear(3, 3), lambda model: model(torch.randn(2, 3)).sum().item())
