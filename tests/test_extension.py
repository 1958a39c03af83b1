"""The package of docs/extending.md, installed outside of memsave: its data set, model and task run like our own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


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
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), root, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_task_from_outside_trains_resumes_and_is_planned(installed, tmp_path):
    done = memsave(installed, "experiment=points", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Held-out mean squared error" in done.stderr + done.stdout
    result = result_in(tmp_path / "run")
    assert result["status"] == "ok" and result["metrics"]["mse"] < 0.1 and result["data"]["examples"] == 256
    assert (tmp_path / "run" / "model" / "model.pt").is_file()
    more = memsave(installed, "trainer.resume=run", "trainer.steps=110", cwd=tmp_path)
    assert more.returncode == 0 and "continuing after step 100 of 110" in more.stderr + more.stdout
    planned = memsave(
        installed, "experiment=points", "mode=plan", "vary=batch", "budget=1MiB", "hydra.run.dir=plan", cwd=tmp_path
    )
    assert planned.returncode == 0, planned.stderr
    rows = result_in(tmp_path / "plan")["plan"]["rows"]
    assert [row["strategy"] for row in rows] == ["plain", "per-example gradients", "ghost"]


def test_a_task_from_outside_trains_privately(installed, tmp_path):
    done = memsave(
        installed, "experiment=points", "privacy=ghost", "trainer.steps=20", "hydra.run.dir=run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert 0 < result_in(tmp_path / "run")["privacy"]["epsilon"] <= 8.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.count=1"], "data.count is 1; it must be at least 2"),
        (["data.cuont=9"], "did you mean count?"),
        (["data=phantom"], "task=regression is not compatible with data=phantom; give data=points, and model=line"),
        (["data=point"], "did you mean points?"),
        (["vary=volume", "budget=1GiB"], "vary=volume is not valid for task=regression; give vary=batch"),
    ],
)
def test_mistakes_in_its_options_are_answered_like_those_in_our_own(installed, tmp_path, overrides, words):
    done = memsave(installed, "experiment=points", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


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


def test_an_adapter_from_outside_decides_which_parameters_train(installed, tmp_path):
    first = memsave(installed, "experiment=points", "trainer.steps=1", "hydra.run.dir=first", cwd=tmp_path)
    arguments = ["experiment=points", "adapter=only_bias", "privacy=ghost", "trainer.steps=5", "hydra.run.dir=biases"]
    done = memsave(installed, *arguments, cwd=tmp_path)
    assert first.returncode == done.returncode == 0, done.stderr
    start, adapted = (torch.load(tmp_path / name / "model" / "model.pt") for name in ("first", "biases"))
    again = memsave(installed, "trainer.resume=biases", "trainer.steps=6", "privacy.noise_multiplier=9", cwd=tmp_path)
    assert not torch.equal(adapted["weight"], start["weight"])  # training without the adapter changes the weight
    torch.manual_seed(0)
    assert torch.equal(adapted["weight"], torch.nn.Linear(8, 1).weight)  # with it, the weight stays at its start
    assert adapted["bias"] != torch.zeros(1) and again.returncode == 2  # another noise is another mechanism
