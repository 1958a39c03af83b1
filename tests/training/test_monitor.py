"""The memory monitor: which steps it records, and what it reports about a step above the budget."""

import pytest
import torch

from memsave.training.loop import make_state, run_steps
from memsave.training.monitor import MemoryMonitor
from tests.support.linear_task import Lines, line_model, trainer


def monitored(*, steps=1, budget=None, count=3):
    """The monitor after `count` steps, and the sentence about each of them."""
    state = make_state(line_model(), trainer(steps=count))
    monitor, sentences = MemoryMonitor(state, steps=steps, budget=budget), []
    for done in run_steps(state, Lines(), trainer(steps=count), monitor=monitor):
        sentences.append(monitor.excess(done.step))
    return monitor, sentences


def test_without_a_budget_only_the_first_steps_are_recorded(monkeypatch):
    recorded = []
    original = MemoryMonitor._record
    monkeypatch.setattr(MemoryMonitor, "_record", lambda self: recorded.append(1) or original(self))
    monitor, sentences = monitored(steps=2, count=4)
    assert len(recorded) == 2
    assert monitor.worst.peak_bytes >= monitor.last.peak_bytes > 0
    assert sentences == [None] * 4


def test_a_step_within_the_budget_reports_nothing():
    monitor, sentences = monitored(budget="1GiB")
    assert sentences == [None] * 3
    assert monitor.first is not None


def test_the_first_step_above_the_budget_names_the_largest_category():
    _, sentences = monitored(budget="1B", count=1)
    assert sentences[0].startswith("step 1 held ")
    assert " takes the most, " in sentences[0]


def test_a_later_step_above_the_budget_names_what_grew():
    state = make_state(line_model(), trainer(steps=3))
    monitor = MemoryMonitor(state, steps=1, budget="1MiB")
    steps = run_steps(state, Lines(), trainer(steps=3), monitor=monitor)
    assert monitor.excess(next(steps).step) is None
    state.model.register_buffer("leak", torch.zeros(2**20))
    assert "buffer grew, by 4.00 MiB in the model itself" in monitor.excess(next(steps).step)


def test_a_budget_that_is_no_size_is_refused():
    with pytest.raises(ValueError, match="is no size"):
        MemoryMonitor(make_state(line_model(), trainer()), steps=1, budget="much")
