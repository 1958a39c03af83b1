"""Runs of several processes: the results of one process, written by rank 0 alone, and one sentence for each fault."""

import errno
import io
import json
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from tests.support.processes import run_processes
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET

UNET = [*TINY_UNET, "trainer.batch_size=3", "trainer.steps=4", "trainer.checkpoint_every=2", "profiler.compare=[]"]
PRIVATE = [
    "trainer.steps=3",
    "privacy.seed=3",
    "privacy.noise_multiplier=0",
    "trainer.optimizer.schedule=constant",
    "profiler.compare=[stored]",
]
TEXT = [*TINY_GPT2_DP, *PRIVATE, "trainer.checkpoint_every=2", "profiler.compare=[stored]"]

SHORT = ["profiler.compare=[]", "trainer.evaluate_first=false", "task.generate=1", "task.beams=1"]


def command(folder, arguments, fault=None):
    """(exit code, what was said) of `python -m memsave.run` in this process, as torchrun starts it."""
    os.chdir(folder)
    os.environ["MEMSAVE_CACHE"] = str(folder / "cache")
    from memsave import run

    if fault is not None:
        fault()
    sys.argv = ["memsave.run", *arguments]
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        try:
            run.main()
        except SystemExit as end:
            return end.code, said.getvalue()


def run(count, folder, *arguments, fault=None):
    """[(exit code, what was said)] of each rank."""
    return run_processes(count, command, folder, [*arguments, "hydra.run.dir=run"], fault, group=False)


def model_of(folder):
    """All weights that a run released."""
    from safetensors.torch import load_file

    found = load_file(folder / "model" / "model.safetensors")
    return torch.cat([found[name].flatten().double() for name in sorted(found)]).numpy()


def result(folder):
    """(result.json, the losses) of the run."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return json.loads((folder / "run" / "result.json").read_text()), [each["loss"] for each in lines if "lr" in each]


class Alone:
    """Results of one process, each measured when it is first asked for; `folder`'s cache has the data and the model."""

    def __init__(self, folder):
        self.folder, self._found = folder, {}

    def __getitem__(self, name):
        """(result.json, the losses) of an experiment; its files are in folder / name."""
        if name not in self._found:
            ((code, said),) = run(1, self.folder, *(UNET if name == "unet" else TEXT))
            assert code == 0, said
            self._found[name] = result(self.folder)
            (self.folder / "run").rename(self.folder / name)
        return self._found[name]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "cache").mkdir()
    return Alone(folder)


@pytest.fixture
def folder(alone, tmp_path):
    """A folder with the cache of `alone`, without its ledger."""
    (tmp_path / "cache").symlink_to(alone.folder / "cache")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "count", "parallel"),
    [
        ("unet", 2, "ddp"),
        pytest.param("unet", 3, "fsdp", marks=pytest.mark.slow),
        pytest.param("text", 3, "ddp", marks=pytest.mark.slow),
        pytest.param("text", 2, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_losses_and_scores_are_those_of_one_process(alone, folder, name, count, parallel):
    if (name, parallel) == ("text", "fsdp"):  # with an empty cache: one process pretrains the small model
        (folder / "cache").unlink()
    ranks = run(count, folder, *(UNET if name == "unet" else TEXT), f"trainer.parallel={parallel}")
    assert [code for code, _ in ranks] == [0] * count, ranks
    assert [said for _, said in ranks[1:]] == [""] * (count - 1)  # only rank 0 speaks
    found, losses = result(folder)
    expected, own_losses = alone[name]
    assert losses == pytest.approx(own_losses, rel=1e-5)
    assert found["processes"] == count and "processes" not in expected
    for key, score in expected["metrics"].items():
        assert found["metrics"][key] == pytest.approx(score, rel=1e-3), key
    assert len(found["memory"]["peak_bytes_by_process"]) == count
    assert {path.name for path in (folder / "run").iterdir()} == {path.name for path in (alone.folder / name).iterdir()}
    assert (folder / "run/checkpoint/shards").exists() == (parallel == "fsdp")
    assert model_of(folder / "run") == pytest.approx(model_of(alone.folder / name), abs=1e-5)
    if name == "text":
        assert found["privacy"]["epsilon"] == expected["privacy"]["epsilon"]
        assert found["privacy"]["clipped_fraction"] == expected["privacy"]["clipped_fraction"]
        assert found["privacy"]["processes"] == [count] and expected["privacy"]["processes"] == [1]


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(alone, folder):
    """Two processes with a sharded model, then three, then one with the whole model, then two with whole models."""
    steps = {1: (2, "fsdp"), 2: (3, "fsdp"), 3: (1, "ddp")}
    for step, (count, parallel) in steps.items():
        start = [*TEXT, *SHORT] if step == 1 else ["trainer.resume=run"]
        ranks = run(count, folder, *start, f"trainer.steps={step}", f"trainer.parallel={parallel}")
        assert ranks[0][0] == 0, ranks
    found, losses = result(folder)
    assert losses == pytest.approx(alone["text"][1], rel=1e-5)
    assert found["privacy"]["processes"] == [2, 3, 1]
    text = (folder / "run" / "privacy.md").read_text()
    assert "No privacy" in text  # it has a seed


@pytest.mark.slow
def test_a_damaged_part_of_a_checkpoint_is_refused(folder):
    assert run(2, folder, *UNET, "trainer.parallel=fsdp")[0][0] == 0
    part = folder / "run" / "checkpoint" / "shards" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:100])
    ((code, said),) = run(1, folder, "trainer.resume=run", "trainer.steps=6")
    assert code == 2 and "cannot be read" in said and "checkpoint.previous" in said, said
    assert run(1, folder, "trainer.resume=run/checkpoint.previous", "trainer.steps=6")[0][0] == 0


