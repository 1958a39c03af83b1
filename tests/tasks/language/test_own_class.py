"""model.target: a language model of one's own trains, resumes, and is loaded from what the run released."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from memsave import load
from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.experiment import make_model
from tests.support.commands import run_command
from tests.support.released_texts import tokenizer_of

CODE = """
from transformers import GPT2Config, GPT2LMHeadModel


class OwnConfig(GPT2Config):
    model_type = "{kind}"


class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class NoConfig:
    pass
"""
SMALL = ["trainer.batch_size=4", "trainer.micro_batch_size=4", "profiler.compare=[]", "task.generate=1", "task.beams=1"]


def prepared(tmp_path, monkeypatch, name):
    """A folder with code, a model of it and records; each test has a model type of its own."""
    (tmp_path / f"{name}.py").write_text(CODE.replace("{kind}", name.replace("_", "-")))
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = tokenizer_of()
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=200, n_embd=16, n_layer=2, n_head=2, **ends)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    found = json.loads((tmp_path / "mine" / "config.json").read_text())
    found |= {"model_type": name.replace("_", "-"), "architectures": ["OwnModel"]}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(found))
    return tmp_path


def test_a_language_model_of_ones_own(tmp_path, monkeypatch):
    folder = prepared(tmp_path, monkeypatch, "own_language_one")
    model = ["model=gpt2", "model.name=mine", "model.target=own_language_one.OwnModel"]
    private = ["privacy=ghost", "privacy.accountant=rdp", "privacy.noise_multiplier=1.0"]
    sizes = ["data.records=40", "data.held_out=4", "data.max_length=60"]
    start = ["experiment=gpt2_dp", *model, *private, *SMALL, *sizes]
    done = run_command(folder, *start, "trainer.steps=2", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    done = run_command(folder, "trainer.resume=run", "trainer.steps=3")
    assert done.returncode == 0, done.stderr
    released = folder / "run" / "model"
    assert json.loads((released / "own_class.json").read_text()) == {"target": "own_language_one.OwnModel"}
    assert type(load(released)).__name__ == "OwnModel"


def test_mistakes_are_named(tmp_path, monkeypatch):
    folder = prepared(tmp_path, monkeypatch, "own_language_two")
    monkeypatch.chdir(folder)
    for target, words in {
        "own_language_two.Missing": "cannot be imported",
        "own_language_two.NoConfig": "is no class derived from",
        "torch.nn.Linear": "is no class derived from",
    }.items():
        config = to_objects(compose(["experiment=gpt2_dp", "model=gpt2", "model.name=mine", f"model.target={target}"]))
        with pytest.raises(ConfigError, match=words):
            make_model(config)
