"""Checkpoints are complete, and a resumed run equals an uninterrupted one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from memsave import files
from memsave.config.schema import OptimizerConfig
from memsave.privacy import Mechanism, PrivateGradients
from memsave.training import checkpoint
from memsave.training.loop import make_state, run_steps
from tests.support.linear_task import Lines, line_model, trainer

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, name):
    config = trainer(optimizer=OptimizerConfig(name=name, lr=0.05, warmup_steps=2))
    torch.manual_seed(3)
    state = make_state(line_model(), config)
    losses = []
    for done in run_steps(state, Lines(), config):
        losses.append(done.loss)
        if done.step == 3:
            checkpoint.save(state, tmp_path / "checkpoint")
    torch.manual_seed(99)  # dropout needs the random state of the checkpoint
    resumed = make_state(line_model(), config)
    checkpoint.load(resumed, tmp_path / "checkpoint")
    assert resumed.step == 3
    assert [done.loss for done in run_steps(resumed, Lines(), config)] == losses[3:]
    for ours, theirs in zip(resumed.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def saved(tmp_path):
    state = make_state(line_model(), trainer())
    next(run_steps(state, Lines(), trainer()))
    checkpoint.save(state, tmp_path / "checkpoint")
    return state, tmp_path / "checkpoint"


def test_saving_replaces_and_keeps_the_previous_one(tmp_path):
    state, folder = saved(tmp_path)
    for step in (2, 3):
        state.step = step
        checkpoint.save(state, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint.previous"]
    for name, step in (("checkpoint", 3), ("checkpoint.previous", 2)):
        other = make_state(line_model(), trainer())
        checkpoint.load(other, tmp_path / name)
        assert other.step == step
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_last_checkpoint_survives_a_kill_while_writing(tmp_path, monkeypatch):
    state, folder = saved(tmp_path)
    monkeypatch.setattr(files, "flush", lambda path: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError):
        checkpoint.save(state, folder)
    checkpoint.load(make_state(line_model(), trainer()), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]  # the partial checkpoint was deleted


def test_the_previous_checkpoint_is_found_after_a_kill_between_the_renames(tmp_path):
    _, folder = saved(tmp_path)
    folder.rename(folder.with_name("checkpoint.previous"))
    state = make_state(line_model(), trainer())
    checkpoint.load(state, folder)
    assert state.step == 1


def test_the_previous_checkpoint_survives_two_kills(tmp_path, monkeypatch):
    state, folder = saved(tmp_path)
    folder.rename(folder.with_name("checkpoint.previous"))
    monkeypatch.setattr(files, "flush", lambda path: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError):
        checkpoint.save(state, folder)
    checkpoint.load(make_state(line_model(), trainer()), folder)


def test_the_learning_rate_follows_this_runs_settings(tmp_path):
    _, folder = saved(tmp_path)
    config = trainer(optimizer=OptimizerConfig(lr=0.5, warmup_steps=0, schedule="constant"))
    state = make_state(line_model(), config)
    checkpoint.load(state, folder)
    assert state.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_one_flipped_bit_in_the_numbers_is_found(tmp_path, name):
    """Weights, moments and the state of the generators have no structure that would show it."""
    _, folder = saved(tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} is damaged: its CRC-32"):
        checkpoint.load(make_state(line_model(), trainer()), folder)


@pytest.mark.parametrize(
    "entries", [{"best": "high"}, {"numbers": []}, {"identity": 1}, {"processes": 1}, {"best": [[], 1]}, {"step": None}]
)
def test_a_state_of_another_type_is_refused(tmp_path, entries):
    state, folder = saved(tmp_path)
    state.identity = {"trainer.seed": 0}
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(state, folder)


@pytest.mark.parametrize("entries", [{"steps": []}, {"steps": "1"}, {"seeded": 0}, {"clipped": None}])
def test_a_private_state_of_another_type_is_refused(tmp_path, entries):
    pytest.importorskip("opacus")
    model = line_model()
    private = PrivateGradients(model, Mechanism(48, 6, 1.0, 0.5, delta=1e-3, accountant="rdp"), seed=0)
    state = make_state(model, trainer(), private=private)
    checkpoint.save(state, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "state.json"
    content = json.loads(path.read_text())
    content["private"].update(entries)
    path.write_text(json.dumps(content))
    with pytest.raises(checkpoint.CheckpointError, match=f"{next(iter(entries))} is "):
        checkpoint.load(state, tmp_path / "checkpoint")


def test_a_checkpoint_of_an_older_version_has_no_checksums(tmp_path):
    _, folder = saved(tmp_path)
    content = json.loads((folder / "state.json").read_text())
    del content["checksums"]
    (folder / "state.json").write_text(json.dumps(content))
    other = make_state(line_model(), trainer())
    checkpoint.load(other, folder)
    assert other.step == 1


def test_checkpoints_that_cannot_be_continued_are_refused(tmp_path):
    _, folder = saved(tmp_path)
    state = make_state(torch.nn.Linear(2, 2), trainer())
    with pytest.raises(checkpoint.CheckpointError, match="is of another model"):
        checkpoint.load(state, folder)
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(state, tmp_path / "nothing")
    config = trainer(optimizer=OptimizerConfig(name="sgd"))
    with pytest.raises(checkpoint.CheckpointError, match="is of the optimizer AdamW, not SGD"):
        checkpoint.load(make_state(line_model(), config), folder)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 1', '"step": "one"'))
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(state, folder)
    (folder / "state.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be read .*; continue from another"):
        checkpoint.load(state, folder)
    (folder / "state.json").write_text("[" * 10**5)
    with pytest.raises(checkpoint.CheckpointError, match="it is nested too deeply"):
        checkpoint.load(state, folder)
    shutil.copytree(folder, folder.with_name("checkpoint.previous"))
    with pytest.raises(checkpoint.CheckpointError, match=r"; continue from the previous one, .*checkpoint\.previous"):
        checkpoint.load(state, folder)


def frozen_state():
    """A state whose first parameter is frozen."""
    state = make_state(line_model(), trainer())
    next(state.model.parameters()).requires_grad_(False)
    state.frozen = checkpoint.digest_of_frozen(state.model)
    return state


def test_frozen_parameters_are_not_saved_but_compared(tmp_path):
    torch.manual_seed(0)
    state = frozen_state()
    (name, frozen), *_ = state.model.named_parameters()
    checkpoint.save(state, tmp_path / "checkpoint")
    held = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert name not in held and set(held) < set(state.model.state_dict())
    torch.manual_seed(0)
    same = frozen_state()
    checkpoint.load(same, tmp_path / "checkpoint")
    assert same.frozen == state.frozen is not None
    with torch.no_grad():
        frozen += 1e-3
    state.frozen = checkpoint.digest_of_frozen(state.model)
    with pytest.raises(checkpoint.CheckpointError, match="of a model with other frozen weights; continue with"):
        checkpoint.load(state, tmp_path / "checkpoint")


def test_the_digest_is_of_the_frozen_parameters_that_are_used():
    model = line_model()
    assert checkpoint.digest_of_frozen(model) is None
    model.original_module = torch.nn.Linear(2, 2, dtype=torch.bfloat16).requires_grad_(False)
    wrapper = torch.nn.ModuleDict({"head": model})
    assert checkpoint.digest_of_frozen(wrapper) is None  # PEFT uses the copy that it trains
    model.other = torch.nn.Linear(2, 2, dtype=torch.bfloat16).requires_grad_(False)
    digest = checkpoint.digest_of_frozen(wrapper)
    assert digest == checkpoint.digest_of_frozen(wrapper) is not None
    with torch.no_grad():
        model.other.bias[0] += 1
    assert checkpoint.digest_of_frozen(wrapper) != digest
