"""The command line, as a user calls it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

from memsave.compose import compose
from memsave.data import DataError, mni
from memsave.ghost import GhostClipper
from memsave.run import execute
from tests.training.test_segmentation import TINY

QUICK = [*TINY, "trainer.steps=2"]


def command(folder, *arguments):
    environment = {**os.environ, "MEMSAVE_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "memsave.run", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_one_run_leaves_its_result(tmp_path):
    done = command(tmp_path, *QUICK, "profiler.process=true")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "brats_rev").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "result.json",
        "config.yaml",
        "metrics.jsonl",
        "memory.json",
        "memory.png",
        "memory.html",
        "model",
        "overlay.png",
        "scores.csv",
        "checkpoint",
    }
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "ok"
    assert result["experiment"] == "brats_rev"
    assert result["privacy"] is None
    assert {"loss", "dice_wt", "dice_tc", "dice_et", "hd95_wt"} <= result["metrics"].keys()
    memory = result["memory"]
    assert memory["peak_bytes"] == sum(memory["peak_by_category"].values()) > 0
    assert memory["allocator_peak_bytes"] > 0
    assert memory["process_peak_bytes"] > memory["peak_bytes"] or not Path("/proc/self/status").is_file()
    assert result["seconds_per_step"] > 0
    compared = memory["compared"]
    assert (
        compared["reversible"]["peak_bytes"] < compared["checkpoint"]["peak_bytes"] < compared["stored"]["peak_bytes"]
    )
    assert compared["reversible"]["loss"] == pytest.approx(compared["stored"]["loss"], rel=1e-5)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 2]
    assert OmegaConf.load(folder / "config.yaml").trainer.steps == 2
    assert "Dice on 1 held-out cases: WT" in done.stderr
    assert "stored would take" in done.stderr


def test_a_sweep_goes_on_past_a_failure_and_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ["experiment=brats_rev", "data=brats", f"data.root={tmp_path / 'empty'}", "memory=stored,reversible"]
    done = command(tmp_path, "-m", *arguments)
    assert done.returncode == 1
    (sweep,) = (tmp_path / "multirun" / "brats_rev").iterdir()
    for number in "01":
        result = json.loads((sweep / number / "result.json").read_text())
        assert result["status"] == "failed"
        assert "No NIfTI file" in result["error"]


def test_a_sweep_with_a_mistake_is_refused_before_anything_runs(tmp_path):
    done = command(tmp_path, "-m", "experiment=brats_rev", "memory=stored,reversibel")
    assert done.returncode == 2
    assert "did you mean reversible?" in done.stderr
    assert not (tmp_path / "multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=brats_rev", "trainer.stepz=3"], "did you mean steps?"),
        (["experiment=brats_rev", "data=brats", "data.root=nowhere"], "nowhere does not exist"),
        ([], "no experiment is chosen"),
        (["experiment=brats_rev", "memory=stored,reversible"], "add -m to run one job for each"),
        (["-m", "experiment=brats_rev", "memory=glob(*)"], "cannot be read"),
        (["experiment=brats_rev", "hydra.run.dir=/proc/nowhere"], "the output folder cannot be made"),
        (["--cfg", "job"], "You must specify 'experiment'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, arguments, words):
    done = command(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_help_is_of_this_program(tmp_path):
    done = command(tmp_path, "--help")
    assert done.returncode == 0
    assert "python -m memsave.run experiment=brats_rev" in done.stdout


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run in this process; returns (exit code, result)."""
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path / "cache"))

    def call(*overrides, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        code = execute(compose([*QUICK, "profiler.compare=[]", *overrides]), folder, experiment="brats_rev")
        return code, json.loads((folder / "result.json").read_text()), folder

    return call


def test_a_run_continues_from_a_checkpoint(run):
    _, whole, _ = run("trainer.steps=4", name="whole")
    # the learning rate follows trainer.steps, so a broken run is one that was stopped, not one with fewer steps
    _, _, first = run("trainer.steps=4", "trainer.checkpoint_every=1", name="first")
    code, resumed, folder = run("trainer.steps=4", f"trainer.resume={first / 'checkpoint'}", name="resumed")
    assert code == 0
    assert resumed["metrics"]["dice_wt"] == whole["metrics"]["dice_wt"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1  # nothing was left to train
    assert resumed["metrics"]["loss"] is None
    code, refused, _ = run("trainer.steps=3", f"trainer.resume={first / 'checkpoint'}", name="refused")
    assert code == 2
    assert "trainer.steps is 3, but the checkpoint is at step 4" in refused["error"]


def test_an_interrupted_run_says_how_to_go_on_and_does(run, monkeypatch, capsys):
    from memsave.training.segmentation import Segmentation

    _, whole, folder = run("trainer.steps=3", "model.dropout=0.2", name="whole")
    curve = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    original, calls = Segmentation.per_example_losses, []

    def signalled(self, model, batch):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch)

    monkeypatch.setattr(Segmentation, "per_example_losses", signalled)
    code, result, folder = run("trainer.steps=3", "model.dropout=0.2", name="stopped")
    assert (code, result["status"]) == (130, "interrupted")
    assert f"trainer.resume={folder / 'checkpoint'}" in capsys.readouterr().err
    monkeypatch.undo()
    resume = f"trainer.resume={folder / 'checkpoint'}"
    _, resumed, folder = run("trainer.steps=3", "model.dropout=0.2", resume, name="resumed")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] == curve[2]
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trainer.batch_size=1", r"another trainer.batch_size \(2, here 1\)"),
        ("trainer.seed=5", r"another trainer.seed \(0, here 5\)"),
        ("data.seed=3", "another set of training data"),
        ("data.crop_size=[8,16,16]", "another set of training data"),
    ],
)
def test_a_run_is_continued_on_the_same_batches_alone(run, change, words):
    _, _, first = run("trainer.steps=2", "trainer.batch_size=2", name="first")
    code, result, _ = run(
        "trainer.steps=3", "trainer.batch_size=2", f"trainer.resume={first / 'checkpoint'}", change, name="other"
    )
    assert code == 2
    assert re.search(f"{words}.*the batches follow from it; continue with the same", result["error"])


