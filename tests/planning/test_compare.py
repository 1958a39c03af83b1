"""Comparison of memory modes before training: modes without enough time or memory are omitted, and the run trains."""

import json

import pytest
import torch

pytest.importorskip("monai")

from memsave.config.compose import compose, to_objects
from memsave.experiment import run_experiment
from memsave.planning import compare
from memsave.planning.budget import free_bytes
from memsave.planning.compare import in_mode
from memsave.progress import Progress
from memsave.training.measure import PLAIN
from tests.support.tiny_configs import TINY_GPT2_DP

ALL = "profiler.compare=[stored,checkpoint,reversible]"


@pytest.mark.slow
def test_each_measured_mode_prints_a_line(run, capfd):
    code, result, _ = run(ALL, "memory.engine=fused")
    assert code == 0
    peaks = {mode: found["peak_bytes"] for mode, found in result["memory"]["compared"].items()}
    assert set(peaks) == {"stored", "checkpoint", "reversible"}
    assert peaks["reversible"] < peaks["checkpoint"] < peaks["stored"]
    output = capfd.readouterr().err
    assert "at most (profiler.compare_seconds)" in output
    for mode in ("stored", "checkpoint", "reversible"):
        assert f"  {mode}: " in output
        assert f"  {mode} is not measured" not in output


def test_with_too_little_time_no_mode_is_measured_and_the_run_trains(run, capfd):
    code, result, folder = run(ALL, "profiler.compare_seconds=0.0001")
    assert code == 0
    assert result["memory"]["compared"] == {}
    assert result["memory"]["peak_bytes"] > 0
    output = capfd.readouterr().err
    for mode in ("stored", "checkpoint", "reversible"):
        assert f"  {mode} is not measured: it would take about " in output
    assert "Peak of live memory of a training step, measured: reversible" in output
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])["step"] == 2


def test_with_a_limit_of_zero_nothing_is_compared(run, capfd):
    code, result, _ = run(ALL, "profiler.compare_seconds=0", "trainer.steps=1")
    assert (code, result["memory"]["compared"]) == (0, {})
    assert "measuring" not in capfd.readouterr().err


def test_the_mode_of_the_run_is_measured_first(run, monkeypatch, capfd):
    from memsave.training.measure import _Steps

    monkeypatch.setattr(_Steps, "expected_seconds", lambda self: 10.0)
    code, result, _ = run(ALL, "profiler.compare_seconds=75")  # four steps of the first mode, six of the second
    assert (code, list(result["memory"]["compared"])) == (0, ["stored", "reversible"])
    assert "checkpoint is not measured: it would take about 80 s, and " in capfd.readouterr().err


@pytest.mark.slow
def test_a_slow_first_forward_does_not_change_the_estimate(run, monkeypatch, capfd):
    from memsave.tasks.segmentation.task import Segmentation
    from memsave.training import measure

    now, calls, losses = [0.0], [], Segmentation.per_example_losses

    def slow_at_first(self, model, batch):
        calls.append(now[0])
        now[0] += 4.0 if len(calls) == 1 else 0.5
        return losses(self, model, batch)

    monkeypatch.setattr(Segmentation, "per_example_losses", slow_at_first)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compare.time, "monotonic", lambda: now[0])
    code, result, _ = run(ALL)  # 8 steps of 4 forwards of 0.5 s are within 60 s, of 4 s not
    assert (code, set(result["memory"]["compared"])) == (0, {"stored", "checkpoint", "reversible"})


@pytest.mark.slow
def test_a_mode_that_exceeds_the_free_memory_is_not_measured(run, monkeypatch, capfd):
    monkeypatch.setattr(compare, "free_bytes", lambda device: 10 * 2**20)
    code, result, _ = run(ALL)
    assert (code, set(result["memory"]["compared"])) == (0, {"reversible"})  # the run's own, which is trained anyway
    output = capfd.readouterr().err
    assert "stored is not measured: its step would hold " in output
    assert "and 10.00 MiB are free" in output


@pytest.mark.slow
def test_a_mode_that_exceeds_the_budget_is_not_measured(run, capfd):
    code, result, _ = run(ALL, "budget=6MiB", "memory.engine=hooks")
    assert code == 0
    assert "stored" not in result["memory"]["compared"]
    assert "predicted, more than budget=6MiB" in capfd.readouterr().err


def test_a_model_whose_memory_cannot_be_predicted_trains(run, monkeypatch, capfd):
    def fail(step):
        raise ValueError("the step reads the values of a tensor")

    monkeypatch.setattr(compare, "peak_on_fake", fail)
    code, result, _ = run(ALL, "trainer.steps=1")
    assert (code, set(result["memory"]["compared"])) == (0, {"reversible"})
    assert "stored is not measured: its memory cannot be predicted on fake tensors" in capfd.readouterr().err


def test_a_step_without_privacy_that_exceeds_the_free_memory_is_not_measured(tmp_path, monkeypatch, capfd):
    overrides = [*TINY_GPT2_DP, f"model.cache={tmp_path}", "privacy.noise_multiplier=1.0", "trainer.steps=1"]
    monkeypatch.setattr(compare, "free_bytes", lambda device: 2**10)
    result = run_experiment(to_objects(compose(overrides)), tmp_path, progress=Progress())
    assert set(result["memory"]["compared"]) == {"stored"}
    assert f"{PLAIN} is not measured: its step would hold " in capfd.readouterr().err
    assert result["privacy"]["steps"] == 1


def test_in_mode_changes_only_memory_or_privacy():
    config = to_objects(compose(["experiment=brats_rev", "memory=auto", "memory.levels=[stored,stored,reversible]"]))
    assert (in_mode(config, "stored").memory.mode, in_mode(config, "stored").memory.levels) == ("stored", None)
    assert in_mode(config, PLAIN).privacy.kind == "none"
    assert config.memory.mode == "auto"
    assert free_bytes(torch.device("cpu")) > 0
