"""Progress lines are limited in number."""

from memsave import progress
from memsave.progress import Throttle


def test_a_throttle_is_ready_once_per_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    throttle, ready = Throttle(5), []
    for now[0] in (101, 105, 106, 109, 111, 130, 131):
        ready.append(throttle.ready())
    assert ready == [False, True, False, False, True, True, False]
