"""Epsilon while a private run goes on."""

from memsave.privacy import Mechanism, PrivateGradients
from memsave.training.private import AHEAD, Spending
from tests.training.toy import line_model


def test_the_epsilon_of_a_long_run_is_computed_a_few_times_and_never_too_low(monkeypatch):
    model, calls = line_model(), []
    private = PrivateGradients(model, Mechanism(48, 2, 0.7, 0.5, delta=1e-3), seed=None)
    monkeypatch.setattr(Mechanism, "epsilon", lambda self, steps: calls.append(steps) or float(steps))
    spending, shown = Spending(private, steps=1001), []
    for private.steps in range(1, 1002):
        shown.append(spending.entry()["epsilon"])
    assert len(calls) < 40 and calls[-1] == 1001
    assert all(taken <= told <= AHEAD * taken for taken, told in enumerate(shown, start=1))
    assert shown[-1] == 1001
