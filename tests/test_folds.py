"""Scores over folds: mean and standard deviation of the folds, the mean over all cases, and folds that are missing."""

import csv
import statistics

import pytest

from memsave.collect import collect, read_jobs, varied_keys
from memsave.folds import validations
from tests.test_collect import write_job

SCORES = {0: {"a": (0.5, 3.0), "b": (0.7, 5.0)}, 1: {"c": (0.9, 1.0)}, 2: {"d": (0.8, 2.0), "e": (0.6, 4.0)}}


def write_fold(folder, number, *overrides, memory="stored", status="ok", scores=None):
    choice = ["data.folds=3", f"data.fold={number}", f"memory={memory}", "profiler.compare=[]"]
    write_job(folder, *choice, *overrides, result={"status": status, "metrics": {}})
    if scores is not None:
        with (folder / "scores.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["case", "dice_wt", "hd95_wt"])
            table.writerows([case, *row] for case, row in scores.items())


@pytest.fixture
def sweep(tmp_path):
    for number, scores in SCORES.items():
        write_fold(tmp_path / str(number), number, scores=scores)
    for number in (0, 1):
        write_fold(tmp_path / str(3 + number), number, memory="checkpoint", scores=SCORES[number])
    write_fold(tmp_path / "5", 2, memory="checkpoint", status="failed")
    return tmp_path


def test_scores_over_folds(sweep):
    jobs = read_jobs(sweep)
    whole, part = validations(jobs, varied_keys(jobs))
    means = [0.6, 0.9, 0.7]
    row = next(whole.rows())
    assert row["memory.mode"] == "stored" and row["score"] == "dice_wt" and (row["folds"], row["cases"]) == (3, 5)
    assert row["mean"] == pytest.approx(statistics.fmean(means))
    assert row["standard deviation"] == pytest.approx(statistics.stdev(means))
    assert row["pooled"] == pytest.approx((0.5 + 0.7 + 0.9 + 0.8 + 0.6) / 5)
    assert whole.missing == [] and part.missing == [2]


def test_the_table_of_a_sweep_has_them(sweep, capsys):
    collect(sweep)
    text = (sweep / "sweep.md").read_text()
    assert "Over 3 folds: the mean and the standard deviation" in text
    assert "| stored | dice_wt | 0.7333 | 0.1528 | 0.7 | 3 | 5 |" in text
    assert "Without scores with memory.mode=checkpoint: fold 2 of 3." in text
    rows = list(csv.DictReader((sweep / "folds.csv").open()))
    assert [(row["memory.mode"], row["score"]) for row in rows] == [
        (mode, name) for mode in ("stored", "checkpoint") for name in ("dice_wt", "hd95_wt")
    ]


def test_a_sweep_without_folds_has_no_such_table(tmp_path, capsys):
    for number in (0, 1):
        write_job(tmp_path / str(number), f"trainer.seed={number}", result={"status": "ok", "metrics": {"dice": 0.5}})
    collect(tmp_path)
    assert "Over" not in (tmp_path / "sweep.md").read_text() and not (tmp_path / "folds.csv").exists()
