"""The ratio of allocator bytes to live bytes, and its file."""

import json
from dataclasses import asdict

import torch
from torch import nn

from memsave.profiler import Calibration, TrainingStep, allocator_peak, calibrate, calibration, peak_on_fake
from memsave.profiler.calibration import calibration_from, read_calibrations, write_calibration
from memsave.profiler.seconds import TimeModel
from tests.profiler.test_planner import line_step


def test_a_step_without_workspace_has_ratio_zero():
    found = calibrate(lambda: line_step(500))
    assert 0 <= found.workspace_ratio < 0.02
    report = peak_on_fake(lambda: line_step(500))
    assert report.peak_bytes <= found.allocator_bytes(report) < 1.02 * report.peak_bytes


def test_workspace_is_proportional_to_the_largest_block(monkeypatch):
    extra = 3 * 500 * 64 * 4
    real = allocator_peak
    monkeypatch.setattr(calibration, "allocator_peak", lambda step, *, device: real(step, device=device) + extra)
    plain = calibrate(lambda: line_step(500))
    monkeypatch.setattr(calibration, "allocator_peak", real)
    base = calibrate(lambda: line_step(500))
    assert abs(plain.workspace_ratio - base.workspace_ratio - 3) < 0.01  # 500 x 64 floats are the largest block
    report = peak_on_fake(lambda: line_step(5000))
    assert Calibration(3.0).allocator_bytes(report) == report.peak_bytes + 3 * 5000 * 64 * 4


def test_without_an_allocator_there_is_no_calibration():
    model = nn.Linear(1, 1, device="meta")
    step = TrainingStep(model, lambda: model(torch.zeros(1, 1, device="meta")).sum().backward())
    assert calibrate(lambda: step, device="meta") is None


def test_calibrations_are_added_to_the_file_by_key(tmp_path):
    path = tmp_path / "cache" / "calibration.json"
    assert read_calibrations(path) == {}
    write_calibration(path, "one", Calibration(0.5), notes={"date": "2026-01-31"})
    write_calibration(path, "other", Calibration(1.5), notes={})
    assert json.loads(path.read_text()) == {
        "one": {"workspace_ratio": 0.5, "date": "2026-01-31"},
        "other": {"workspace_ratio": 1.5},
    }


def test_the_times_of_an_earlier_version_are_not_read():
    old = {"workspace_ratio": 0.5, "times": {"rates": {}, "host": 1.0, "fresh": 0.0, "concurrent": False}}
    assert calibration_from(old) == calibration_from({"workspace_ratio": 0.5}) == Calibration(0.5)
    times = TimeModel({"mm float32": (1.0, 0.5, 0.0)}, largest={"mm float32": 8.0}, calls=3)
    assert calibration_from({"workspace_ratio": 0.5, "times": asdict(times)}) == Calibration(0.5, times)


def test_a_calibration_without_times_runs_fewer_steps():
    assert calibrate(lambda: line_step(500), timed=False).times is None
