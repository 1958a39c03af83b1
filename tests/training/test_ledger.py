"""The ledger: entries of runs on the same data, whatever becomes of the runs."""

import json
import os

import pytest

pytest.importorskip("opacus")

from memsave.data.cache import cache_root
from memsave.privacy import Mechanism, PrivateGradients, epsilon_of_runs
from memsave.training import checkpoint
from memsave.training.ledger import RunLedger, describe_others, read_entries
from memsave.training.loop import make_state
from tests.support.linear_task import line_model, trainer

STEPS = 10


def private_state(*, noise=1.0, seed=None, delta=1e-3, data="data"):
    model = line_model()
    private = PrivateGradients(model, Mechanism(48, 6, noise, 0.5, delta=delta, accountant="rdp"), seed=seed)
    state = make_state(model, trainer(), private=private)
    state.data = data
    return state


def ledger_of(state, folder, *, said=None, steps=STEPS):
    return RunLedger(state, folder, steps=steps, say=[].append if said is None else said.append)


def finished(folder, *, steps=STEPS, **options):
    """A run that took its steps and ended."""
    state = private_state(**options)
    ledger = ledger_of(state, folder)
    ledger.start()
    state.private.steps = steps
    ledger.update(ended=True)
    return ledger


def epsilon(*runs, delta=1e-3):
    return epsilon_of_runs([(noise, 6 / 48, steps) for noise, steps in runs], delta=delta, accountant="rdp")


def test_the_first_run_has_an_entry_from_its_start_to_its_end(tmp_path):
    state = private_state()
    ledger = ledger_of(state, tmp_path)
    assert ledger.other_runs(steps=STEPS)["count"] == 0
    assert describe_others(ledger.other_runs(steps=STEPS)) is None
    ledger.update(ended=True)  # it failed before its first step
    assert read_entries("data") == []
    ledger.start()
    path = cache_root() / "ledger" / "data" / f"{state.run}.json"
    seen = [json.loads(path.read_text())]
    for state.private.steps in (4, 7):
        ledger.update(ended=state.private.steps == 7)
        seen.append(json.loads(path.read_text()))
    assert [(each["steps"], each["unfinished"]) for each in seen] == [(0, True), (4, True), (7, False)]
    assert seen[-1]["folder"] == str(tmp_path) and seen[-1]["planned_steps"] == STEPS and seen[-1]["date"]
    assert [each["no_guarantee"] for each in seen] == [None] * 3
    assert [path.name for path in path.parent.iterdir()] == [path.name]  # no draft is left
    assert ledger.other_runs(steps=7)["count"] == 0  # a run does not count itself


def test_a_later_run_knows_what_earlier_ones_spent_and_what_all_spend(tmp_path):
    finished(tmp_path / "a")
    finished(tmp_path / "b", noise=2.0, steps=5, delta=1e-4)
    finished(tmp_path / "elsewhere", data="other data")
    found = ledger_of(private_state(), tmp_path / "c").other_runs(steps=3)
    assert (found["count"], found["no_guarantee"], found["unfinished"]) == (2, 0, 0)
    assert found["delta"] == found["delta_with_this_run"] == 1e-4
    assert found["epsilon"] == pytest.approx(epsilon((1.0, 10), (2.0, 5), delta=1e-4))
    assert found["epsilon_with_this_run"] == pytest.approx(epsilon((1.0, 13), (2.0, 5), delta=1e-4))
    line = describe_others(found)
    assert line.startswith("2 other private runs on the same data spent epsilon = ")
    assert "; with this run epsilon = " in line and "guarantee" not in line


