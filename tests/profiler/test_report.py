"""The report as text, JSON and picture."""

import json
import struct

import pytest
import torch
from torch import nn

from memsave.profiler import CATEGORIES, MemoryRecorder, MemoryReport, format_bytes, parse_bytes, plot, plot_reports
from tests.support.training_programs import conv_program


def report_of(**net) -> MemoryReport:
    program = conv_program(release=True, **net)
    with MemoryRecorder(program.model, optimizer=program.optimizer) as recorder:
        program.step()
    return recorder.report(allocator_peak_bytes=12345)


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_json_round_trip(tmp_path):
    report = report_of()
    report.to_json(tmp_path / "memory.json")
    again = MemoryReport.from_json(tmp_path / "memory.json")
    assert again == report
    data = json.loads((tmp_path / "memory.json").read_text())
    assert data["peak_bytes"] == report.peak_bytes
    assert data["allocator_peak_bytes"] == 12345
    assert set(data["peak_by_category"]) == set(CATEGORIES)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 19, "1.50 MiB"), (5 << 30, "5.00 GiB")]
)
def test_units_are_binary(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GiB", 16 << 30), ("80 GB", 80 * 10**9), ("500mib", 500 << 20), ("1.5e9", 1500000000), ("7", 7)],
)
def test_sizes_are_parsed(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["much", "", "1.2.3GB", "-5MiB", "5XB"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is no size; give one such as 16GiB"):
        parse_bytes(text)


def test_growth_names_category_and_module():
    small, large = report_of(width=4), report_of(width=8)
    assert small.growth(small)[2] == 0
    category, module, size = large.growth(small)
    grown = {name: large.peak_by_category[name] - small.peak_by_category[name] for name in CATEGORIES}
    assert category == max(grown, key=grown.get)
    assert 0 < size <= grown[category] and module is not None


def test_the_printed_report_names_peak_categories_and_five_blocks():
    report = report_of()
    lines = str(report).splitlines()
    assert format_bytes(report.peak_bytes) in lines[0]
    assert "12.06 KiB" in lines[1]
    start = lines.index("largest blocks at the peak")
    assert len(lines) - start - 1 == 5
    assert [block.bytes for block in report.blocks] == sorted((block.bytes for block in report.blocks), reverse=True)


def test_a_plot_is_a_picture_as_wide_as_its_panels(tmp_path):
    pytest.importorskip("matplotlib")
    stored, frugal = report_of(), report_of(checkpointed=True)
    stored.plot(tmp_path / "one.png", title="One step", name="stored")
    stored.plot(tmp_path / "two.png", name="stored", others={"checkpoint": frugal})
    plot_reports({"a": stored, "b": frugal, "c": frugal}, tmp_path / "three.png")
    widths = [png_size(tmp_path / f"{name}.png")[0] for name in ("one", "two", "three")]
    assert widths == sorted(set(widths))


def test_an_empty_recording_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    with MemoryRecorder(nn.Identity()) as recorder:
        pass
    report = recorder.report()
    assert (report.peak_bytes, len(report.timeline)) == (0, 1)
    assert "peak  0 B" in str(report)
    report.plot(tmp_path / "empty.png")
    assert png_size(tmp_path / "empty.png")[0] > 100


def test_no_reports_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pass \{name: report\}"):
        plot_reports({}, tmp_path / "none.png")


def test_only_the_micro_batch_with_the_peak_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with MemoryRecorder(model) as recorder:
        for size in (3, 3, 3, 7, 3, 3):
            model(torch.randn(size, 8)).square().mean().backward()
    report = recorder.report()
    totals = report.timeline.totals()

    part, whole = plot.excerpt_of(report), plot.excerpt_of(report_of())
    assert (part.forwards, whole.forwards) == (6, 1)
    shown = part.timeline.totals()
    assert shown[part.peak_index] == max(shown) == report.peak_bytes
    first = report.peak_index - part.peak_index
    assert shown == totals[first : first + len(shown)]  # an unchanged part of the whole
    assert [phase for _, phase in part.timeline.phases] == ["forward", "backward"]
    report.plot(tmp_path / "many.png")
    assert png_size(tmp_path / "many.png")[0] > 100
