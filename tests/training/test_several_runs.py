"""Several private runs on the same data, from the command's own code: statements, results, ledger and account."""

import json

import pytest

pytest.importorskip("opacus")
pytest.importorskip("transformers")

from memsave.account import main
from memsave.config.compose import compose, to_objects
from memsave.experiment import run_experiment
from memsave.privacy import epsilon_of_runs
from memsave.progress import Progress
from memsave.training.ledger import read_entries
from memsave.training.result import read_result, write_config
from memsave.training.statement import round_up
from tests.support.tiny_configs import TINY_GPT2_DP

QUICK = ["privacy.accountant=rdp", "privacy.verify=false", "profiler.compare=[]", "trainer.evaluate_first=false"]
QUICK += [
    "task.generate=1",
    "task.beams=1",
    "privacy.noise_multiplier=1.0",
    "model.layers=1",
    "trainer.micro_batch_size=null",
]
DELTA = 40**-1.1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def run(models, tmp_path):
    """Run in the folder `name`; returns the result, which is also written, and the privacy statement."""

    def call(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        quick = [each for each in QUICK if "privacy=none" not in overrides or not each.startswith("privacy.")]
        composed = compose([*TINY_GPT2_DP, f"model.cache={models}", *quick, *overrides])
        write_config(composed, folder)
        result, status = {}, "ok"
        try:
            result = run_experiment(to_objects(composed), folder, progress=Progress())
        except RuntimeError as stop:
            result, status = stop.outcome, "failed"
        (folder / "result.json").write_text(json.dumps({"status": status, **result}))
        return result, (folder / "privacy.md").read_text() if (folder / "privacy.md").exists() else None

    return call


def epsilon(*steps):
    return epsilon_of_runs([(1.0, 8 / 40, each) for each in steps], delta=DELTA, accountant="rdp")


def fail_at(step, monkeypatch):
    from memsave.privacy import PrivateGradients

    original = PrivateGradients.finish

    def finish(self):
        if self.steps == step - 1:
            raise RuntimeError("a fault")
        original(self)

    monkeypatch.setattr(PrivateGradients, "finish", finish)


def test_runs_know_each_other_and_a_continued_run_counts_once(run, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(3, patch)
        failed, statement = run("first", "trainer.checkpoint_every=1")
    assert failed["privacy"]["steps"] == 2 and failed["data"]["fingerprint"]
    assert "lists no other private run on the same data" in statement
    capfd.readouterr()

    first, _ = run("again", f"trainer.resume={tmp_path / 'first'}")
    assert first["privacy"]["run"] == failed["privacy"]["run"]
    assert first["privacy"]["other_runs"]["count"] == 0  # a run does not count itself
    assert "other private run" not in capfd.readouterr().err

    second, statement = run("second", "data.max_length=50", "trainer.optimizer.lr=0.001")  # the same records
    others = second["privacy"]["other_runs"]
    assert second["data"]["fingerprint"] == first["data"]["fingerprint"]
    assert (others["count"], others["epsilon"]) == (1, pytest.approx(epsilon(3)))
    assert others["epsilon_with_this_run"] == pytest.approx(epsilon(3, 3))
    assert second["privacy"]["epsilon"] == pytest.approx(epsilon(3))  # that of the run alone
    both = round_up(epsilon(3, 3), ".2f")
    said = capfd.readouterr().err
    line = "1 other private run on the same data spent epsilon = "
    assert line in said.partition("step 3 of 3")[0] and f"; with this run epsilon = {both} at" in said
    assert "lists 1 other private run on the same data" in statement and f"together are ({both}, 1.73e-02)" in statement
    assert str(tmp_path) not in statement and second["data"]["fingerprint"] not in statement  # it may be released
    entries = read_entries(second["data"]["fingerprint"])
    assert [(each.steps, each.unfinished) for each in entries] == [(3, False)] * 2

    assert main([str(tmp_path), "accountant=rdp"]) == 0
    out = capfd.readouterr().out
    assert "2 runs\n" in out and "continued in 2 folders, counted once" in out
    assert f"The 2 runs together spent epsilon = {both}" in out


def test_seeded_and_plain_runs_leave_all_runs_without_a_guarantee(run, tmp_path, capfd):
    run("seeded", "privacy.seed=3")
    plain, statement = run("plain", "privacy=none")
    assert statement is None and plain["privacy"] is None
    result, statement = run("private")
    assert plain["data"]["fingerprint"] == result["data"]["fingerprint"]
    assert (result["privacy"]["other_runs"]["count"], result["privacy"]["other_runs"]["no_guarantee"]) == (1, 1)
    assert "The models of all runs together are therefore not private" in statement
    capfd.readouterr()
    assert main([str(tmp_path), "accountant=rdp"]) == 0
    assert "2 runs have no guarantee" in capfd.readouterr().out


def test_tokens_per_second_are_logged_and_summed_up(run, tmp_path, capfd):
    result, _ = run("run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all(line["tokens"] > 0 for line in steps if line["loss"] is not None)
    speeds = sorted(line["tokens"] / line["seconds"] for line in steps if line["tokens"])
    assert speeds[0] <= result["tokens_per_second"] <= speeds[-1]
    assert "tokens/s" in capfd.readouterr().err
    assert read_result(tmp_path / "run")["tokens_per_second"] == result["tokens_per_second"]
