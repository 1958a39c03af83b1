"""model=custom: a network from the working folder trains, is planned, resumed, loaded and predicts like our own."""

import json

import pytest
import torch

pytest.importorskip("monai")

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.experiment import make_model
from tests.support.commands import run_command
from tests.support.tiny_configs import TINY_UNET

CODE = '''
import torch
from torch import nn

from memsave.reversible import AdditiveCoupling, ReversibleSequence


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(width, width, 3, padding=1), nn.GroupNorm(1, width)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """A network without memory modes."""

    def __init__(self, in_channels, out_channels, width=4, depth=2):
        super().__init__()
        self.stem = nn.Conv3d(in_channels, width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Conv3d(width, out_channels, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Reversible(Net):
    """Its blocks are the branches of a reversible sequence."""

    def __init__(self, regions, modalities=4, width=4):
        super().__init__(modalities, regions, width=width, depth=0)
        half = width // 2
        couplings = [AdditiveCoupling(Block(half), Block(half)) for _ in range(2)]
        self.blocks = nn.ModuleList([ReversibleSequence(couplings)])


def function():
    pass
'''
PLAIN = ["model=custom", "model.target=own_networks.Net", "model.arguments={width:6}"]
REVERSIBLE = [
    "model=custom",
    "model.target=own_networks.Reversible",
    "model.inputs=modalities",
    "model.outputs=regions",
]
TINY = [each for each in TINY_UNET if not each.startswith(("model.", "memory."))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(folder, *overrides, code=0, module="memsave.run"):
    done = run_command(folder, *overrides, module=module)
    assert done.returncode == code, done.stderr
    return done.stderr


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_network_of_the_working_folder_in_every_command(folder):
    start = [*TINY, *PLAIN, "memory=stored", "trainer.steps=2", "data.root=cases", "hydra.run.dir=run"]
    run(folder, *start, "model.checkpoint=[blocks.0,blocks.1]")
    found = result(folder / "run")
    compared = found["memory"]["compared"]
    assert found["status"] == "ok" and set(compared) == {"stored", "checkpoint"}
    assert compared["checkpoint"]["peak_bytes"] < compared["stored"]["peak_bytes"]
    assert compared["checkpoint"]["loss"] == compared["stored"]["loss"]
    run(folder, "trainer.resume=run", "trainer.steps=3")
    assert result(folder / "run")["status"] == "ok"
    (cases,) = (path for path in (folder / "cases").iterdir() if path.is_dir())
    run(folder, "checkpoint=run", f"input={cases}", "output=masks", "device=cpu", module="memsave.predict")
    assert len(list((folder / "masks").iterdir())) == 4
    saved = json.loads((folder / "run" / "model" / "config.json").read_text())["model"]
    assert saved == {"target": "own_networks.Net", "arguments": {"in_channels": 4, "out_channels": 3, "width": 6}}
    plan = [*TINY, *PLAIN, "memory=stored", "data.root=cases", "mode=plan", "vary=volume", "budget=100MiB"]
    run(folder, *plan, "hydra.run.dir=plan")
    assert [row["strategy"] for row in result(folder / "plan")["plan"]["rows"]] == ["stored"]


def test_one_with_reversible_sequences_follows_memory(folder):
    start = [*TINY, *REVERSIBLE, "memory=reversible", "trainer.steps=2", "hydra.run.dir=run"]
    run(folder, *start)
    assert set(result(folder / "run")["memory"]["compared"]) == {"stored", "reversible"}


def test_private_training_of_a_network_of_ones_own(folder):
    private = ["privacy=ghost", "privacy.accountant=rdp", "profiler.compare=[]", "hydra.run.dir=run"]
    memory = ["memory=checkpoint", "model.checkpoint=[blocks.0,blocks.1]"]
    run(folder, *TINY, *PLAIN, *memory, "trainer.steps=2", *private)
    assert result(folder / "run")["privacy"]["epsilon"] > 0


def made(*overrides):
    return make_model(to_objects(compose([*TINY, *overrides])))[0]


def test_modes_compute_the_same_gradients(folder):
    found = []
    names = ["model.checkpoint=[blocks.0,blocks.1]"]
    for arguments in ([*PLAIN, "memory=stored"], [*PLAIN, "memory=checkpoint", *names]):
        torch.manual_seed(0)
        model = made(*arguments)
        model(torch.ones(1, 4, 8, 8, 8)).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=custom"], "model.target is ''; give PACKAGE.CLASS"),
        (["model=custom", "model.target=own_networks.Missing"], "own_networks.Missing cannot be imported"),
        (
            ["model=custom", "model.target=no_such_package.Net"],
            "(No module named 'no_such_package')",
        ),
        (["model=custom", "model.target=own_networks.function"], "is no class derived from"),
        (["model=custom", "model.target=subprocess.Popen"], "is no class derived from"),
        ([*PLAIN[:2], "model.arguments={wdith:3}"], "unexpected keyword argument 'wdith'"),
        ([*PLAIN, "memory=reversible"], "Net has no memsave.reversible.ReversibleSequence"),
        ([*PLAIN, "memory=checkpoint"], "model.checkpoint=[NAMES] must name modules of Net"),
        (
            [*PLAIN, "memory=checkpoint", "model.checkpoint=[block.0]"],
            "block.0, which is no module of",
        ),
        ([*PLAIN, "memory=auto", "budget=1GiB"], "memory=auto chooses a mode for each level"),
        ([*PLAIN, "vary=depth", "mode=plan", "budget=1GiB"], "vary=depth is not valid"),
    ],
)
def test_mistakes_are_named(folder, overrides, words):
    with pytest.raises(ConfigError) as error:
        made("memory=stored", *overrides)
    assert words in str(error.value)


def test_code_in_a_models_folder_does_not_run(tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text("raise SystemExit('this ran')")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path)  # as if a command was started there
    with pytest.raises(ConfigError, match="which is the folder of a run or of a model"):
        made("memory=stored", "model=custom", "model.target=strange.Net")