def bad_data():
    """Process 1 alone cannot read a case of the third step."""
    from memsave.data import DataError
    from memsave.tasks.segmentation.task import Segmentation

    if os.environ["RANK"] != "1":
        return
    load = Segmentation.load

    def fail(self, indices):
        if any(each.draw >= 6 for each in indices):
            raise DataError("Case 7 cannot be read: copy it again.")
        return load(self, indices)

    Segmentation.load = fail


def fails():
    """Process 1 alone fails within a step."""
    from memsave.training import loop

    if os.environ["RANK"] == "1":
        loop.micro_batch_losses = lambda *args, **options: 1 / 0


def killed():
    """Process 1 is killed in the second step."""
    from memsave import experiment

    reasons, calls = experiment._reasons_to_stop, []

    def kill(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return reasons(*args)

    if os.environ["RANK"] == "1":
        experiment._reasons_to_stop = kill


def terminated():
    """Process 1 alone gets SIGTERM in the first step."""
    from memsave import experiment

    logged = experiment._logged
    if os.environ["RANK"] == "1":
        experiment._logged = lambda done: (os.kill(os.getpid(), signal.SIGTERM), logged(done))[1]


def full_disk():
    """Rank 0 cannot write its second checkpoint."""
    from memsave import files
    from memsave.training import checkpoint

    start = files.start_draft

    def fail(folder):
        if folder.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return start(folder)

    files.start_draft = checkpoint.start_draft = fail


FAULTS = {  # fault: (exit code, sentence, step of the checkpoint)
    bad_data: (2, "Case 7 cannot be read: copy it again. Then continue with trainer.resume=", 2),
    fails: (1, "ZeroDivisionError: division by zero (traceback: ", None),
    terminated: (130, "interrupted; continue with trainer.resume=", 1),
    full_disk: (1, "cannot be written (No space left on device)", 2),
}


@pytest.mark.parametrize(
    ("fault", "parallel"),
    [*((fault, "ddp") for fault in FAULTS if fault is not full_disk), (full_disk, "fsdp")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_of_any_process_ends_all_with_one_sentence(folder, fault, parallel):
    code, sentence, step = FAULTS[fault]
    ranks = run(2, folder, *UNET, f"trainer.parallel={parallel}", fault=fault)
    assert ranks[0][0] == code and ranks[1][0] != 0, ranks
    assert ranks[0][1].count(sentence) == 1 and not ranks[1][1], ranks
    status = json.loads((folder / "run" / "result.json").read_text())["status"]
    assert status == ("interrupted" if code == 130 else "failed")
    if step is not None:
        assert json.loads((folder / "run/checkpoint/state.json").read_text())["step"] == step
    if fault is fails:
        text = (folder / "run/error.txt").read_text()
        assert "in process 1" in text and "micro_batch_losses" in text


def test_a_killed_process_ends_the_others(folder):
    with pytest.raises(AssertionError, match=r"rank 1:\nended with exit code -9") as error:
        run(2, folder, *UNET, "trainer.checkpoint_every=1", fault=killed)
    assert "rank 0" not in str(error.value)
    found, _ = result(folder)
    assert found["status"] == "failed" and "another process of this run ended" in found["error"]
    assert "trainer.resume=" in found["error"]


def test_a_process_that_fails_while_others_wait_for_it_ends_them(folder):
    """Rank 0 waits for parameters of the other process, so that a thread of it must report the error."""
    with pytest.raises(AssertionError, match=r"rank 0:\nended with exit code 1") as error:
        run(2, folder, *UNET, "trainer.parallel=fsdp", fault=fails)
    assert "rank 1" not in str(error.value)  # it ended in order, after rank 0 had reported its error
    found = json.loads((folder / "run" / "result.json").read_text())
    assert found["status"] == "failed" and "ZeroDivisionError: division by zero" in found["error"]
    assert "in process 1" in (folder / "run" / "error.txt").read_text()


def other_command(folder):
    return command(folder, [*UNET, f"trainer.seed={os.environ['RANK']}"])


def other_data():
    """Process 1 sees other data."""
    from memsave.tasks.segmentation.task import Segmentation

    if os.environ["RANK"] == "1":
        Segmentation.fingerprint = "other"


def test_processes_that_disagree_are_refused(folder):
    ranks = run_processes(2, other_command, folder, group=False)
    assert [code for code, _ in ranks] == [2, 2] and not ranks[1][1]
    assert "the processes disagree about the command: process 1 differs from process 0" in ranks[0][1]
    assert not (folder / "outputs").exists()
    ranks = run(2, folder, *UNET, fault=other_data)
    assert ranks[0][0] == 2 and "disagree about the training data" in ranks[0][1]


def test_a_sweep_under_torchrun_is_refused(folder):
    ranks = run_processes(2, command, folder, ["-m", *UNET, "trainer.seed=1,2"], None, group=False)
    assert [code for code, _ in ranks] == [2, 2]
    assert "leave torchrun out and give trainer.processes=2" in ranks[0][1]


def test_processes_have_dropout_of_their_own():
    first, second = run_processes(2, drawn_after_start)
    assert first[0] == second[0] and first[1] != second[1]


def drawn_after_start():
    """(the first weight, a random number) after the start of a run; the processes begin with different weights."""
    from types import SimpleNamespace

    from memsave.processes import process_rank
    from memsave.training.distributed import start_alike

    torch.manual_seed(process_rank())
    model = torch.nn.Linear(2, 2)
    torch.manual_seed(0)
    start_alike(model, SimpleNamespace(fingerprint="same"), seed=0)
    return model.weight[0, 0].item(), torch.rand(1).item()


def loaded_shares():
    """The examples that this process loads in each of five steps of a plain run."""
    from types import SimpleNamespace

    from memsave.training.loop import batches_of

    seen = []
    task = SimpleNamespace(
        size=7, load=lambda indices: seen.append([each.example for each in indices]), place=lambda batch: batch
    )
    state = SimpleNamespace(private=None, model=torch.nn.Linear(1, 1), step=0)
    config = SimpleNamespace(batch_size=3, seed=0, steps=5)
    assert len(list(batches_of(state, task, config))) == 5
    return seen


def test_each_example_of_a_batch_is_in_one_process():
    whole = loaded_shares()
    first, second = run_processes(2, loaded_shares)
    assert [a + b for a, b in zip(first, second)] == [[one, three, two] for one, two, three in whole]


@pytest.mark.slow
def test_a_trial_of_one_process_alone_is_repeated_by_all(folder):
    """There is one batch of held-out texts, so that only rank 0 evaluates before it trains a sharded model."""
    from tests.support.tiny_configs import TINY_ROBERTA

    ranks = run(2, folder, "experiment=roberta_dp", *TINY_ROBERTA, "trainer.parallel=fsdp")
    assert [code for code, _ in ranks] == [0, 0], ranks
