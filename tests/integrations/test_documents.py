"""The scripts of docs/integrations.md run from top to bottom, as a user would copy them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.processes import run_processes

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SCRIPTS = dict(re.findall(r"^<!-- script: (\w+) -->\n```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a small language model and texts."""
    transformers = pytest.importorskip("transformers")
    from tests.support.released_texts import tokenizer_of

    tokenizer = tokenizer_of()
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "my" / "model")
    tokenizer.save_pretrained(tmp_path / "my" / "model")
    (tmp_path / "my" / "texts.txt").write_text("".join(f"My note number {number}.\n" for number in range(70)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def epsilon_after(name, **replaced):
    """The epsilon that the script prints, and its names."""
    printed, names = [], {"__name__": "__main__", "print": lambda *parts: printed.append(" ".join(map(str, parts)))}
    script = SCRIPTS[name]
    for old, new in replaced.values():
        assert old in script
        script = script.replace(old, new)
    exec(compile(script, f"{PAGE.name}: {name}", "exec"), names)
    (epsilon,) = re.findall(r"epsilon (\d+\.\d+)", "\n".join(printed))
    return float(epsilon), names


def test_the_script_of_the_trainer_runs(folder):
    pytest.importorskip("accelerate")
    epsilon, names = epsilon_after("trainer", cpu=('report_to="none",', 'report_to="none", use_cpu=True,'))
    assert 2.9 < epsilon <= 3.0
    assert names["trainer"].state.global_step == names["trainer"].private_gradients.steps == 9
    assert (folder / "private-model" / "model.safetensors").is_file()


def test_the_script_of_lightning_runs(folder):
    pytest.importorskip("lightning")
    epsilon, names = epsilon_after("lightning", cpu=('accelerator="auto"', 'accelerator="cpu"'))
    assert 2.9 < epsilon <= 3.0 and names["model"].private_gradients.steps == 39


def accelerated():
    os.environ["ACCELERATE_USE_CPU"] = "true"
    printed = []
    from accelerate import Accelerator

    Accelerator.print = lambda self, text: printed.append(text)
    names = {}
    exec(compile(SCRIPTS["accelerate"], PAGE.name, "exec"), names)
    weights = torch.cat([p.detach().flatten() for p in names["model"].parameters()])
    return weights, names["private"].examples, names["accelerator"].num_processes, printed


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_script_of_accelerate_runs(count):
    pytest.importorskip("accelerate")
    ranks = run_processes(count, accelerated, group=False)
    for weights, examples, processes, printed in ranks:
        assert torch.equal(weights, ranks[0][0]) and examples == ranks[0][1] and processes == count
        (epsilon,) = re.findall(r"epsilon (\d+\.\d+)", printed[0])
        assert 2.9 < float(epsilon) <= 3.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_scripts_of_trl_run(folder, name):
    pytest.importorskip("trl")
    script = SCRIPTS[name].replace('report_to="none",', 'report_to="none", use_cpu=True,')
    (folder / "script.py").write_text(script)  # TRL pickles functions of the script
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (epsilon,) = re.findall(r"^epsilon (\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert 2.9 < float(epsilon) <= 3.0


def test_the_memory_report_is_what_the_page_shows(folder, capsys):
    pytest.importorskip("monai")
    exec(compile(SCRIPTS["report"], PAGE.name, "exec"), {})
    (shown,) = re.findall(r"^<!-- output: report -->\n```\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert capsys.readouterr().out == shown


def test_the_script_of_reversible_rows_runs(folder, capsys):
    exec(compile(SCRIPTS["reversible"], PAGE.name, "exec"), names := {})
    printed = capsys.readouterr().out
    assert "12 blocks of ViTLayer are reversible" in printed and "as stored" in printed
    assert names["conversion"].verify(pixel_values=names["images"]).ok


def test_the_script_of_the_page_writes_a_page(folder):
    exec(compile(SCRIPTS["page"], PAGE.name, "exec"), {})
    assert "activation" in (folder / "memory.html").read_text()


def test_the_script_of_monai_runs(folder):
    pytest.importorskip("ignite")
    exec(compile(SCRIPTS["monai"], PAGE.name, "exec"), names := {})
    assert names["mask"].shape == (1, 1, 48, 40, 32)
