"""The code of docs/planning.md runs unchanged."""

import re
from pathlib import Path


def test_the_code_of_planning_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert "fits into 16.00 GiB" in capsys.readouterr().out
