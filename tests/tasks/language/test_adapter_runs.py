"""Runs with adapters: training with and without privacy, the released model, and resuming."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("opacus")

from safetensors.torch import load_file

import memsave
from memsave.config.compose import compose, to_objects
from memsave.experiment import make_model
from memsave.planning.fit import plan_experiment
from memsave.progress import Progress
from memsave.resume import resumed_run
from memsave.run import continue_run, execute
from tests.support.tiny_configs import TINY_GPT2_DP

QUICK = [
    *TINY_GPT2_DP,
    "profiler.compare=[]",
    "trainer.evaluate_first=false",
    "task.generate=1",
    "task.beams=1",
    "data.max_length=40",
    "data.held_out=2",
    "trainer.steps=2",
    "trainer.optimizer.lr=0.05",
]
PRIVATE = ["privacy.noise_multiplier=1", "privacy.accountant=rdp", "privacy.seed=1"]
PLAIN = ["privacy=none"]
RUNS = {
    "lora": ["adapter=lora", "adapter.dropout=0.2"],
    "lora, checkpoint": ["adapter=lora", "memory=checkpoint", "model.head=logits"],
    "lora, reversible": ["adapter=lora", "model=rev_gpt2", "memory=reversible"],
    "lora, merged": ["adapter=lora", "adapter.merge=true"],
    "dora": ["adapter=dora"],
    "ia3": ["adapter=ia3"],
    "prefix": ["adapter=prefix", "adapter.tokens=3", "adapter.projection=true"],
    "prompt": ["adapter=prompt", "adapter.tokens=3"],
    "bitfit": ["adapter=bitfit"],
    "attention": ["adapter=attention"],
    "frozen": ["adapter=frozen", "adapter.parts=[embeddings,head]"],
    "random": ["model.random=true"],
}
WHOLE = {"lora, merged", "bitfit", "attention", "frozen", "random"}
SLOW = {"lora, checkpoint", "lora, merged", "dora", "ia3", "prompt", "attention", "bitfit", "random"}
"""Runs by hand: what they add to the others is tested without a run in test_adapters.py."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The folder of the pretrained models of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSAVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(folder, overrides):
    """(the config, the result) of a run that succeeds."""
    config = compose([*QUICK, *overrides])
    folder.mkdir(parents=True)
    code = execute(config, folder, experiment="gpt2_dp")
    assert code == 0, (folder / "result.json").read_text()
    return to_objects(config), json.loads((folder / "result.json").read_text())


def at_start(config):
    """The model of the config before its first step."""
    torch.manual_seed(config.trainer.seed)
    return make_model(config)[0]


@pytest.mark.parametrize(
    ("name", "privacy"),
    [
        *(pytest.param(name, PRIVATE, marks=[pytest.mark.slow] if name in SLOW else []) for name in RUNS),
        *(pytest.param(name, PLAIN, marks=pytest.mark.slow) for name in ("lora, checkpoint", "prefix", "bitfit")),
    ],
)
def test_a_run_changes_only_what_trains_and_releases_it(name, privacy, cache, tmp_path):
    config, result = run(tmp_path / "run", [*RUNS[name], *privacy])
    before = at_start(config)
    trained = {key: p for key, p in before.named_parameters() if p.requires_grad}
    after = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert set(after) == set(trained)
    moved = [key for key, parameter in trained.items() if not torch.equal(parameter, after[key])]
    assert len(moved) > len(trained) / 2
    assert result["metrics"]["loss"] > 0 and (result["privacy"] is None) == (privacy is PLAIN)
    model = tmp_path / "run" / "model"
    assert (model / "adapter_config.json").exists() == (name not in WHOLE)
    assert (model / "prompt.json").exists() and (model / "tokenizer.json").exists()
    before.load_state_dict(after, strict=False)
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        expected, loaded = before.eval()(input_ids=ids).logits, memsave.load(model)(input_ids=ids).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(each, marks=pytest.mark.slow) for each in ("prefix", "frozen"))]
)
def test_a_resumed_private_run_equals_an_uninterrupted_one(name, cache, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, result = run(whole, [*RUNS[name], *PRIVATE, "trainer.steps=4", "trainer.checkpoint_every=2"])
    shutil.copytree(whole, cut)
    for part in ("model", "checkpoint"):
        shutil.rmtree(cut / part)
    (cut / "checkpoint.previous").rename(cut / "checkpoint")
    assert continue_run(resumed_run([f"trainer.resume={cut}"])) == 0
    assert json.loads((cut / "result.json").read_text())["metrics"] == result["metrics"]
    released = "model.safetensors" if name in WHOLE else "adapter_model.safetensors"
    for file in (f"model/{released}", "checkpoint/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_run_is_not_continued_with_another_base_model(cache, tmp_path, capsys):
    run(tmp_path / "run", [*RUNS["lora"], *PLAIN])
    continued = ["trainer.steps=5", "model.lr=0.001", f"trainer.resume={tmp_path / 'run'}"]
    assert continue_run(resumed_run(continued)) == 2
    assert "is of a model with other frozen weights; continue with the same base model" in capsys.readouterr().err


def test_virtual_tokens_need_positions(cache, tmp_path, capsys):
    config = compose([*QUICK, "adapter=prompt", "adapter.tokens=180"])
    (tmp_path / "run").mkdir()
    assert execute(config, tmp_path / "run", experiment="gpt2_dp") == 2
    words = "data.max_length is 40, but the model has 200 positions, of which adapter.tokens takes 180; give data"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "prefix", "prompt"))]
)
def test_a_plan_has_the_adapter(name, cache, tmp_path):
    config = to_objects(compose([*QUICK, *RUNS[name], "mode=plan", "budget=64MiB"]))
    plan_experiment(config, tmp_path, torch.device("cpu"), strategies=["ghost"], progress=Progress())
    assert (tmp_path / "plan.md").exists()
