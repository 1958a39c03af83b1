"""The search returns the largest size that fits, verified on both sides, also for non-monotone totals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memsave.profiler import Calibration, MemoryRecorder, TrainingStep, largest, parse_bytes, peak_on_fake, planner

MIB = 2**20


def line_step(size, *, width=64):
    """A step whose activations grow with `size`, the batch size."""
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    inputs = torch.zeros(size, width)

    def run():
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return TrainingStep(model, run, optimizer)


def measured(size):
    made = line_step(size)
    made.run()
    with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
        made.run()
    return recorder.report()


def test_the_fake_step_includes_the_optimizer_state():
    report = peak_on_fake(lambda: line_step(1000))
    assert report == measured(1000)
    assert report.peak_by_category["optimizer"] > 0


def test_an_optimizer_that_needs_a_closure_runs_two_whole_steps():
    def step():
        made = line_step(100)
        optimizer = torch.optim.LBFGS(made.model.parameters())
        return TrainingStep(made.model, lambda: made.model(torch.zeros(100, 64)).sum().backward(), optimizer)

    twice = peak_on_fake(step)
    assert twice.peak_by_category["gradient"] == twice.peak_by_category["parameter"]  # of the first step


def test_planning_does_not_change_the_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    peak_on_fake(lambda: line_step(10))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [None, 1, 700, 4096])
@pytest.mark.parametrize("budget", [200_000, 3 * MIB, "4MiB"])
def test_the_answer_fits_and_the_next_size_does_not_in_real_steps(budget, start):
    answer = largest(line_step, budget=budget, low=8, high=4096, multiple=8, start=start)
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    assert answer.size % 8 == 0
    assert measured(answer.size).peak_bytes == answer.need.exact <= limit
    assert measured(answer.size + 8).peak_bytes == answer.above.exact > limit
    assert answer.monotone
    assert len(answer.tried) < 12


def test_if_nothing_fits_the_smallest_budget_is_reported():
    answer = largest(line_step, budget=1000, low=16, high=64, multiple=16)
    assert answer.size is None
    assert "nothing fits into 1000 B: the lowest size, 16" in str(answer)
    assert largest(line_step, budget=answer.smallest_budget, low=16, high=64, multiple=16).size == 16
    assert largest(line_step, budget=answer.smallest_budget - 1, low=16, high=64, multiple=16).size is None


def test_the_result_says_if_the_highest_size_fits():
    answer = largest(line_step, budget="1GiB", low=16, high=70, multiple=16)
    assert (answer.size, answer.above) == (64, None)
    assert "the highest allowed" in str(answer)


def test_without_high_sizes_grow_until_one_does_not_fit():
    answer = largest(line_step, budget="24MiB", low=8, multiple=8, power=2)
    assert measured(answer.size).peak_bytes <= 24 * MIB < measured(answer.size + 8).peak_bytes
    assert answer.size > 4096
    assert not answer.timed_out


def test_a_timed_out_search_returns_the_largest_size_known_to_fit():
    answer = largest(line_step, budget="24MiB", low=8, multiple=8, start=80, seconds=0)
    assert (answer.size, answer.above, answer.timed_out) == (80, None, True)
    assert "the time limit ended the search, so larger ones may fit" in str(answer)
    assert (
        largest(line_step, budget="1MiB", low=8, multiple=8, start=8000, seconds=0).above.total > MIB
    )  # still tries lower


def test_a_size_whose_step_may_exceed_the_time_limit_is_not_tried(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(planner.time, "process_time", lambda: now[0])

    def step_at(size):
        now[0] += size / 100  # time grows with the size
        return line_step(size)

    answer = largest(step_at, budget="1GiB", low=1, start=100, seconds=10)
    assert answer.timed_out
    assert 100 < answer.size <= 1000
    assert now[0] < 20 + 1


def test_exact_calibrated_and_reserve_bytes_are_separate():
    plain = largest(line_step, budget="3MiB", low=8, high=4096, multiple=8)
    assert plain.need.exact == plain.need.calibrated == plain.need.total
    calibration = Calibration(workspace_ratio=2.0)
    answer = largest(line_step, budget="3MiB", low=8, high=4096, multiple=8, reserve="1MiB", calibration=calibration)
    need = answer.need
    assert need.reserve == MIB
    assert need.calibrated == need.exact + 2 * need.report.largest_block_bytes
    assert need.total <= 3 * MIB < answer.above.total
    assert answer.size < plain.size


@pytest.mark.parametrize("sizes", [(0, 4, 1), (5, 4, 1), (1, 4, 0)])
def test_invalid_ranges_of_sizes_are_refused(sizes):
    low, high, multiple = sizes
    with pytest.raises(ValueError, match=f"sizes go from {low} to {high} in steps of {multiple}; give"):
        largest(line_step, budget=1, low=low, high=high, multiple=multiple)


def pretend(monkeypatch, totals):
    """Make size s take totals[s] bytes."""

    class Report:
        largest_block_bytes = 0

        def __init__(self, size):
            self.peak_bytes = totals[size]

    monkeypatch.setattr(planner, "peak_on_fake", lambda step: Report(step()))


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.integers(0, 1000), min_size=1, max_size=80),
    limit=st.integers(0, 40_000),
    start=st.integers(1, 100),
)
def test_the_search_finds_the_largest_size_for_increasing_totals(steps, limit, start):
    totals = {size: sum(steps[:size]) for size in range(1, len(steps) + 1)}
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, totals)
        answer = largest(lambda size: size, budget=limit, low=1, high=len(steps), start=start)
    assert answer.size == max((size for size in totals if totals[size] <= limit), default=None)
    assert answer.monotone


@settings(max_examples=100, deadline=None)
@given(totals=st.lists(st.integers(0, 100), min_size=1, max_size=30), limit=st.integers(0, 100))
def test_all_sizes_are_tried_if_totals_are_not_monotone(totals, limit):
    by_size = dict(enumerate(totals, start=1))
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, by_size)
        answer = largest(lambda size: size, budget=limit, low=1, high=len(totals))
    if answer.monotone:  # no violation was seen; the answer is verified nevertheless
        assert answer.size is None or by_size[answer.size] <= limit
        assert answer.above is None or answer.above.total > limit
    else:
        assert answer.size == max((size for size in by_size if by_size[size] <= limit), default=None)


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 10**9), slope=st.integers(1, 50), start=st.integers(1, 10**4), multiple=st.integers(1, 64))
def test_the_search_without_high_finds_the_largest_size(limit, slope, start, multiple):
    class Totals:
        def __getitem__(self, size):
            return slope * size

    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, Totals())
        answer = largest(lambda size: size, budget=limit, low=1, multiple=multiple, start=start)
    fits = (limit // slope - 1) // multiple * multiple + 1
    assert answer.size == (fits if limit >= slope else None)
    assert len(answer.tried) < 60


def test_without_high_non_monotone_sizes_are_tried_from_the_highest_one_tried(monkeypatch):
    class Totals:
        def __getitem__(self, size):
            return 5000 if 40 <= size <= 50 else 10 * size

    pretend(monkeypatch, Totals())
    answer = largest(lambda size: size, budget=450, low=1, start=300)
    assert (answer.monotone, answer.timed_out) == (False, False)
    assert (answer.size, max(answer.tried), answer.above.total) == (39, 300, 5000)
    hurried = largest(lambda size: size, budget=450, low=1, start=300, seconds=0)
    assert hurried.timed_out
    assert hurried.need.total <= 450


def test_a_step_that_reads_values_raises_an_error():
    def step(look):
        model = nn.Linear(2, 2)
        return TrainingStep(model, lambda: look(model(torch.zeros(1, 2))))

    for look in (lambda x: x.sum().item(), lambda x: x[x > 0]):
        with pytest.raises(ValueError, match=r"reads the values of a tensor \(aten.*avoid \.item\(\)"):
            peak_on_fake(lambda look=look: step(look))
