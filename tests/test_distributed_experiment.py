"""The steps that `python -m experiments.distributed` measures, in one process, and its table and picture."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("opacus")
pytest.importorskip("matplotlib")

from experiments.distributed.__main__ import table
from experiments.distributed.measure import NOISELESS, measure
from experiments.distributed.picture import draw
from experiments.distributed.problems import problems
from experiments.distributed.variants import APART, variants

ROW = {"way": "plain", "parallel": "ddp", "processes": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_way_arrives_at_the_same_numbers(tmp_path, monkeypatch):
    problem = problems(torch.device("cpu"), quick=True)["language"]
    alone = [each for each in variants(problem, processes=2) if not each.parallel]
    assert len(alone) == 4 and all(each.reference in (None, alone[1]) for each in alone)
    monkeypatch.setattr("experiments.distributed.measure.variants", lambda *_, **__: alone)
    rows = measure(problem, processes=1, rounds=1)
    for row in rows.values():
        assert len(row["losses"]) == NOISELESS and len(row["rounds"]) == 1 and sum(row["peaks"][0].values()) > 0
        assert row.get("largest_relative_loss_difference", 0) < 1e-6
        assert row.get("relative_gradient_difference", 0) < 1e-5
    failed = {**ROW, "error": "RuntimeError: no luck"}
    results = {"language": {"title": "GPT-2", "rows": {**rows, "plain, ddp, 2": failed}}}
    text = table(results)
    assert "| plain, ddp | 2 | failed: RuntimeError |" in text and "- plain, ddp, 2: `RuntimeError: no luck`" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    draw(results, tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").stat().st_size > 10_000


def test_what_is_compared_with_what():
    problem = problems(torch.device("cpu"), quick=True)["language"]
    several = [each for each in variants(problem, processes=4) if each.parallel]
    assert {each.processes for each in several} == {4}
    for each in several:
        reference = each.reference
        assert reference is None if each.parallel == APART else (reference.way, reference.parallel) == (each.way, "")
