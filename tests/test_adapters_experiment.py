"""A sample of the set-ups that `python -m experiments.adapters` tries, through the same code."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from experiments.adapters.__main__ import table
from experiments.adapters.check import check
from experiments.adapters.setups import BASES, SETUPS

SAMPLE = [("LoRA, fan_in_fan_out", "gpt2"), ("LoRA, dropout 0.5", "llama"), ("DoRA", "llama")]


@pytest.mark.parametrize(("name", "base"), SAMPLE)
def test_a_sample_is_exact_or_refused(name, base):
    (setup,) = [each for each in SETUPS if (each.name, each.base) == (name, base)]
    row = check(setup)
    assert row.verdict in ("exact", "refused") and row.apart and row.parameters, row
    assert row.verdict == "exact" or "LoRA," not in name, row
    assert f"| {name} | {base} | {row.parameters:,} | {row.verdict}" in table([row])


def test_names_are_unique_and_bases_exist():
    keys = [(setup.name, setup.base) for setup in SETUPS]
    assert len(set(keys)) == len(keys) >= 48
    assert {base for _, base in keys} == set(BASES)
