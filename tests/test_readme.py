"""README.md: its code runs, its figures are those of docs/results.md, and its links exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])


def code(number):
    """One of the two quickstarts."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    return blocks[number]


def test_the_unet_quickstart_runs(capsys):
    pytest.importorskip("monai")
    torch.manual_seed(0)
    exec(code(0), {})
    printed = capsys.readouterr().out
    assert "as stored" in printed and "MiB" in printed


def test_the_language_model_quickstart_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("opacus")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("my/gpt2")
    ids = torch.randint(50, (200, 12))
    torch.save((ids, ids.masked_fill(torch.arange(12) > 9, -100)), "my/records.pt")
    exec(code(1), names := {})
    epsilon, *_ = re.findall(r"epsilon (\S+) at delta", capsys.readouterr().out)
    assert 7 < float(epsilon) <= 8
    assert names["private"].steps == 50


def test_headline_figures_are_those_of_the_results_page():
    table = README.partition("## Numbers")[2].partition("##")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    for _, _, figures, command, _ in rows:
        assert command.strip(" `") in RESULTS
        for figure in re.findall(r"\d+(?:\.\d+)?(?:x\d*|x| GiB)*", figures):
            assert figure in RESULTS, figure


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            assert heading in headings(target), f"{page.name} links to {link}"


def headings(page):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_table_of_an_experiment_has_its_place_in_the_results_page():
    names = {"budget volume", "whole volume", "memory modes", "depth", "depthwise", "private text", "ghost"}
    names |= {"distributed", "gpu"}
    assert set(re.findall(r"<!-- (.+) -->\n.+", RESULTS)) == names
    assert "<!--" not in README
