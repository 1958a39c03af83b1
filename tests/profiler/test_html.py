"""The HTML page of a recording, tested in a browser if one is installed."""

import json
import re
import shutil
import subprocess

import pytest

from memsave.profiler import MemoryReport, write_html
from tests.profiler.test_planner import measured

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=4000"),
]
POINT = """<script>
const canvas = document.querySelector("canvas"), place = canvas.getBoundingClientRect();
const at = { clientX: place.left + place.width * 0.5, clientY: place.top + place.height * 0.6, bubbles: true };
canvas.dispatchEvent(new MouseEvent("mousemove", at));
</script></body>"""


@pytest.fixture(scope="module")
def report():
    return measured(4000)


def page_of(tmp_path, *reports):
    path = tmp_path / "memory.html"
    write_html({f"step {number}": each for number, each in enumerate(reports)}, path, title="A <step>")
    return path


def test_the_page_is_self_contained_and_has_every_event(tmp_path, report):
    text = page_of(tmp_path, report).read_text()
    assert "A &lt;step&gt;" in text
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", text)
    data = json.loads(re.search(r"const data = (\{.*\});\n", text)[1].replace("<\\/", "</"))
    (chart,) = data["charts"]
    alive = dict(chart["start"])
    totals = [sum(alive.values())]
    for _, delta in chart["events"]:
        totals.append(totals[-1] + delta)
    assert totals == report.timeline.totals()
    assert chart["peak"] == max(totals) == report.peak_bytes
    assert {block[0] for block in chart["blocks"]} == {
        data["categories"].index(each.category) for each in report.history
    }


def test_a_report_read_from_json_gives_the_same_page(tmp_path, report):
    report.to_json(tmp_path / "memory.json")
    one = page_of(tmp_path, report).read_text()
    assert page_of(tmp_path, MemoryReport.from_json(tmp_path / "memory.json")).read_text() == one


def test_no_reports_raise_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least 1 is needed"):
        write_html({}, tmp_path / "memory.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_a_browser_shows_the_block_under_the_mouse(tmp_path, report):
    path = page_of(tmp_path, report, report)
    path.write_text(path.read_text().replace("</body>", POINT))
    seen = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    note = re.search(r'<div id="note"[^>]*>(.*?)</div>', seen, re.DOTALL)[1]
    words = re.sub(r"<[^>]+>", " ", note)
    assert re.search(r"(activation|temporary|input)", words)
    assert "4000x64 float32 on cpu" in words
    assert "live here" in words
    assert seen.count("<canvas") == 2
    assert re.search(r"activation</span>", seen)  # the legend
