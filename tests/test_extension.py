"""The package of docs/extending.md, installed outside of memsave: its data set, model and task run like our own."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.commands import run_command

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
RDP = ["privacy.accountant=rdp"]  # the exact accountant takes seconds


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the package and its metadata, as pip would write them."""
    folder = tmp_path_factory.mktemp("site-packages")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (entry,) = re.findall(r"```toml\n\[project\.entry-points\.\"(.*?)\"\]\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "memsave_points.py").write_text(code)
    info = folder / "memsave_points-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memsave-points\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1].replace(chr(34), '')}")
    return folder


def memsave(installed, *arguments, module="memsave.run", cwd):
    return run_command(cwd, *arguments, module=module, PYTHONPATH=str(installed))


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def trained_points(installed, tmp_path_factory):
    """The folder of a run of experiment=points; tests do not change it."""
    folder = tmp_path_factory.mktemp("points")
    done = memsave(installed, "experiment=points", "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Held-out mean squared error" in done.stderr + done.stdout
    return folder / "run"


def test_a_task_from_outside_trains_resumes_and_is_planned(installed, trained_points, tmp_path):
    result = result_in(trained_points)
    assert result["status"] == "ok" and result["metrics"]["mse"] < 0.1 and result["data"]["examples"] == 256
    assert (trained_points / "model" / "model.pt").is_file()
    shutil.copytree(trained_points, tmp_path / "run")
    more = memsave(installed, "trainer.resume=run", "trainer.steps=110", cwd=tmp_path)
    assert more.returncode == 0 and "continuing after step 100 of 110" in more.stderr + more.stdout
    planned = memsave(
        installed, "experiment=points", "mode=plan", "vary=batch", "budget=1MiB", "hydra.run.dir=plan", cwd=tmp_path
    )
    assert planned.returncode == 0, planned.stderr
    rows = result_in(tmp_path / "plan")["plan"]["rows"]
    assert [row["strategy"] for row in rows] == ["plain", "per-example gradients", "ghost"]


@pytest.mark.slow
def test_a_task_from_outside_trains_privately(installed, tmp_path):
    arguments = ["experiment=points", "privacy=ghost", *RDP, "trainer.steps=20", "hydra.run.dir=run"]
    done = memsave(installed, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 < result_in(tmp_path / "run")["privacy"]["epsilon"] <= 8.0


MISTAKES = {
    "data.count=1": "data.count is 1; it must be at least 2",
    "data.cuont=9": "did you mean count?",
    "data=phantom": "task=regression is not compatible with data=phantom; give data=points, and model=line",
    "data=point": "did you mean points?",
    "vary=volume": "vary=volume is not valid for task=regression; give vary=batch",
}
ANSWERS = """
import sys
from memsave.config import ConfigError
from memsave.run import check_overrides

for mistake in sys.argv[1:]:
    try:
        check_overrides(["experiment=points", mistake])
        print("no mistake")
    except ConfigError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def answers(installed, tmp_path_factory):
    """The error of each mistake; one process, because its imports take seconds."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "ask.py").write_text(ANSWERS)
    done = memsave(installed, *MISTAKES, module="ask", cwd=folder)
    return dict(zip(MISTAKES, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_its_options_are_answered_like_those_in_our_own(answers, mistake):
    assert MISTAKES[mistake] in answers[mistake]


def test_the_command_refuses_a_mistake_in_its_options(installed, tmp_path):
    done = memsave(installed, "experiment=points", "data.count=1", cwd=tmp_path)
    assert done.returncode == 2 and MISTAKES["data.count=1"] in done.stderr


def test_its_options_are_listed(installed, tmp_path):
    done = memsave(installed, module="memsave.config", cwd=tmp_path)
    assert "### `data=points`" in done.stdout and "`model.bias`" in done.stdout


def test_an_extension_that_cannot_be_imported_is_named(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[memsave.components]\nbroken = nowhere_to_be_found\n")
    done = memsave(tmp_path, "experiment=brats_rev", cwd=tmp_path)
    assert done.returncode == 2
    assert "the package broken extends memsave by nowhere_to_be_found, which cannot be imported" in done.stderr


@pytest.mark.slow
def test_an_adapter_from_outside_decides_which_parameters_train(installed, trained_points, tmp_path):
    arguments = ["experiment=points", "adapter=only_bias", "privacy=ghost", *RDP, "trainer.steps=5"]
    done = memsave(installed, *arguments, "hydra.run.dir=biases", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, adapted = (torch.load(run / "model" / "model.pt") for run in (trained_points, tmp_path / "biases"))
    again = memsave(installed, "trainer.resume=biases", "trainer.steps=6", "privacy.noise_multiplier=9", cwd=tmp_path)
    assert not torch.equal(adapted["weight"], whole["weight"])  # training without the adapter changes the weight
    torch.manual_seed(0)
    assert torch.equal(adapted["weight"], torch.nn.Linear(8, 1).weight)  # with it, the weight stays at its start
    assert adapted["bias"] != torch.zeros(1) and again.returncode == 2  # another noise is another mechanism
