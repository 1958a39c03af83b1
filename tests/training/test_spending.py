"""What several runs spent together: the delta, the accountant, and runs without a guarantee."""

from dataclasses import replace

import pytest

pytest.importorskip("opacus")

from memsave.privacy import PrivacyError, epsilon_of_runs
from memsave.training import spending
from memsave.training.spending import Spending, once, total, total_or_none

HOW = {"noise_multiplier": 1.0, "sample_rate": 0.1, "accountant": "rdp", "size": 100}
RUN = Spending("a", "runs/a", "data", 20, delta=1e-4, epsilon=1.9, **HOW)
OTHER = replace(RUN, run="b", steps=30, delta=1e-5)
SEEDED = replace(RUN, run="c", no_guarantee="noise and batches came from a fixed seed", epsilon=None)


def test_runs_are_composed_at_the_smallest_delta_of_those_with_a_guarantee():
    found = total([RUN, OTHER, replace(SEEDED, delta=1e-9)])
    assert (found.private, found.without, found.delta, found.accountant) == (2, 1, 1e-5, "rdp")
    assert found.epsilon == epsilon_of_runs([(1.0, 0.1, 50)], delta=1e-5, accountant="rdp")
    assert total([RUN, OTHER], delta=1e-3).epsilon < found.epsilon


def test_a_given_delta_that_guarantees_nothing_is_refused():
    with pytest.raises(PrivacyError, match=r"delta is 0\.02 for 100 examples; it must be above 0 and below 1/n"):
        total([RUN, OTHER], delta=0.02)
    with pytest.raises(PrivacyError, match="accountant is 'gdp'; choose one of pld, prv, rdp"):
        total([RUN, OTHER], accountant="gdp")


def test_rdp_is_taken_if_a_run_took_it():
    tight = replace(RUN, accountant="prv", run="d")
    assert total([tight]).accountant == "prv"
    assert total([tight, OTHER]).accountant == "rdp"
    assert total([replace(RUN, accountant="pld")]).accountant == "pld"
    assert total([tight, OTHER], accountant="pld").epsilon < total([tight, OTHER]).epsilon


def test_the_bound_is_never_below_that_of_one_run(monkeypatch):
    monkeypatch.setattr(spending, "epsilon_of_events", lambda runs, **how: 1.8999)  # rounding of an accountant
    assert total([RUN]).epsilon == 1.9
    assert total([RUN], accountant="prv").epsilon == 1.8999  # the bound of another accountant may be tighter
    assert total([replace(RUN, delta=1e-6)], delta=1e-4).epsilon == 1.8999  # and that at another delta, too


def test_without_private_runs_there_is_no_epsilon():
    found = total([SEEDED])
    assert (found.private, found.without, found.epsilon, found.delta) == (0, 1, None, None)
    assert total([]) == total_or_none([])


def test_runs_that_protect_different_units_have_no_epsilon_together():
    persons = replace(OTHER, unit="person")
    found = total([RUN, persons])
    assert (found.private, found.units, found.epsilon) == (2, 2, None)
    assert total([replace(RUN, unit="person"), persons]).epsilon == total([RUN, OTHER]).epsilon
    assert total([RUN, replace(SEEDED, unit="person")]).epsilon == total([RUN]).epsilon


def test_a_continued_run_counts_once_with_most_of_its_steps():
    assert once([RUN, OTHER, replace(RUN, folder="runs/again", steps=25), replace(RUN, steps=3)]) == [
        replace(RUN, folder="runs/again", steps=25),
        OTHER,
    ]


def test_a_report_falls_back_to_rdp_and_then_to_no_number(monkeypatch):
    tight = replace(RUN, accountant="prv")

    def fails(runs, *, delta, accountant):
        if accountant in broken:
            raise PrivacyError("cannot compute")
        return 2.5

    monkeypatch.setattr(spending, "epsilon_of_events", fails)
    broken = ["prv", "pld"]
    assert (total_or_none([tight]).epsilon, total_or_none([tight]).accountant) == (2.5, "rdp")
    broken = ["prv", "pld", "rdp"]
    found = total_or_none([tight, SEEDED])
    assert (found.epsilon, found.private, found.without) == (None, 1, 1)


def test_runs_of_every_mechanism_are_composed():
    """A run without the entry `mechanism` is that of an earlier version, which had only Poisson sampling."""
    mechanism = {"size": 100, "batch_size": 10, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-4}
    pld = replace(RUN, accountant="pld")
    same = replace(pld, mechanism=mechanism)
    assert total([pld]).epsilon == total([same]).epsilon == epsilon_of_runs([(1.0, 0.1, 20)], delta=1e-4)
    truncated = {**mechanism, "sampler": "truncated_poisson", "largest_batch": 12}
    cyclic = {**mechanism, "sampler": "cyclic", "noise": "regenerated", "bands": 2}
    several = [pld, replace(pld, run="b", mechanism=truncated), replace(OTHER, mechanism=cyclic)]
    found = total_or_none(several)  # RDP, the loosest of them, cannot compute it
    assert (found.accountant, found.private) == ("pld", 3)
    assert found.epsilon > total([pld]).epsilon