def test_runs_that_protect_another_unit_are_counted_and_not_composed(tmp_path):
    finished(tmp_path / "records")
    state = private_state()
    state.identity["data.unit"] = "person"
    ledger = ledger_of(state, tmp_path / "persons")
    found = ledger.other_runs(steps=3)
    assert (found["count"], found["other_unit"], found["epsilon_with_this_run"]) == (1, 1, None)
    assert "1 of them with another data.unit, so no epsilon of all together is known" in describe_others(found)
    ledger.start()
    assert read_entries("data")[0].unit != read_entries("data")[1].unit
    assert ledger_of(private_state(), tmp_path / "more").other_runs(steps=3)["epsilon"] is None


def test_a_run_that_has_not_ended_counts_with_its_planned_steps(tmp_path):
    state = private_state()
    ledger_of(state, tmp_path, steps=40).start()
    state.private.steps = 2
    found = ledger_of(private_state(), tmp_path).other_runs(steps=3)
    assert (found["unfinished"], found["epsilon"]) == (1, pytest.approx(epsilon((1.0, 40))))
    assert "(1 not ended, counted with all planned steps)" in describe_others(found)


@pytest.mark.parametrize("options", [{"seed": 3}, {"noise": 0.0}, {"noise": 1e-200}], ids=str)
def test_runs_without_a_guarantee_take_it_from_all(options, tmp_path):
    finished(tmp_path / "a", **options)
    finished(tmp_path / "b")
    found = ledger_of(private_state(), tmp_path).other_runs(steps=3)
    assert (found["count"], found["no_guarantee"]) == (2, 1)
    assert found["epsilon"] == pytest.approx(epsilon((1.0, 10)))
    assert describe_others(found).endswith("; 1 of them has no guarantee, so all together have none")
    own = ledger_of(private_state(**options), tmp_path).other_runs(steps=3)
    assert "epsilon_with_this_run" not in own  # this run has no epsilon to add


def test_a_run_without_privacy_has_no_entry_and_asks_for_none(tmp_path):
    state = make_state(line_model(), trainer())
    state.data = "data"
    ledger = ledger_of(state, tmp_path)
    ledger.start()
    ledger.update(ended=True)
    assert ledger.other_runs(steps=3) is None and not cache_root().exists()


def test_a_continued_run_keeps_its_entry_and_never_loses_steps(tmp_path):
    first = finished(tmp_path / "first", steps=8)
    first.state.private.steps = 5
    checkpoint.save(first.state, tmp_path / "first" / "checkpoint")  # an older one
    state = private_state()
    checkpoint.load(state, tmp_path / "first")
    assert state.run == first.state.run
    again = ledger_of(state, tmp_path / "again")
    assert again.other_runs(steps=STEPS)["count"] == 0
    again.start()
    state.private.steps = 6
    again.update(ended=True)
    (entry,) = read_entries("data")
    assert (entry.steps, entry.folder) == (8, str(tmp_path / "again"))
    state.private.steps = 10
    again.update(ended=True)
    assert [each.steps for each in read_entries("data")] == [10]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"steps": 3, "unfinished": false, "run": "a", "folder": "b", "noise_multiplier": "x"}']
)
def test_an_entry_that_cannot_be_read_counts_as_a_run_without_guarantee(content, tmp_path):
    folder = cache_root() / "ledger" / "data"
    folder.mkdir(parents=True)
    (folder / "broken.json").write_text(content)
    (folder / ".new.draft.json").write_text("")
    finished(tmp_path / "a")
    found = ledger_of(private_state(), tmp_path).other_runs(steps=3)
    assert (found["count"], found["no_guarantee"]) == (2, 1)
    assert found["epsilon"] == pytest.approx(epsilon((1.0, 10)))


def test_a_cache_that_cannot_be_written_gives_one_line(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setitem(os.environ, "MEMSAVE_CACHE", str(blocked))
    said = []
    ledger = ledger_of(private_state(), tmp_path, said=said)
    ledger.start()
    ledger.update()
    ledger.update(ended=True)
    (line,) = said
    assert line.startswith(f"the ledger {blocked}") and "cannot be written" in line and "set MEMSAVE_CACHE" in line
    assert ledger.other_runs(steps=3)["count"] == 0