@pytest.mark.parametrize(
    ("package", "extra", "overrides"),
    [("nilearn", "mni", ["data=mni_phantom"]), ("nibabel", "brats", [])],
)
def test_a_package_that_is_missing_is_named_with_its_extra(run, monkeypatch, package, extra, overrides):
    mni._template.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, result, _ = run(*overrides)
    assert code == 2
    assert result["error"] == f"the package {package} is not installed; install it with: pip install 'memsave[{extra}]'"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")],
)
def test_a_full_disk_is_one_sentence(run, monkeypatch, error):
    from memsave.training import checkpoint

    original, calls = checkpoint.save, []

    def save(state, folder):
        calls.append(1)
        if len(calls) == 2:
            raise error
        original(state, folder)

    monkeypatch.setattr(checkpoint, "save", save)
    code, result, folder = run("trainer.steps=3", "trainer.checkpoint_every=1")
    assert (code, result["status"]) == (1, "failed")
    assert "cannot be written" in result["error"] and f"trainer.resume={folder / 'checkpoint'}" in result["error"]
    assert not (folder / "error.txt").exists()


def test_the_crops_of_a_patient_are_clipped_as_one(run, monkeypatch):
    norms = []
    original = GhostClipper.backward

    def backward(self, losses):
        assert losses.shape == (1,)
        before = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        norms.append(original(self, losses).item())
        added = [p.grad - (0 if old is None else old) for p, old in zip(self.model.parameters(), before)]
        assert sum(float((each**2).sum()) for each in added) ** 0.5 <= 0.01 * (1 + 1e-4)
        return torch.tensor([norms[-1]])

    monkeypatch.setattr(GhostClipper, "backward", backward)
    private = ["privacy=ghost", "privacy.passes=direct", "privacy.noise_multiplier=1", "privacy.seed=1"]
    crops = ["data.crops_per_case=3", "trainer.micro_batch_size=1", "privacy.max_grad_norm=0.01"]
    code, result, _ = run(*private, *crops, "trainer.steps=3")
    assert code == 0 and norms and min(norms) > 0.01  # or clipping would have had nothing to do
    assert result["privacy"]["unit"].startswith("one patient")


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert execute(compose(QUICK), tmp_path / "file" / "run", experiment="brats_rev") == 1
    told = capsys.readouterr().err
    assert "file/run cannot be written (Not a directory)" in told and told.count("\n") == 1


def test_data_that_cannot_be_read_costs_no_step_that_was_taken(run, monkeypatch):
    from memsave.data.segmentation import TrainingCrops

    _, whole, _ = run("trainer.steps=3", "data.workers=0", name="whole")
    original, calls = TrainingCrops.example, []

    def broken(self, *args, **options):
        calls.append(1)
        if len(calls) > 4:  # two steps of two
            raise DataError("case 3 holds NaN: export it again.")
        return original(self, *args, **options)

    monkeypatch.setattr(TrainingCrops, "example", broken)
    code, failed, folder = run("trainer.steps=3", "data.workers=0", name="broken")
    resume = f"trainer.resume={folder / 'checkpoint'}"
    assert code == 2 and failed["error"] == f"case 3 holds NaN: export it again. Then continue with {resume}"
    monkeypatch.undo()
    monkeypatch.setenv("MEMSAVE_CACHE", str(folder.parent / "cache"))
    _, resumed, _ = run("trainer.steps=3", "data.workers=0", resume, name="resumed")
    assert resumed["metrics"] == whole["metrics"]


