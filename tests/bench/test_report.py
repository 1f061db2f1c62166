import json

import pytest
from PIL import Image

from flux_func.bench import report
from flux_func.bench.cases import Settings, Side
from flux_func.errors import UserError
from tests.helpers import tiny_bench

DEEP = tiny_bench.case(depth=(2, 4))
ROWS = [
    tiny_bench.row([1.0, 2.0, 1.0]),
    tiny_bench.row([2.0, 1.0, 4.0], "bfl"),
    tiny_bench.row([1.5, 3.0, 3.5], asked=DEEP, peak_bytes=9 << 30),
    tiny_bench.row([4.0, 4.0, 4.0], "bfl", DEEP, flops=0),
]

TABLE = """\
      median s  from .. to  ratio      from .. to   to  TFLOP/s  peak GiB  imports   kept   rest

train_step of flux-tiny 1+1: batch 2, 32 pixels, 5 tokens
ours         1      1 .. 2  0.500  0.250 .. 2.000  bfl        2     8.000    2.000  3.000  3.000
bfl          2      1 .. 4  1.000  1.000 .. 1.000  bfl        1     8.000    2.000  3.000  3.000

train_step of flux-tiny 2+4: batch 2, 32 pixels, 5 tokens
ours         3  1.5 .. 3.5  0.750  0.375 .. 0.875  bfl   0.6667     9.000    2.000  3.000  4.000
bfl          4      4 .. 4  1.000  1.000 .. 1.000  bfl              8.000    2.000  3.000  3.000

train_step of ours: 2+4 after 1+1 takes 3.000 times the seconds, 0.5 s and 256 MiB more a block
train_step of bfl: 2+4 after 1+1 takes 2.000 times the seconds, 0.5 s and 0 MiB more a block"""


def test_the_table():
    assert report.table(ROWS) == TABLE
    assert report.table(ROWS[:2]) == "\n".join(TABLE.splitlines()[:5])


def test_blocks_of_what_differs_otherwise_are_not_compared():
    others = [tiny_bench.row([1], asked=tiny_bench.case(depth=(2, 4), batch=4)), tiny_bench.row([1], "diffusers", DEEP)]
    assert report.growth([ROWS[0], *others]) == []


def test_files_are_whole(tmp_path):
    out = tmp_path / "new" / "bench"
    report.write(out, ROWS, Settings(rounds=3))
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png", "bench.txt"]
    assert [path.name for path in out.parent.iterdir()] == ["bench"]
    assert (out / "bench.txt").read_text() == TABLE + "\n"
    saved = json.loads((out / "bench.json").read_text())
    assert saved["settings"]["rounds"] == 3 and saved["peers"]["bfl"] == {"threads": 2}
    assert {"processor", "cores", "memory", "load", "utc"} < saved["machine"].keys()
    row = saved["rows"][2]
    assert row["case"]["depth"] == [2, 4] and row["side"] == {"peer": "ours", "dtype": "float32", "remat": "none"}
    assert row["seconds"] == [1.5, 3.0, 3.5] and row["median"] == 3 and row["losses"] == [1.5, 1.25]
    assert row["ratios"] == [0.375, 0.75, 0.875] and row["ratio"] == 0.75 and row["to"] == "bfl"
    assert row["peak_bytes"] == 9 << 30


def test_the_picture_has_a_panel_for_each_case(tmp_path):
    for count, name in ((2, "one"), (4, "two")):
        report.draw(ROWS[:count], tmp_path / f"{name}.png")
    one, two = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("one", "two"))
    assert two.height == pytest.approx(2 * one.height, abs=2) and two.width == one.width
    # Ours is red and BFL's blue, in both halves.
    for box in ((0, 0, two.width // 2, two.height), (two.width // 2, 0, two.width, two.height)):
        colours = {colour for _, colour in two.crop(box).getcolors(1 << 24)}
        assert {(214, 39, 40), (31, 119, 180)} <= colours


def test_sides_of_one_peer_are_bars_of_their_own(tmp_path):
    rows = [tiny_bench.row([t], side=Side("ours", dtype)) for t, dtype in ((2.0, "float32"), (1.0, "bfloat16"))]
    report.draw(rows, tmp_path / "sides.png")
    lines = report.table(rows).splitlines()
    assert lines[-2].split()[:2] == ["ours", "2"] and lines[-1].startswith("ours bfloat16")
    assert " 0.500 " in lines[-1]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        report.write(tmp_path, ROWS, Settings())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_machine(tmp_path):
    found = report.machine()
    assert found["cores"] >= 1 and found["utc"].startswith("20")
    assert report._first(str(tmp_path / "nowhere"), "model name") == ""
    (tmp_path / "info").write_text("model name\t: a thing: fast\nmodel name\t: other\n")
    assert report._first(str(tmp_path / "info"), "model name") == "a thing: fast"
    assert report.available_bytes() > 2**20
