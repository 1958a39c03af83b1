"""Faults of a run: each gives one sentence and an exit code, and loses no completed step."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from memsave.config.compose import compose
from memsave.data import DataError
from memsave.data.volumes.phantoms import mni
from memsave.outcome import explain
from memsave.run import _restore_on_failure, execute
from tests.support.commands import TWO_STEPS, run_command
from tests.support.tiny_configs import TINY_UNET


def test_an_interrupted_run_prints_the_override_that_continues_it(run, monkeypatch, capsys):
    from memsave.tasks.segmentation.task import Segmentation

    settings = ["trainer.steps=3", "model.dropout=0.2", "memory=stored"]
    _, whole, folder = run(*settings, name="whole")
    curve = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    original, calls = Segmentation.per_example_losses, []

    def signalled(self, model, batch):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch)

    monkeypatch.setattr(Segmentation, "per_example_losses", signalled)
    code, result, folder = run(*settings, name="stopped (a), b=c")
    assert (code, result["status"]) == (130, "interrupted")
    printed = capsys.readouterr().err.partition("interrupted; continue with ")[2].splitlines()[0]
    monkeypatch.undo()
    (resume,) = shlex.split(printed)  # as a shell reads it
    assert resume == f'trainer.resume="{folder}"'
    _, resumed, folder = run(*settings, resume, name="resumed")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] == curve[2]
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    ("package", "extra", "overrides"),
    [("nilearn", "mni", ["data=mni_phantom"]), ("nibabel", "brats", [])],
)
def test_a_missing_package_is_named_with_its_extra(run, monkeypatch, package, extra, overrides):
    mni._template.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, result, _ = run(*overrides)
    assert code == 2
    assert result["error"] == f"the package {package} is not installed; install it with: pip install 'memsave[{extra}]'"


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), marks=pytest.mark.slow),
        SafetensorError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_gives_one_sentence_and_no_traceback(run, monkeypatch, error):
    from memsave.training import checkpoint

    original, calls = checkpoint.save, []

    def save(state, folder):
        calls.append(1)
        if len(calls) == 2:
            raise error
        original(state, folder)

    monkeypatch.setattr(checkpoint, "save", save)
    code, result, folder = run("trainer.steps=2", "trainer.checkpoint_every=1", "memory=stored")
    assert (code, result["status"]) == (1, "failed")
    assert "cannot be written" in result["error"] and f"trainer.resume={folder}" in result["error"]
    assert not (folder / "error.txt").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EFBIG, "File too large"), SafetensorError("Error while serializing: File too large (os error 27)")],
)
def test_a_file_above_the_limit_of_its_file_system_is_reported_as_a_full_disk(tmp_path, error):
    status, code, message = explain(error, compose(TINY_UNET), tmp_path)
    assert (status, code) == ("failed", 1)
    assert message.startswith(f"{tmp_path} cannot be written (File too large); free space")


def test_what_a_continued_run_needs_is_flushed_before_the_file_that_needs_it(run, monkeypatch):
    """A power cut loses the content of files that were not flushed."""
    flushed, original = [], os.fsync

    def fsync(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, folder = run("trainer.checkpoint_every=1", "memory=stored")
    assert code == 0
    first, log, state, released, result = (
        flushed.index(name)
        for name in (".new.config.yaml", "metrics.jsonl", "state.json", "config.json", ".new.result.json")
    )
    assert first < log < state < released < result
    assert flushed.count("metrics.jsonl") == flushed.count("state.json") == 2
    assert {path.name for path in (folder / "model").iterdir()} <= set(flushed[released - 2 : result])


def test_a_failed_continuation_never_writes_into_the_checkpoint(run, monkeypatch):
    """A kill while the old files are restored must not find a half-written checkpoint."""
    _, _, folder = run("trainer.steps=1", "memory=stored")
    before = (folder / "checkpoint" / "state.json").stat().st_mtime_ns
    with _restore_on_failure(folder):
        (folder / "metrics.jsonl").write_text("")
        (folder / "result.json").unlink()
    assert (folder / "checkpoint" / "state.json").stat().st_mtime_ns == before
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((folder / "result.json").read_text())["status"] == "ok"


def test_a_folder_that_cannot_be_created_gives_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert execute(compose(TINY_UNET), tmp_path / "file" / "run", experiment="brats_rev") == 1
    printed = capsys.readouterr().err
    assert "file/run cannot be written (Not a directory)" in printed and printed.count("\n") == 1


def test_a_data_error_saves_a_checkpoint_of_the_completed_steps(run, monkeypatch):
    from memsave.data.volumes.dataset import TrainingCrops

    settings = ["trainer.steps=3", "data.workers=0", "memory=stored"]
    _, whole, _ = run(*settings, name="whole")
    original, calls = TrainingCrops.example, []

    def broken(self, *args, **options):
        calls.append(1)
        if len(calls) > 4:  # after two steps of two examples
            raise DataError("case 3 holds NaN: export it again.")
        return original(self, *args, **options)

    monkeypatch.setattr(TrainingCrops, "example", broken)
    code, failed, folder = run(*settings, name="broken")
    resume = f"trainer.resume={folder}"
    assert code == 2 and failed["error"] == f"case 3 holds NaN: export it again. Then continue with {resume}"
    monkeypatch.undo()
    monkeypatch.setenv("MEMSAVE_CACHE", str(folder.parent / "cache"))
    _, resumed, _ = run(*settings, resume, name="resumed")
    assert resumed["metrics"] == whole["metrics"]


def test_a_closed_standard_error_does_not_end_the_program():
    program = "from memsave.progress import Progress; p = Progress(); p.say('one'); p.say('two'); print('done')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writing, text=True)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_float16_is_refused_on_the_cpu(run):
    code, result, _ = run("trainer.precision=float16", "trainer.device=cpu")
    assert (code, result["error"]) == (
        2,
        "trainer.precision=float16 is for CUDA; give trainer.precision=bfloat16 on the CPU",
    )


def test_a_file_without_read_permission_is_not_reported_as_a_full_disk(run, monkeypatch):
    from memsave import experiment

    denied = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else.csv")
    monkeypatch.setattr(experiment, "make_task", lambda *args, **options: (_ for _ in ()).throw(denied))
    _, result, _ = run()
    assert "cannot be written" not in result["error"] and "/somewhere/else.csv" in result["error"]


def test_an_interrupt_before_training_writes_a_result(run, monkeypatch):
    from memsave import experiment

    monkeypatch.setattr(experiment, "make_model", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    code, result, _ = run()
    assert (code, result["status"]) == (130, "interrupted")


@pytest.mark.slow
def test_a_compared_mode_that_runs_out_of_memory_does_not_stop_the_run(run, monkeypatch):
    from memsave.models import ReversibleUNet3d

    original = ReversibleUNet3d.forward

    def fail_when_stored(self, x):
        if self.memory == "stored":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x)

    monkeypatch.setattr(ReversibleUNet3d, "forward", fail_when_stored)
    code, result, _ = run("profiler.compare=[stored,reversible]")
    assert code == 0
    assert list(result["memory"]["compared"]) == ["reversible"]


def test_out_of_memory_and_unexpected_errors_have_different_exit_codes(run, monkeypatch):
    from memsave import experiment

    def fail(error):
        monkeypatch.setattr(experiment, "make_model", lambda *args, **options: (_ for _ in ()).throw(error))

    fail(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    code, result, _ = run(name="full")
    assert (code, result["status"]) == (3, "oom")
    fail(RuntimeError("something else"))
    code, result, folder = run(name="broken")
    assert (code, result["status"]) == (1, "failed")
    assert "something else" in result["error"]
    assert "Traceback" in (folder / "error.txt").read_text()


@pytest.mark.parametrize(
    ("memory", "remedy"),
    [
        ("stored", "memory=reversible, trainer"),
        pytest.param("reversible", "trainer", marks=pytest.mark.slow),
        pytest.param("auto", "trainer", marks=pytest.mark.slow),
    ],
)
def test_the_remedies_for_out_of_memory_are_not_in_use_already(run, monkeypatch, memory, remedy):
    from memsave import experiment

    full = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(experiment, "make_task", lambda *args, **options: (_ for _ in ()).throw(full))
    code, result, _ = run(f"memory={memory}", "budget=1GiB")
    assert code == 3
    assert f"try {remedy}.micro_batch_size=1, smaller crops" in result["error"]


def test_a_run_over_its_budget_stops_and_names_the_largest_category(run, monkeypatch):
    monkeypatch.setattr("memsave.experiment.fit_to_budget", lambda config, *args, **kwargs: (config, {}))
    code, result, folder = run("budget=1MiB", "trainer.steps=3", "memory=stored")
    assert (code, result["status"]) == (3, "over_budget")
    assert re.search(
        r"step 1 held [0-9.]+ MiB .* budget of 1.00 MiB: \w+ takes the most, [0-9.]+ .iB in [a-z]+", result["error"]
    )
    assert result["memory"]["peak_bytes"] > 2**20
    assert (folder / "memory.png").is_file() and (folder / "checkpoint").is_dir()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_run_that_grows_over_its_budget_names_what_grew(run, monkeypatch):
    from memsave.tasks.segmentation.task import Segmentation

    code, result, _ = run("budget=1GiB", "trainer.steps=3", name="within")
    assert code == 0
    original, calls = Segmentation.per_example_losses, []

    def leak(self, model, batch):
        calls.append(1)
        if len(calls) == 3:
            model.register_buffer("leak", torch.zeros(2**20))
        return original(self, model, batch)

    monkeypatch.setattr(Segmentation, "per_example_losses", leak)
    peak = result["memory"]["peak_bytes"]
    code, result, _ = run(f"budget={peak + 2**20}", "trainer.steps=3", name="grown")
    assert (code, result["status"]) == (3, "over_budget")
    assert result["error"].startswith("step 3 held")
    assert "buffer grew, by 4.00 MiB in the model itself" in result["error"]


def test_a_model_that_cannot_be_built_exits_with_2(run):
    code, result, _ = run("model.channels=[7]", "model.blocks=[1]")
    assert code == 2
    assert "even number" in result["error"]


@pytest.mark.parametrize("part", ["evaluate", pytest.param("show", marks=pytest.mark.slow), "release"])
def test_an_error_after_training_loses_no_completed_step(run, monkeypatch, part):
    from memsave.tasks.segmentation.task import Segmentation

    def fail(*_, **__):
        raise DataError("a held-out volume is damaged inside")

    steps = ["trainer.steps=2", "trainer.checkpoint_every=50", "memory=stored"]
    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, part, fail)
        code, result, folder = run(*steps, *(["trainer.evaluate_every=1"] if part == "evaluate" else []), name="fault")
    assert (code, result["status"]) == (2, "failed")
    taken = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open() if "loss" in line]
    assert taken == ([1] if part == "evaluate" else [1, 2])
    code, _, folder = run(*steps, f"trainer.resume={folder / 'checkpoint'}", name="resumed")
    assert code == 0
    remaining = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open() if '"lr"' in line]
    assert taken + remaining == [1, 2]


@pytest.mark.parametrize("command", [["memsave.run", "experiment=brats_rev"], ["memsave.predict", "checkpoint=a"]])
def test_one_of_several_processes_is_refused_and_writes_nothing(command, tmp_path):
    module, *arguments = command
    done = run_command(tmp_path, *arguments, module=module, WORLD_SIZE="2", RANK="1")
    assert done.returncode == 2
    assert "this process is one of several (WORLD_SIZE=2)" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    again = [*TWO_STEPS, "memory=stored", "trainer.steps=1", "profiler.compare=[]", "hydra.run.dir=there"]
    assert run_command(tmp_path, *again).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()}
    done = run_command(tmp_path, *again)
    assert done.returncode == 2
    assert "there already holds a run (checkpoint); continue it with trainer.resume=" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()} == before
    done = run_command(tmp_path, "trainer.resume=there", "trainer.steps=2")
    assert done.returncode == 0, done.stderr
    assert "trainer.steps=2 (was 1)" in done.stderr


@pytest.mark.slow
def test_a_job_of_a_sweep_whose_choices_exclude_each_other_leaves_its_result_and_the_sweep_goes_on(tmp_path):
    choices = [
        "memory.engine=auto,fused",
        "model.squeeze_excitation=0,0.5",
        "profiler.compare=[]",
        "trainer.steps=1",
    ]
    done = run_command(tmp_path, "-m", *TINY_UNET, *choices, "hydra.sweep.dir=sweep")
    assert done.returncode == 1, done.stderr
    results = [json.loads((tmp_path / "sweep" / number / "result.json").read_text()) for number in "0123"]
    assert [each["status"] for each in results] == ["ok", "ok", "ok", "failed"]
    assert "memory.engine=fused cannot recompute squeeze-excitation" in results[3]["error"]
