"""The code of docs/own-unet.md and docs/reversible.md runs unchanged."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


def code_of(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def test_the_code_of_own_unet_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("monai")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks, branches, reports = code_of("own-unet.md")
    names = {}
    exec(blocks, names)
    assert "as stored" in capsys.readouterr().out
    assert names["net"](torch.randn(1, 4, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
    exec(branches, other := {})
    assert other["level"](16, 2)(torch.randn(1, 16, 4, 4, 4)).shape == (1, 16, 4, 4, 4)
    exec(reports, last := names | {"ReversibleSequence": other["ReversibleSequence"]})
    assert (tmp_path / "memory.png").is_file()
    peaks = {name: report.peak_bytes for name, report in last["reports"].items()}
    assert peaks["reversible"] < peaks["stored"]


def test_the_code_of_reversible_runs(capsys):
    def branch():
        return torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(1, 4))

    (code,) = code_of("reversible.md")
    exec(code, {"f": branch, "g": branch, "x": torch.randn(2, 8, 6, 6)})
    assert "through 64 blocks" in capsys.readouterr().out
