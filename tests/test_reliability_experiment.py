"""`experiments.reliability`: its mutants, its damage, and a few of its attacks."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.reliability import damage, mutants
from experiments.reliability.__main__ import TRIALS
from experiments.reliability.mutations import make, places

TEXT = '''
def f(x, y=1):
    """Return 2."""
    if x < y:
        raise ValueError(f"{x + 1} is too small")
    return g(x, scale=-3) or x + 1
'''
EXPECTED = {
    ("def f(x, y=1):", "def f(x, y=2):"),
    ("if x < y:", "if x <= y:"),
    ("if x < y:", "if not x < y:"),
    ("return g(x, scale=-3) or x + 1", "return None"),
    ("return g(x, scale=-3) or x + 1", "return g(x, scale=-3) and x + 1"),
    ("return g(x, scale=-3) or x + 1", "return g(x) or x + 1"),
    ("return g(x, scale=-3) or x + 1", "return g(x, scale=3) or x + 1"),
    ("return g(x, scale=-3) or x + 1", "return g(x, scale=-4) or x + 1"),
    ("return g(x, scale=-3) or x + 1", "return g(x, scale=-3) or x - 1"),
    ("return g(x, scale=-3) or x + 1", "return g(x, scale=-3) or x + 2"),
}


def test_the_mutants_of_a_function():
    mutants = [make("f.py", TEXT, place) for place in places(TEXT)]
    changed = {(each.before, each.after) for each in mutants}
    raised = {pair for pair in changed if pair[1] == "deleted"}
    assert changed - raised == EXPECTED
    assert raised == {("raise ValueError(f'{x + 1} is too small')", "deleted")}
    assert len({each.source for each in mutants}) == len(mutants)


CONSTANTS = """
LIMIT = 3

def f(x):
    y = g(
        x + 1,
        2)
    if x and \\
            y:
        return LIMIT
"""


def test_the_tests_of_a_mutant_execute_its_statement_or_use_its_constant():
    lines = {
        (each.before, each.line): set(each.lines) for each in (make("f.py", CONSTANTS, p) for p in places(CONSTANTS))
    }
    assert lines["LIMIT = 3", 2] == {10}
    assert lines["y = g(x + 1, 2)", 6] == lines["y = g(x + 1, 2)", 7] == {5, 6, 7}
    assert lines["if x and y:", 8] == {8, 9}
    assert lines["return LIMIT", 10] == {10}


def test_mutants_are_drawn_from_all_files_and_each_has_tests():
    drawn = mutants.draw(seed=0, count=TRIALS["mutants"])
    with_places = {name for name in mutants.sources() if places((mutants.ROOT / name).read_text())}
    assert {name for name, _ in drawn} == with_places
    assert all((mutants.ROOT / test).is_file() for name in with_places for test in mutants.tests_of(name))
    assert all(mutants.tests_of(name) for name in with_places)
    assert len(set(drawn)) == len(drawn) == TRIALS["mutants"]


@pytest.mark.parametrize("change", [damage.damage_bytes, damage.damage_json, damage.damage_table])
def test_damage_is_repeatable(change):
    content = b'{"prompt": "a b", "completion": "c"}\n' * 3 if change is damage.damage_table else b'{"a": [1, null]}'
    first, again = ([change(content, random.Random(seed)) for seed in range(30)] for _ in range(2))
    assert first == again and len(set(first)) > 8


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kills", "fuzz"])
def test_a_few_attacks_find_nothing(part):
    command = [sys.executable, "-m", "experiments.reliability", "--quick", "--parts", part]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_earlier_results_of_unchanged_files_stay_and_what_is_explained_is_not_wrong(tmp_path):
    name = "memsave/ghost/rules/norm.py"
    survivor = {"number": 1, "line": 20, "change": "COMPARED = 8 -> COMPARED = 9"}
    counts = {"digest": mutants._digest(name), "mutants": 2, "killed": 1, "survived": [survivor]}
    old = {"digest": "of an earlier text", "mutants": 4, "killed": 4, "survived": []}
    before = {"seed": 0, "files": {name: counts, "memsave/ghost/rule.py": old}}
    found = mutants.part(tmp_path, seed=0, trials=0, until=0.0, before=before)
    assert found == {"files": {name: counts}, "left_out": [], "wrong": []}
    assert "| **all 1 files** | **2** | **1** |" in mutants.table(found)
    assert f"- `{name}:20: COMPARED = 8 -> COMPARED = 9`: equivalent" in mutants.table(found)
    assert mutants.part(tmp_path, seed=1, trials=0, until=0.0, before=before)["files"] == {}
