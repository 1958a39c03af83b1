"""Continuing a run, given only its folder."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from memsave.config import ConfigError
from memsave.config.compose import compose
from memsave.data import DataError
from memsave.resume import ResumedRun, resumed_run
from memsave.run import continue_run, execute
from memsave.tasks.segmentation.task import Segmentation
from tests.support.tiny_configs import TINY_UNET


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder of a run of four steps, folder of the cache with its phantoms)."""
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    settings = ["trainer.steps=4", "trainer.checkpoint_every=2", "model.dropout=0.2", "profiler.compare=[]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSAVE_CACHE", str(cache))
        assert execute(compose([*TINY_UNET, *settings]), folder, experiment="brats_rev") == 0
    return folder, cache


@pytest.fixture
def killed(uninterrupted, tmp_path, monkeypatch):
    """(folder of a run that was killed in its fourth step, result and folder of the same run without interruption)."""
    folder, cache = uninterrupted
    monkeypatch.setenv("MEMSAVE_CACHE", str(cache))
    whole = json.loads((folder / "result.json").read_text())
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoint")
    (cut / "checkpoint.previous").rename(cut / "checkpoint")
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:10])
    return cut, whole, folder


@pytest.mark.parametrize("inside", ["", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_a_continued_run_equals_an_uninterrupted_run(killed, inside):
    cut, whole, folder = killed
    found = resumed_run([f"trainer.resume={cut / inside}"])
    assert (found.folder, found.experiment, found.changes) == (cut, "brats_rev", [])
    assert continue_run(found) == 0
    assert losses(cut) == losses(folder)
    result = json.loads((cut / "result.json").read_text())
    assert result["experiment"] == "brats_rev"
    assert result["metrics"] == whole["metrics"]
    assert (cut / "model" / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()


def test_repeating_the_original_overrides_changes_nothing(killed):
    cut, _, _ = killed
    again = ["experiment=brats_rev", "data=phantom", "memory=reversible", "trainer.steps=4", "model.dropout=0.2"]
    assert resumed_run([*again, f"trainer.resume={cut}"]).changes == []


def test_changed_settings_are_printed_and_used(killed, tmp_path, capfd):
    cut, _, _ = killed
    given = ["trainer.steps=5", "memory=stored", f"trainer.resume={cut}", f"hydra.run.dir={tmp_path / 'other'}"]
    found = resumed_run(given)
    assert found.folder == tmp_path / "other"
    assert {"trainer.steps=5 (was 4)", "memory.mode=stored (was reversible)"} <= set(found.changes)
    assert continue_run(found) == 0
    assert "continuing with changed settings: " in capfd.readouterr().err
    assert [step for step, _ in losses(found.folder)] == [3, 4, 5]
    assert OmegaConf.load(found.folder / "config.yaml").memory.mode == "stored"
    assert resumed_run([f"trainer.resume={found.folder}"]).changes == []


def test_changed_settings_of_a_private_run_print_a_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("memsave.run.execute", lambda *args, **kwargs: 0)
    config = compose(["experiment=brats_rev_dp"])
    assert continue_run(ResumedRun(config, tmp_path, "brats_rev_dp", ["trainer.steps=5 (was 4)"])) == 0
    assert "never keep two runs with different settings" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experiment=gpt2_dp", "is a run of experiment=brats_rev; leave experiment=gpt2_dp out"),
        ("trainer.stepz=5", r"trainer\.stepz is not known.*steps"),
        ("trainer.lr=5", r"trainer\.optimizer\.lr"),
        ("trainer.steps=many", r"trainer\.steps: Value 'many'"),
        ("trainer.steps=5,6", "gives several values"),
        ("+trainer.more=1", "adds or deletes a key"),
        ("data=nothing", "data=nothing is not known"),
        ("trainer.steps=0", r"trainer\.steps is 0; it must be at least 1"),
    ],
)
def test_an_invalid_override_is_refused(killed, override, words):
    cut, _, _ = killed
    with pytest.raises(ConfigError, match=words):
        resumed_run([override, f"trainer.resume={cut}"])


def test_other_command_lines_continue_no_run(tmp_path):
    assert resumed_run(["experiment=brats_rev"]) is None
    assert resumed_run(["experiment=brats_rev", "trainer.resume=null"]) is None
    assert resumed_run(["experiment=brats_rev", f"trainer.resume={tmp_path / 'nowhere'}"]) is None


def test_a_run_that_another_process_continues_is_not_changed(killed):
    from memsave.training.run_folder import lock_folder

    cut, _, _ = killed
    before = (cut / "metrics.jsonl").read_bytes()
    with lock_folder(cut):
        assert continue_run(resumed_run([f"trainer.resume={cut}"])) == 2
    assert (cut / "metrics.jsonl").read_bytes() == before


def test_a_refused_continuation_changes_no_file(killed):
    cut, _, _ = killed
    (cut / "result.json").write_text(json.dumps({"status": "interrupted"}))
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    assert continue_run(resumed_run(["trainer.batch_size=1", f"trainer.resume={cut}"])) == 2
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_a_continuation_that_fails_before_a_checkpoint_changes_no_file(uninterrupted, tmp_path, monkeypatch):
    done = tmp_path / "done"
    shutil.copytree(uninterrupted[0], done)
    monkeypatch.setenv("MEMSAVE_CACHE", str(uninterrupted[1]))
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    assert continue_run(resumed_run(["trainer.steps=7", "trainer.optimizer.lr=1e30", f"trainer.resume={done}"])) == 1
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("logged", [False, True])
def test_an_evaluation_that_a_kill_left_out_is_made_up_for(run, monkeypatch, logged):
    made = []

    def evaluate(task, model):
        made.append({"dice": 0.2 if made else 0.3})
        if len(made) == 2 and not logged:
            raise DataError("ends between the checkpoint and the evaluation, like a kill")
        return made[-1]

    monkeypatch.setattr(Segmentation, "evaluate", evaluate)
    monkeypatch.setattr(Segmentation, "summary", lambda self, scores: "")
    monkeypatch.setattr(Segmentation, "show", lambda self, folder: [])
    code, _, folder = run("trainer.steps=4", "trainer.evaluate_every=1", "trainer.patience=1")
    assert code == (0 if logged else 2)
    log = folder / "metrics.jsonl"
    if logged:  # as if killed between the line of the evaluation and the checkpoint with the best score
        shutil.rmtree(folder / "checkpoint")
        (folder / "checkpoint.previous").rename(folder / "checkpoint")
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
        (folder / "result.json").unlink()
    assert continue_run(resumed_run([f"trainer.resume={folder}"])) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]  # the best step is 1, patience is 1
    assert [(line["step"], line["dice"]) for line in lines if "dice" in line] == [(1, 0.3), (2, 0.2), (2, 0.2)]
