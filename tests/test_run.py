"""The command line: files of a run, exit codes, continued runs, and options of the trainer."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from memsave.config.compose import compose
from memsave.config.overrides import override
from memsave.ghost import GhostClipper
from memsave.run import execute, is_done, output_files
from memsave.training.result import write_config
from tests.support.commands import TWO_STEPS, run_command
from tests.support.tiny_configs import TINY_UNET


def test_a_run_writes_its_files(tmp_path):
    more = ["memory.engine=hooks", "profiler.process=true", "profiler.compare=[stored,reversible]"]
    done = run_command(tmp_path, *TWO_STEPS, *more)
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
    assert compared["reversible"]["peak_bytes"] < compared["stored"]["peak_bytes"]
    assert compared["reversible"]["loss"] == pytest.approx(compared["stored"]["loss"], rel=1e-5)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 2]
    assert OmegaConf.load(folder / "config.yaml").trainer.steps == 2
    assert "Dice on 1 held-out cases: WT" in done.stderr
    assert re.search(r"  stored: .*times as much; a step of reversible takes .* times as long", done.stderr)
    last = done.stderr.splitlines()[-1].partition("; results in outputs/brats_rev/")[2].partition(": ")[2]
    assert last == "overlay.png, scores.csv, memory.png, memory.html, model/, result.json"


def test_a_sweep_continues_after_a_failed_job_and_exits_with_1(tmp_path):
    root, sweep = tmp_path / "empty (a), b", tmp_path / "sweep, a=b"
    root.mkdir()
    paths = [shlex.split(override(key, path))[0] for key, path in (("data.root", root), ("hydra.sweep.dir", sweep))]
    done = run_command(tmp_path, "-m", "experiment=brats_rev", "data=brats", "memory=stored,reversible", *paths)
    assert done.returncode == 1
    for number in "01":
        result = json.loads((sweep / number / "result.json").read_text())
        assert result["status"] == "failed"
        assert "No NIfTI file" in result["error"]
    assert f"repeat the command with {override('hydra.sweep.dir', sweep)} to run the missing jobs" in done.stderr


def test_a_sweep_with_an_invalid_override_runs_no_job(tmp_path):
    done = run_command(tmp_path, "-m", "experiment=brats_rev", "memory=stored,reversibel")
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
        (["experiment=brats_rev", "hydra.run.dir=/proc/nowhere"], "the output folder cannot be created"),
        (["--cfg", "job"], "You must specify 'experiment'"),
    ],
)
def test_bad_input_prints_one_sentence_and_exits_with_2(tmp_path, arguments, words):
    done = run_command(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_help_prints_the_module_docstring(tmp_path):
    done = run_command(tmp_path, "--help")
    assert done.returncode == 0
    assert "python -m memsave.run experiment=brats_rev" in done.stdout


def test_a_completed_run_continues_with_its_evaluation(run):
    _, whole, first = run("trainer.steps=2", name="whole")
    code, resumed, folder = run("trainer.steps=2", f"trainer.resume={first / 'checkpoint'}", name="resumed")
    assert code == 0
    assert resumed["metrics"]["dice_wt"] == whole["metrics"]["dice_wt"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1  # only the evaluation
    assert resumed["metrics"]["loss"] is None
    code, refused, _ = run("trainer.steps=1", f"trainer.resume={first / 'checkpoint'}", name="refused")
    assert code == 2
    assert "trainer.steps is 1, but the checkpoint is at step 2" in refused["error"]


def test_epochs_set_the_steps_of_a_segmentation_run(run):
    code, _, folder = run("trainer.steps=2", "trainer.epochs=2", "trainer.batch_size=1", "memory=stored")
    assert code == 0
    steps = [line["step"] for line in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in line]
    assert steps == list(range(1, 2 * 3 + 1))  # three training cases, one per step
    assert (folder / "checkpoint").is_dir()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """(folder of a run of one step with two examples, folder of its phantoms); tests do not change them."""
    folder, data = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("data")
    settings = ["trainer.steps=1", "trainer.batch_size=2", "profiler.compare=[]", f"data.root={data}"]
    assert execute(compose([*TINY_UNET, *settings]), folder, experiment="brats_rev") == 0
    return folder, data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trainer.batch_size=1", r"another trainer.batch_size \(2, here 1\)"),
        ("trainer.seed=5", r"another trainer.seed \(0, here 5\)"),
        pytest.param("data.seed=3", "another set of training data", marks=pytest.mark.slow),
        ("data.crop_size=[8,16,16]", "another set of training data"),
    ],
)
def test_a_run_is_not_continued_with_other_batches(run, one_step, change, words):
    first, data = one_step
    settings = ["trainer.steps=2", "trainer.batch_size=2", f"data.root={data}"]
    code, result, _ = run(*settings, f"trainer.resume={first / 'checkpoint'}", change)
    assert code == 2
    assert re.search(f"{words}.*which changes the batches; continue with the same", result["error"])


def test_the_crops_of_a_patient_are_clipped_as_one_gradient(run, monkeypatch):
    norms = []
    original = GhostClipper.backward

    def backward(self, losses, **options):
        assert losses.shape == (1,)
        before = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        norms.append(original(self, losses, **options).item())
        added = [p.grad - (0 if old is None else old) for p, old in zip(self.model.parameters(), before)]
        assert sum(float((each**2).sum()) for each in added) ** 0.5 <= 0.01 * (1 + 1e-4)
        return torch.tensor([norms[-1]])

    monkeypatch.setattr(GhostClipper, "backward", backward)
    private = ["privacy=ghost", "privacy.passes=direct", "privacy.noise_multiplier=1", "privacy.seed=1"]
    private += ["privacy.accountant=rdp", "privacy.verify=false"]  # the exact accountant and the check take seconds
    crops = ["data.crops_per_case=3", "trainer.micro_batch_size=1", "privacy.max_grad_norm=0.01"]
    code, result, _ = run(*private, *crops, "trainer.steps=3")
    assert code == 0 and norms and min(norms) > 0.01  # every gradient was clipped
    assert result["privacy"]["unit"].startswith("one patient")


@pytest.mark.slow
def test_a_new_run_in_an_old_folder_replaces_the_log(run):
    run()
    _, _, folder = run()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]


@pytest.mark.parametrize("privacy", ["none", "ghost", "direct"])
def test_the_first_line_names_the_chosen_options(run, monkeypatch, capfd, privacy):
    monkeypatch.setattr("memsave.experiment.make_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    run(f"privacy={privacy}", "trainer.micro_batch_size=1")
    first = capfd.readouterr().err.splitlines()[0]
    assert first == f"data=phantom, memory=reversible, privacy={privacy}, on cpu"


def test_the_last_line_omits_logs_configs_and_checkpoints(tmp_path):
    for name in ("checkpoint", "checkpoint.previous", "model", "tensorboard"):
        (tmp_path / name).mkdir()
    for name in (
        "privacy.md",
        "samples.md",
        "scores.csv",
        "memory.json",
        "config.yaml",
        "metrics.jsonl",
        "result.json",
    ):
        (tmp_path / name).touch()
    assert output_files(tmp_path) == [
        "scores.csv", "samples.md", "privacy.md", "model/", "tensorboard/", "result.json"
    ]  # fmt: skip


def test_training_stops_after_patience_evaluations_without_a_better_score(run, monkeypatch):
    from memsave.tasks.segmentation.task import Segmentation

    scores = iter([0.1, 0.3, 0.2, 0.3, 0.25])
    monkeypatch.setattr(Segmentation, "evaluate", lambda self, model: {"dice": next(scores)})
    monkeypatch.setattr(Segmentation, "summary", lambda self, scores: "")
    monkeypatch.setattr(Segmentation, "show", lambda self, folder: [])
    code, _, folder = run("trainer.steps=9", "trainer.evaluate_every=1", "trainer.patience=2", "memory=stored")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # the best step is 2, patience is 2
    assert json.loads((folder / "checkpoint" / "state.json").read_text())["best"] == [0.3, 2]


def test_the_averaged_weights_are_released(run):
    from safetensors.torch import load_file

    code, _, folder = run("trainer.steps=3", "trainer.ema=0.9", "memory=stored")
    assert code == 0
    released, last = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(folder / "checkpoint" / "model.safetensors"),
    )
    average = load_file(folder / "checkpoint" / "optimizer.safetensors")
    for name, tensor in released.items():
        assert torch.equal(tensor, average[f"ema/{name}"])
    assert any(not torch.equal(tensor, last[name]) for name, tensor in released.items())


def test_tensorboard_has_the_losses_and_scores(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result, folder = run("trainer.steps=2", "trainer.tensorboard=true", "memory=stored")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[-1].value == pytest.approx(result["metrics"]["loss"], rel=1e-6)
    assert events.Scalars("dice")[-1].value == pytest.approx(result["metrics"]["dice"], rel=1e-6)


def test_a_job_of_a_sweep_that_was_killed_between_two_renames_continues(tmp_path):
    """The kill left `checkpoint.previous` alone; `checkpoint` had not been put in its place yet."""
    config = compose(TINY_UNET)
    write_config(config, tmp_path, request="job")
    (tmp_path / "checkpoint.previous").mkdir()
    assert not is_done(tmp_path, config, request="job")
    assert config.trainer.resume == str(tmp_path / "checkpoint")
