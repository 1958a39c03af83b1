"""The log of a run that is continued."""

import json

from memsave.training.log import RunLog


def test_a_continued_log_keeps_the_lines_of_the_steps_taken_whatever_bytes_a_power_cut_left(tmp_path):
    lines = [{"step": 0, "dice_before": 0.25, "seconds": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (tmp_path / "metrics.jsonl").write_bytes(text.encode() + bytes(20) + b"\xff\xfe\n")
    log = RunLog(tmp_path, step=1)
    log.write({"step": 2, "loss": 1.5})
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [*lines[:2], {"step": 2, "loss": 1.5}]
    assert log.scores_before == {"dice_before": 0.25}


def test_a_new_log_has_no_scores_of_an_earlier_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "dice_before": 0.25}\n')
    assert RunLog(tmp_path).scores_before == {} and (tmp_path / "metrics.jsonl").read_text() == ""
