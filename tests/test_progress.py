"""Progress lines are limited in number."""

import io

import pytest
from rich.console import Console

from memsave import progress
from memsave.progress import Progress, Throttle, duration


def test_a_throttle_is_ready_once_per_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    throttle, ready = Throttle(5), []
    for now[0] in (101, 105, 106, 109, 111, 130, 131):
        ready.append(throttle.ready())
    assert ready == [False, True, False, False, True, True, False]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (150, "2 min"),
        (3570, "1 h"),
        (4800, "1 h 20 min"),
        (50_000, "14 h"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds, text):
    assert duration(seconds) == text


def test_lines_estimate_the_time_left_from_the_last_steps(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(Console(file=out, width=200)).bar(130) as bar:
        now[0] = 300.0  # the first step is slow and does not count
        bar.advance("loss 3.000")
        for step in range(2, 131):
            now[0] += 4.0 if step <= 60 else 1.0
            bar.advance(f"loss {step}")
    lines = out.getvalue().splitlines()
    assert lines[0] == "  step 1 of 130, loss 3.000"
    by_step = {int(line.split()[1]): line for line in lines}
    assert by_step[10].endswith("loss 10, about 8 min left")  # 120 steps of 4 s
    late = max(step for step in by_step if step < 130)
    assert late > 115 and by_step[late].endswith(f"about {130 - late} s left")  # the last 50 steps took 1 s each
    assert lines[-1] == "  step 130 of 130, loss 130"


def test_a_run_that_is_continued_counts_its_own_steps_for_the_estimate(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(Console(file=out, width=200)).bar(100, done=90) as bar:
        for now[0] in (20.0, 40.0):
            bar.advance("loss 1")
    assert out.getvalue().splitlines()[-1] == "  step 92 of 100, loss 1, about 3 min left"
