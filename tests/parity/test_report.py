import base64
import io
import json
import math
import re

import pytest
import torch
from PIL import Image

from flux_func.errors import UserError
from flux_func.parity import report
from flux_func.parity.compare import Comparison
from flux_func.parity.rows import Row

STAGES = [
    Row("stages", "stem", "relative", 0.0, 5e-7, "img", "stem"),
    Row("stages", "double_blocks.0", "relative", 1e-7, 5e-7, "<img>", "double_blocks.0"),
]
GRADIENTS = [Row("gradients", "stem", "relative, worst leaf", 1e-6, 3e-6, "img_in.bias", "stem")]
FORWARD = Row("forward", "float32", "relative", 2e-7, 1e-6)
BAD = Row("stages", "head", "relative", 2e-3, 5e-7, "img", "head")
ABOUT = {"title": "ours & theirs", "subtitle": "a <small> one", "model": {"axes_dim": (4, 6, 6)}}


def comparison(*rows, images=None):
    return Comparison([FORWARD, *STAGES, *GRADIENTS, *rows], {"img_in.bias": 1e-6}, images or {})


def pictures():
    theirs = torch.linspace(-1, 1, 3 * 4 * 6).reshape(3, 4, 6)
    ours = theirs.clone()
    ours[0, 1, 2] += 3e-6
    return {"ours": ours, "theirs": theirs}


def test_the_table_has_a_line_for_each_row():
    lines = report.table(comparison(BAD).rows).splitlines()
    assert len(lines) == 2 + 5
    assert re.fullmatch(r"forward +float32 +relative +2\.00e-07 +1\.00e-06 +ok", lines[2])
    assert re.fullmatch(r"stages +head +relative +2\.00e-03 +5\.00e-07 +FAIL +img", lines[-1])


def test_the_verdict_names_the_stages():
    assert report.verdict(comparison()) == "passed: 4 of 4 within their bounds"
    assert report.verdict(comparison(BAD)) == "FAILED: 1 of 5 out of bounds; stages that differ by themselves: head"
    step = Row("sampler", "after step 1", "relative", 1.0, 1e-6)
    assert report.verdict(comparison(step)) == "FAILED: 1 of 5 out of bounds; no stage differs by itself"
    assert report.verdict(Comparison([step])) == "FAILED: 1 of 1 out of bounds; after step 1"


def test_files_are_whole_and_need_nothing_else(tmp_path):
    out = tmp_path / "new" / "report"
    report.write(out, comparison(BAD, images=pictures()), ABOUT)
    assert [path.name for path in sorted(out.iterdir())] == ["report.html", "report.json"]
    assert [path.name for path in out.parent.iterdir()] == ["report"]
    saved = json.loads((out / "report.json").read_text())
    assert saved["passed"] is False and saved["gradients"] == {"img_in.bias": 1e-6}
    assert [row["name"] for row in saved["rows"] if not row["passed"]] == ["head"]
    page = (out / "report.html").read_text()
    assert "http" not in page and "ours &amp; theirs" in page and "a &lt;small&gt; one" in page
    assert "&lt;img&gt;" in page and "<td>4, 6, 6" not in page and "<dd>4, 6, 6</dd>" in page
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))


def test_pictures_are_both_and_their_difference_so_large_that_it_is_seen():
    page = report.page(comparison(images=pictures()), ABOUT)
    codes = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    theirs, ours, difference = (Image.open(io.BytesIO(base64.b64decode(code))) for code in codes)
    assert theirs.size == ours.size == difference.size == (6, 4)
    assert theirs.tobytes() == ours.tobytes()
    red, *others = difference.split()
    assert red.getpixel((2, 1)) > 100 and all(channel.getextrema() == (0, 0) for channel in others)
    assert "the difference, 500,000 times as large" in page


def test_equal_pictures_have_a_black_difference():
    same = {name: torch.zeros(3, 2, 2) for name in ("ours", "theirs")}
    assert "the difference, 1 times as large" in report.page(comparison(images=same), ABOUT)


def test_a_picture_that_is_no_number_is_still_reported():
    broken = pictures()
    broken["ours"][0, 0, 0] = math.nan
    assert "the difference, 1 times as large (at most nan of white)" in report.page(comparison(images=broken), ABOUT)


@pytest.mark.parametrize(
    ("value", "rounded"), [(1.0, 1), (1.9, 1), (2.0, 2), (49.9, 20), (50, 50), (999, 500), (1e6, 10**6)]
)
def test_amplification_is_a_round_number(value, rounded):
    assert report._round(value) == rounded


def test_the_plot_has_every_stage_and_survives_what_is_no_number():
    broken = Row("stages", "head", "relative", math.nan, 5e-7, "img", "head")
    (code,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', report.page(comparison(broken), ABOUT))
    assert base64.b64decode(code).startswith(b"<?xml")


def test_a_report_without_stages_has_no_plot():
    assert "<img" not in report.page(Comparison([FORWARD]), ABOUT)


def test_what_is_no_number_is_still_json(tmp_path):
    report.write(tmp_path / "out", comparison(Row("stages", "head", "relative", math.nan, 5e-7)), ABOUT)
    text = (tmp_path / "out" / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"][-1]["value"] == "nan"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        report.write(tmp_path, comparison(), ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
