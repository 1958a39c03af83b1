"""What runs spent, read from their folders: every end that a run can have."""

import json

import pytest

pytest.importorskip("opacus")

from memsave.privacy import epsilon_of
from memsave.training.spent_folders import PLAIN, UNKNOWN, by_data, read_spending, runs_in
from tests.support.run_folders import SEED, write_killed_run, write_run


def test_a_finished_run_spent_what_its_result_says(tmp_path):
    spent = read_spending(write_run(tmp_path / "run", privacy={"run": "id"}))
    assert (spent.run, spent.data, spent.folder) == ("id", "data", str(tmp_path / "run"))
    assert (spent.steps, spent.noise_multiplier, spent.sample_rate, spent.delta) == (20, 1.0, 0.1, 1e-4)
    assert (spent.epsilon, spent.no_guarantee, spent.size, spent.unfinished) == (1.5, None, 100, False)


@pytest.mark.parametrize("status", ["interrupted", "failed", "over_budget"])
def test_a_run_that_ended_early_spent_the_steps_that_it_took(status, tmp_path):
    spent = read_spending(write_run(tmp_path / "run", status=status, privacy={"steps": 7}))
    assert (spent.steps, spent.no_guarantee) == (7, None)


def test_a_killed_run_spent_the_steps_of_its_log(tmp_path):
    spent = read_spending(write_killed_run(tmp_path / "run"))
    how = {"noise_multiplier": 1.0, "sample_rate": 0.1, "delta": 1e-4, "accountant": "rdp"}
    assert (spent.steps, spent.unfinished, spent.data) == (15, True, "data")
    assert spent.epsilon == epsilon_of(steps=15, **how)
    assert read_spending(write_killed_run(tmp_path / "other", logged=3)).steps == 12  # the checkpoint has more
    assert read_spending(write_killed_run(tmp_path / "seeded", seeded=True)).no_guarantee == SEED


@pytest.mark.parametrize("write", [write_run, write_killed_run])
def test_a_run_without_privacy_has_no_guarantee(write, tmp_path):
    spent = read_spending(write(tmp_path / "run", kind="none"))
    assert (spent.no_guarantee, spent.data, spent.epsilon) == (PLAIN, "data", None)


def test_plans_and_runs_without_a_step_spent_nothing(tmp_path):
    assert read_spending(write_run(tmp_path / "plan", mode="plan")) is None
    assert read_spending(write_run(tmp_path / "zero", privacy={"steps": 0})) is None
    assert read_spending(write_run(tmp_path / "refused", status="refused")) is None
    assert read_spending(write_run(tmp_path / "plain", status="refused", kind="none")) is None
    (tmp_path / "empty").mkdir()
    assert read_spending(tmp_path / "empty") is None


@pytest.mark.parametrize(
    "privacy", [{"noise_multiplier": None}, {"noise_multiplier": -1}, {"sample_rate": 2}, {"delta": "x"}, {"steps": []}]
)
def test_a_result_with_wrong_numbers_is_no_guarantee(privacy, tmp_path):
    assert read_spending(write_run(tmp_path / "run", privacy=privacy)).no_guarantee == UNKNOWN


def test_a_checkpoint_with_wrong_numbers_is_no_guarantee(tmp_path):
    folder = write_killed_run(tmp_path / "run")
    (folder / "checkpoint" / "state.json").write_text(json.dumps({"private": {"mechanism": {"size": 3}}}))
    assert read_spending(folder).no_guarantee == UNKNOWN


def test_runs_are_found_at_any_depth_and_not_within_runs(tmp_path):
    for name in ("multirun/gpt2_dp/today/10", "multirun/gpt2_dp/today/2", "outputs/b", "outputs/a", "outputs/.hidden"):
        write_run(tmp_path / name)
    write_run(tmp_path / "outputs" / "a" / "model")
    (tmp_path / "outputs" / "latest").symlink_to(tmp_path / "outputs" / "b")
    found = [str(path.relative_to(tmp_path)) for path in runs_in(tmp_path)]
    assert found == ["multirun/gpt2_dp/today/2", "multirun/gpt2_dp/today/10", "outputs/a", "outputs/b"]
    assert list(runs_in(tmp_path / "outputs" / "a")) == [tmp_path / "outputs" / "a"]


def test_runs_are_grouped_by_their_data(tmp_path):
    runs = [
        read_spending(write_run(tmp_path / str(number), data=data)) for number, data in enumerate(("x", "y", "x", None))
    ]
    assert by_data(runs) == {"x": [runs[0], runs[2]], "y": [runs[1]], None: [runs[3]]}
