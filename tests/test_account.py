"""`python -m memsave.account`: the table, what runs spent together, and what it refuses."""

import pytest

pytest.importorskip("opacus")

from memsave.account import main
from memsave.privacy import epsilon_of_runs
from memsave.training.statement import round_up
from tests.support.run_folders import SEED, write_killed_run, write_run


def report(capsys, *arguments, code=0):
    assert main(list(map(str, arguments))) == code
    out, err = capsys.readouterr()
    return err if code else out


def together(*steps, delta=1e-4):
    epsilon = epsilon_of_runs([(1.0, 0.1, each) for each in steps], delta=delta)
    return f"epsilon = {round_up(epsilon, '.2f')} at delta = {round_up(delta, '.2e')} (pld)"


def test_runs_of_a_folder_are_composed(tmp_path, capsys):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", status="interrupted", privacy={"steps": 5, "epsilon": 0.75})
    out = report(capsys, tmp_path)
    assert "Data data: 2 runs" in out
    assert f"| {tmp_path / '0'} | 1.50 | 0.0001 | 1 | 0.1 | 20 |" in out
    assert f"| {tmp_path / '1'} | 0.75 | 0.0001 | 1 | 0.1 | 5 |" in out
    assert f"The 2 runs together spent {together(20, 5)} (added up, their epsilons would be 2.25)." in out
    assert "times as likely with one example as without it" in out and "guarantee" not in out


def test_another_delta_and_accountant_may_be_given(tmp_path, capsys):
    write_run(tmp_path / "lr=0.1")  # a path with an equals sign
    write_run(tmp_path / "lr=0.2")
    out = report(capsys, tmp_path / "lr=0.1", tmp_path / "lr=0.2", "delta=1e-6")
    assert together(20, 20, delta=1e-6) in out
    tight = report(capsys, tmp_path, "accountant=prv")
    assert "(prv)" in tight and "(pld)" not in tight


def test_the_smallest_delta_is_taken(tmp_path, capsys):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", privacy={"delta": 1e-5})
    assert together(20, 20, delta=1e-5) in report(capsys, tmp_path)


def test_runs_on_different_data_are_apart(tmp_path, capsys):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", data="other", privacy={"steps": 9})
    write_run(tmp_path / "2", data=None)
    first, second, third = report(capsys, tmp_path).split("Data ")[1:]
    assert first.startswith("data: 1 run\n") and f"The run spent {together(20)}." in first
    assert second.startswith("other: 1 run\n") and f"The run spent {together(9)}." in second
    assert third.startswith("unknown (runs of an earlier version")


def test_runs_that_protect_different_units_have_no_common_epsilon(tmp_path, capsys):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", unit="person")
    out = report(capsys, tmp_path)
    assert "The 2 runs together protect different units (data.unit), such as records and persons" in out
    assert "protects units of data.unit=person" in out and "epsilon = " not in out
    write_run(tmp_path / "persons" / "0", unit="person")
    assert f"The run spent {together(20)}." in report(capsys, tmp_path / "persons")


def test_runs_without_a_guarantee_leave_none(tmp_path, capsys):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", kind="none")
    write_run(tmp_path / "2", privacy={"no_guarantee": SEED, "epsilon": None})
    out = report(capsys, tmp_path)
    assert f"The run with a guarantee spent {together(20)}." in out
    assert "2 runs have no guarantee, so all runs together have none" in out
    assert "it was trained without privacy" in out and SEED in out
    out = report(capsys, tmp_path / "1")
    assert "1 run has no guarantee" in out and "epsilon =" not in out


def test_a_continued_run_counts_once(tmp_path, capsys):
    write_run(tmp_path / "first", status="interrupted", privacy={"run": "id", "steps": 8})
    write_run(tmp_path / "second", privacy={"run": "id", "steps": 20})
    out = report(capsys, tmp_path, tmp_path / "first")
    assert "Data data: 1 run\n" in out and "continued in 2 folders, counted once" in out
    assert f"The run spent {together(20)}." in out


def test_a_killed_run_counts_with_its_steps(tmp_path, capsys):
    write_killed_run(tmp_path / "0")
    write_run(tmp_path / "1")
    out = report(capsys, tmp_path)
    assert together(15, 20) in out and "no result: killed, or still training" in out


def test_mistakes_get_one_sentence(tmp_path, capsys):
    write_run(tmp_path / "run")
    write_run(tmp_path / "plan" / "0", mode="plan")
    for arguments, words in (
        ([tmp_path / "nowhere"], "nowhere is not a folder; name folders of runs or of sweeps"),
        ([tmp_path / "plan"], "no run there has taken a step"),
        (["delta=1e-6"], "no folder is given"),
        ([tmp_path / "run", "delta=small"], "delta is 'small': give a number above 0"),
        ([tmp_path / "run", "delta=0.5"], "delta is 0.5 for 100 examples; it must be above 0 and below 1/n"),
        ([tmp_path / "run", "delta=0"], "delta is 0 for 100 examples"),
        ([tmp_path / "run", "accountant=gdp"], "accountant is 'gdp'; choose one of pld, prv, rdp"),
        ([tmp_path / "run", "detla=1e-6"], "did you mean delta?"),
    ):
        err = report(capsys, *arguments, code=2)
        assert words in err and err.startswith("memsave: ") and err.count("\n") == 1
    assert main([]) == 2 and main(["--help"]) == 0
