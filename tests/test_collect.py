"""Sweeps: results of jobs with any status are collected, and interrupted sweeps continue."""

import csv
import json
import shutil

import pytest
from omegaconf import OmegaConf

from memsave.collect import collect, main, read_jobs, varied_keys
from memsave.config import ConfigError
from memsave.config.compose import compose
from memsave.privacy import epsilon_of_runs
from memsave.run import is_done
from memsave.training.result import read_request, request_digest, write_config
from memsave.training.statement import round_up
from tests.support.commands import run_command, run_interpreter
from tests.support.run_folders import write_run
from tests.support.tiny_configs import TINY_UNET


def write_job(folder, *overrides, result):
    folder.mkdir(parents=True)
    config = compose([*TINY_UNET, *overrides])
    write_config(config, folder, request=request_digest(config))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return config


def planned(strategy, size, total):
    row = {
        "strategy": strategy,
        "fits": size is not None,
        "exact_bytes": total,
        "calibrated_bytes": total,
        "reserve_bytes": 0,
    }
    return {"status": "ok", "seconds": 1.5, "plan": {"vary": "volume", "budget_bytes": total, "rows": [
        {**row, "size": size, "described": f"{size}x{size}x{size}", "smallest_budget_bytes": None}
    ]}}  # fmt: skip


@pytest.fixture(scope="module")
def jobs_of_a_sweep(tmp_path_factory):
    """Four plans with two budgets and two modes, a failed job, and a job without a result."""
    folder = tmp_path_factory.mktemp("sweep")
    number = 0
    for budget, scale in (("1GiB", 1), ("2GiB", 2)):
        for strategy, size in (("stored", 32), ("reversible", 64)):
            write_job(
                folder / str(number), f"memory={strategy}", f"budget={budget}", "mode=plan", "vary=volume",
                result=planned(strategy, size * scale, scale * 2**30),
            )  # fmt: skip
            number += 1
    write_job(folder / "10", "memory=stored", "budget=4GiB", "vary=volume", result={"status": "failed", "seconds": 1})
    write_job(folder / "11", "memory=checkpoint", "budget=4GiB", "vary=volume", result=None)
    return folder


@pytest.fixture
def sweep(jobs_of_a_sweep, tmp_path):
    """A copy of these jobs."""
    return shutil.copytree(jobs_of_a_sweep, tmp_path / "sweep")


def test_collect_writes_a_table_and_a_picture(sweep, capsys):
    jobs = collect(sweep)
    assert [job.folder.name for job in jobs] == ["0", "1", "2", "3", "10", "11"]
    assert set(varied_keys(jobs)) == {"mode", "memory.mode", "budget"}
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert [row["status"] for row in rows] == [*["ok"] * 4, "failed", "no result"]
    assert rows[3]["largest volume"] == "128x128x128"
    assert rows[3]["calibrated_bytes"] == str(2**31)
    text = (sweep / "sweep.md").read_text()
    assert "1.00 GiB" in text
    assert f"Jobs without a result: {sweep / '11'}" in text
    assert (sweep / "sweep.png").stat().st_size > 5000
    assert "64x64x64" in capsys.readouterr().out


def test_training_jobs_show_scores_and_peak_memory(tmp_path):
    for number, lr in enumerate(("0.1", "0.2")):
        memory = {"peak_bytes": 2**20, "allocator_peak_bytes": 2**21}
        result = {"status": "ok", "seconds": 3.0, "metrics": {"loss": 0.5, "dice": 0.75, "dice_before": 0}}
        write_job(
            tmp_path / str(number), f"trainer.optimizer.lr={lr}",
            result={**result, "memory": memory, "privacy": {"epsilon": 3.0}},
        )  # fmt: skip
    collect(tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["trainer.optimizer.lr"] for row in rows] == ["0.1", "0.2"]
    assert (rows[0]["dice"], rows[0]["epsilon"], rows[0]["peak_bytes"]) == ("0.75", "3.0", str(2**20))
    assert "dice_before" not in rows[0]