def test_a_run_in_the_folder_of_another_has_a_log_of_its_own(run):
    run()
    _, _, folder = run()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]


def test_a_reader_that_has_gone_does_not_end_a_run(tmp_path):
    told = "from memsave.training.progress import Progress; p = Progress(); p.say('one'); p.say('two'); print('done')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", told], stdout=subprocess.PIPE, stderr=writing, text=True)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_training_stops_when_the_score_has_not_become_better_for_long(run, monkeypatch):
    from memsave.training.segmentation import Segmentation

    scores = iter([0.1, 0.3, 0.2, 0.3, 0.25])
    monkeypatch.setattr(Segmentation, "evaluate", lambda self, model: {"dice": next(scores)})
    monkeypatch.setattr(Segmentation, "summary", lambda self, scores: "")
    monkeypatch.setattr(Segmentation, "show", lambda self, folder: [])
    code, _, folder = run("trainer.steps=9", "trainer.evaluate_every=1", "trainer.patience=2")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # best at 2, and two more
    assert json.loads((folder / "checkpoint" / "state.json").read_text())["best"] == [0.3, 2]


def test_the_average_is_what_is_released(run):
    from safetensors.torch import load_file

    code, _, folder = run("trainer.steps=3", "trainer.ema=0.9")
    assert code == 0
    released, last = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(folder / "checkpoint" / "model.safetensors"),
    )
    average = load_file(folder / "checkpoint" / "optimizer.safetensors")
    for name, tensor in released.items():
        assert torch.equal(tensor, average[f"ema/{name}"])
    assert any(not torch.equal(tensor, last[name]) for name, tensor in released.items())


def test_tensorboard_has_the_losses(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result, folder = run("trainer.steps=2", "trainer.tensorboard=true")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[-1].value == pytest.approx(result["metrics"]["loss"], rel=1e-6)
    assert events.Scalars("dice")[-1].value == pytest.approx(result["metrics"]["dice"], rel=1e-6)


def test_float16_is_for_cuda(run):
    code, result, _ = run("trainer.precision=float16", "trainer.device=cpu")
    assert (code, result["error"]) == (
        2,
        "trainer.precision=float16 is for CUDA; give trainer.precision=bfloat16 on the CPU",
    )


def test_a_file_that_may_not_be_read_is_not_called_a_full_disk(run, monkeypatch):
    from memsave.training import experiment

    denied = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else.csv")
    monkeypatch.setattr(experiment, "make_task", lambda *args, **options: (_ for _ in ()).throw(denied))
    _, result, _ = run()
    assert "cannot be written" not in result["error"] and "/somewhere/else.csv" in result["error"]


def test_an_interrupt_before_training_leaves_its_result(run, monkeypatch):
    from memsave.training import experiment

    monkeypatch.setattr(experiment, "make_model", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    code, result, _ = run()
    assert (code, result["status"]) == (130, "interrupted")


def test_a_mode_that_does_not_fit_does_not_stop_the_run(run, monkeypatch):
    from memsave.models import ReversibleUNet3d

    original = ReversibleUNet3d.forward

    def tight(self, x):
        if self.memory == "stored":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x)

    monkeypatch.setattr(ReversibleUNet3d, "forward", tight)
    code, result, _ = run("profiler.compare=[stored,reversible]")
    assert code == 0
    assert list(result["memory"]["compared"]) == ["reversible"]


def test_unexpected_errors_and_full_memory_are_told_apart(run, monkeypatch):
    from memsave.training import experiment

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


def test_a_run_over_its_budget_stops_and_names_what_is_largest(run, monkeypatch):
    monkeypatch.setattr("memsave.training.experiment.fitted", lambda config, *args, **known: (config, {}))
    code, result, folder = run("budget=1MiB", "trainer.steps=3")
    assert (code, result["status"]) == (3, "over_budget")
    assert re.search(
        r"step 1 held [0-9.]+ MiB .* budget of 1.00 MiB: \w+ takes the most, [0-9.]+ .iB in [a-z]+", result["error"]
    )
    assert result["memory"]["peak_bytes"] > 2**20
    assert (folder / "memory.png").is_file() and (folder / "checkpoint").is_dir()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_that_grows_over_its_budget_names_what_grew(run, monkeypatch):
    from memsave.training.segmentation import Segmentation

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


def test_a_model_that_cannot_be_built_is_bad_input(run):
    code, result, _ = run("model.channels=[7]", "model.blocks=[1]")
    assert code == 2
    assert "even number" in result["error"]
