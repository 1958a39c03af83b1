"""The epsilon that a private run logs while it trains."""

import math

from memsave.privacy import Mechanism, PrivateGradients
from memsave.privacy.monitor import LOOKAHEAD, EpsilonMonitor
from tests.support.linear_task import line_model


def test_epsilon_is_computed_rarely_and_is_an_upper_bound(monkeypatch):
    model, calls = line_model(), []
    private = PrivateGradients(model, Mechanism(48, 2, 0.7, 0.5, delta=1e-3), seed=None)
    monkeypatch.setattr(Mechanism, "epsilon", lambda self, steps: calls.append(steps) or float(steps))
    monitor, shown = EpsilonMonitor(private, steps=1001), []
    for private.steps in range(1, 1002):
        shown.append(monitor.metrics()["epsilon"])
    assert len(calls) < 40 and calls[-1] == 1001
    assert all(taken <= bound <= LOOKAHEAD * taken for taken, bound in enumerate(shown, start=1))
    assert shown[-1] == 1001


def test_a_run_with_a_known_seed_has_no_epsilon():
    private = PrivateGradients(line_model(), Mechanism(48, 2, 0.7, 0.5, delta=1e-3), seed=0)
    monitor = EpsilonMonitor(private, steps=10)
    assert monitor.bound() == math.inf and monitor.metrics() == {}