def test_private_jobs_say_what_they_spent_together(tmp_path, capsys):
    pytest.importorskip("opacus")
    for number in range(3):
        write_run(tmp_path / str(number))
    epsilon = epsilon_of_runs([(1.0, 0.1, 60)], delta=1e-4, accountant="rdp")
    spent = f"3 private jobs spent epsilon = {round_up(epsilon, '.2f')} at delta = 1.00e-04 together"
    collect(tmp_path)
    line = f"Privacy: {spent}. The column epsilon is that of each job alone."
    assert line in capsys.readouterr().out and line in (tmp_path / "sweep.md").read_text()
    assert [row["epsilon"] for row in csv.DictReader((tmp_path / "sweep.csv").open())] == ["1.5"] * 3
    write_run(tmp_path / "3", kind="none")
    write_run(tmp_path / "4", data="other")
    collect(tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    assert f"{spent.replace('jobs', 'jobs on the data data')}; 1 more without a guarantee, so all jobs" in text
    assert text.count("Privacy:") == 1  # a single job has nothing to add


def test_a_sweep_without_private_jobs_says_nothing_about_privacy(tmp_path):
    for number in range(2):
        write_run(tmp_path / str(number), kind="none")
    collect(tmp_path)
    assert "Privacy" not in (tmp_path / "sweep.md").read_text()


def test_the_command_line_names_a_folder_without_jobs(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    assert "holds no jobs; name a sweep's folder" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_a_finished_job_is_recognized(tmp_path):
    config = write_job(tmp_path / "0", result={"status": "ok"})
    assert read_request(tmp_path / "0") == request_digest(config)
    assert is_done(tmp_path / "0", config, request=request_digest(config))
    (tmp_path / "0" / "result.json").write_text('{"status": "over_budget"}')
    assert not is_done(tmp_path / "0", config, request=request_digest(config))
    assert config.trainer.resume is None


def test_an_interrupted_job_continues_from_its_checkpoint(tmp_path):
    config = write_job(tmp_path / "0", result=None)
    (tmp_path / "0" / "checkpoint").mkdir()
    assert not is_done(tmp_path / "0", config, request=request_digest(config))
    assert config.trainer.resume == str(tmp_path / "0" / "checkpoint")


def test_the_folder_of_another_job_is_refused(tmp_path):
    write_job(tmp_path / "0", result={"status": "ok"})
    other = compose([*TINY_UNET, "trainer.steps=7"])
    with pytest.raises(ConfigError, match="holds another job; repeat the command that created it, or give another"):
        is_done(tmp_path / "0", other, request=request_digest(other))


def test_a_job_is_known_by_its_config_if_an_update_changed_its_digest(tmp_path):
    config = write_job(tmp_path / "0", result={"status": "ok"})
    assert is_done(tmp_path / "0", config, request="another digest")
    broken = write_job(tmp_path / "1", result=None)
    (tmp_path / "1" / "checkpoint").mkdir()
    assert not is_done(tmp_path / "1", broken, request="another digest")
    assert broken.trainer.resume == str(tmp_path / "1" / "checkpoint")


JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@pytest.mark.parametrize("launcher", [[], pytest.param(JOBLIB, marks=pytest.mark.slow)], ids=["basic", "joblib"])
def test_a_sweep_over_budgets_is_collected_and_not_repeated(tmp_path, launcher):
    arguments = ["-m", *TINY_UNET, "mode=plan", "vary=volume", "budget=2MiB,60MiB", "memory=stored"]
    arguments += ["hydra.sweep.dir=sweep"]
    first = (run_interpreter if launcher else run_command)(tmp_path, *arguments, *launcher)
    assert first.returncode == 1
    assert "over_budget: sweep/0" in first.stderr
    assert "repeat the command with hydra.sweep.dir=sweep to run the missing jobs" in first.stderr
    results = [json.loads((tmp_path / "sweep" / number / "result.json").read_text()) for number in "01"]
    assert [each["status"] for each in results] == ["over_budget", "ok"]
    assert [len(each["plan"]["rows"]) for each in results] == [1, 1]  # the sweep chose the memory mode
    changed = (tmp_path / "sweep" / "1" / "plan.png").stat().st_mtime_ns
    assert run_command(tmp_path, *arguments).returncode == 1
    assert (tmp_path / "sweep" / "1" / "plan.png").stat().st_mtime_ns == changed
    assert "over_budget" in (tmp_path / "sweep" / "sweep.md").read_text()
    assert OmegaConf.load(tmp_path / "sweep" / "1" / "config.yaml").budget == "60MiB"
    assert len(read_jobs(tmp_path / "sweep")) == 2


BROKEN = {
    "empty": lambda text: "",
    "broken off": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1]",
}


@pytest.mark.parametrize("name", ["result.json", "config.yaml"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_affects_only_its_job(sweep, fault, name):
    path = sweep / "0" / name
    path.write_text(BROKEN[fault](path.read_text()))
    collect(sweep)
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert len(rows) == 6
    if name == "result.json":
        assert rows[0]["status"] == "no result"
        assert f"Jobs without a result: {sweep / '0'}" in (sweep / "sweep.md").read_text()


def test_a_job_with_an_incomplete_result_is_repeated(tmp_path):
    config = write_job(tmp_path / "0", result={"status": "ok"})
    (tmp_path / "0" / "result.json").write_text('{"status": "o')
    assert not is_done(tmp_path / "0", config, request=request_digest(config))


def test_plans_of_several_kinds_of_size_share_a_folder(tmp_path):
    for number, (vary, budget) in enumerate((("volume", "1GiB"), ("volume", "2GiB"), ("depth", "1GiB"))):
        result = planned("stored", 32 + number, 2**28)
        result["plan"]["vary"] = vary
        write_job(tmp_path / str(number), "mode=plan", f"vary={vary}", f"budget={budget}", result=result)
    collect(tmp_path)
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert "largest depth" in (tmp_path / "sweep.md").read_text()


def test_the_folder_of_a_single_run_is_refused(tmp_path, capsys):
    write_job(tmp_path / "run", result={"status": "ok"})
    (tmp_path / "run" / "checkpoint").mkdir()
    assert main([str(tmp_path / "run")]) == 2
    assert "is one run, not a sweep; name a sweep's folder" in capsys.readouterr().err
    assert not (tmp_path / "run" / "sweep.md").exists()


def test_the_limit_of_a_search_is_in_table_and_picture(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    words = []
    annotate = Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda *args, **kwargs: words.append(args[1]) or annotate(*args, **kwargs))
    ends = ({"timed_out": True, "limit": "search ended after profiler.plan_seconds=9"}, {"limit": "so many positions"})
    for number, end in enumerate(ends):
        result = planned("stored", 32 + number, (number + 1) * 2**30)
        result["plan"]["fixed"] = "2 at once"
        result["plan"]["rows"][0] |= end
        write_job(tmp_path / str(number), "mode=plan", "vary=volume", f"budget={number + 1}GiB", result=result)
    collect(tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["largest volume"] for row in rows] == ["at least 32x32x32", "33x33x33"]
    assert [row["limit"] for row in rows] == [end["limit"] for end in ends]
    assert {row["each step"] for row in rows} == {"2 at once"}
    assert {"at least 32x32x32", "33x33x33 (so many positions)"} <= set(words)


def test_measured_budgets_are_in_the_picture(tmp_path):
    for number, budget in enumerate(("auto", "8GiB")):
        result = planned("stored", 32 + number, (number + 7) * 2**30)
        write_job(tmp_path / str(number), "mode=plan", "vary=volume", f"budget={budget}", result=result)
    collect(tmp_path)
    assert (tmp_path / "sweep.png").stat().st_size > 5000


UNFINISHED = [
    {"status": "interrupted"},
    {"status": None, "plan": [], "memory": [], "metrics": None, "privacy": "none"},
    {"status": "ok", "plan": {"vary": "volume", "rows": [{}]}},
    {"status": "ok", "plan": {"vary": "volume", "rows": []}},
    {"status": "ok", "plan": {"vary": None, "rows": [None, {"strategy": "stored", "calibrated_bytes": None}]}},
    {"status": "ok", "metrics": {"loss": None, "dice": float("nan")}, "memory": {"peak_bytes": None}},
]


@pytest.mark.parametrize("mode", [pytest.param("train", marks=pytest.mark.slow), "plan"])
def test_results_with_missing_keys_are_collected(tmp_path, mode):
    vary = ["budget=1GiB", "vary=volume"] if mode == "plan" else []
    for number, result in enumerate([planned("stored", 32, 2**30), *UNFINISHED, None]):
        write_job(tmp_path / str(number), f"mode={mode}", f"trainer.seed={number}", *vary, result=result)
    text = ["experiment=gpt2_dp", "trainer.seed=99"]
    (tmp_path / "99").mkdir()
    write_config(compose(text), tmp_path / "99", request="other")
    (tmp_path / "99" / "result.json").write_text(
        '{"status": "ok", "metrics": {"loss": 0.5}, "privacy": {"epsilon": 3}}'
    )
    assert main([str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == len({row["job"] for row in rows}) == 9
    assert [row["status"] for row in rows[:3]] == ["ok", "interrupted", "no result"]
