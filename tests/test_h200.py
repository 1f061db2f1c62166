"""docs/h200.py: all of it at tiny size on a CPU, and what it makes of figures made by hand."""

import importlib
import json
import math
import os

import pytest
import torch
from PIL import Image

import flux_func as ff
from flux_func import config as configs
from flux_func.errors import UserError
from flux_func.models import flops
from tests.helpers import tiny_run

SCRIPT = tiny_run.ROOT / "docs" / "h200.py"


@pytest.fixture(scope="module")
def h200():
    spec = importlib.util.spec_from_file_location("docs_h200", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(*seconds):
    return {"seconds": seconds, "flops": 6 * 10**14, "losses": [1.0], "peak_bytes": 1}


FOUND = {
    "256": {"bfloat16": row(1.0, 2.0, 1.0), "float8": row(0.5)},
    "1024": {"bfloat16": row(1.5), "float8": row(1.25)},
    "peer": {"ours": 2.0, "torchtitan": 3.0},
    "curves": {"float32": [1.0, 0.5], "bfloat16": [1.0, 0.509], "float8": [1.0, None]},
}


def test_figures_beside_their_goals(h200):
    found = {goal.name: (round(goal.value, 6), goal.reached) for goal in h200.goals(FOUND, peak_tflops=1000.0)}
    assert found == {
        "flux-schnell, 256 pixels, bfloat16: share of the peak": (0.6, True),
        "flux-schnell, 256 pixels: Float8's speed over bfloat16's": (2.0, True),
        "flux-schnell, 1024 pixels, bfloat16: share of the peak": (0.4, False),
        "flux-schnell, 1024 pixels: Float8's speed over bfloat16's": (1.2, False),
        "speed of ours over torchtitan's": (1.5, True),
        "loss in bfloat16, from float32's": (0.006, True),
        "loss in float8, from float32's": (math.inf, False),
    }
    said = [str(goal) for goal in h200.goals({"peer": FOUND["peer"]}, 1000.0)]
    assert said == ["speed of ours over torchtitan's: 1.5, at least 1.25: reached"]


def test_curves_are_apart_where_their_running_means_are(h200):
    flat = [1.0] * 40
    noisy = [1 + 0.05 * (-1) ** step for step in range(40)]
    assert h200.apart(noisy, flat) == pytest.approx(0, abs=1e-12)
    # From step 20 on 2% more; one that is narrower than the window is seen by its share.
    assert h200.apart(flat[:20] + [1.02] * 20, flat) == pytest.approx(0.02)
    assert h200.apart(flat[:20] + [0.8] + flat[21:], flat) == pytest.approx(0.02)
    assert h200.apart(flat, flat[1:]) == math.inf


def test_a_type_without_a_loss_is_no_ratio(h200):
    row = {"seconds": [1.0], "losses": [1.0], "flops": 1e12}
    listed = h200.goals({"256": {"bfloat16": {**row, "losses": [math.nan]}, "float8": row}}, 989.0)
    assert [goal.reached for goal in listed] == [False]


@pytest.mark.parametrize("part", ["256", "1024"])
def test_sizes(h200, part):
    """A batch of the full size: the operations of a sample are those that are published."""
    config = h200.settings(h200.FULL.steps[part])
    tokens = ((config.data.image_size // 16) ** 2, config.text.max_length)
    sample = flops.training_flops(ff.flavor(config.model.flavor), *tokens)
    assert sample == pytest.approx({"256": 20.3e12, "1024": 223e12}[part], rel=1e-2)
    assert config.train.accumulate >= 4 and config.compile.enabled
    assert h200.settings(h200.BFLOAT16).to_dict() == h200.settings({}).to_dict()
    for numerics in h200.NUMERICS.values():
        configs.validate(h200.settings({**h200.FULL.steps[part], **numerics}))


def test_all_of_it_at_tiny_size(h200, tmp_path, monkeypatch):
    """In this process, programs too, but for those that bench_main starts."""

    def call(commands, out):
        for program, *given in commands.values():
            assert tiny_run.program(importlib.import_module(f"flux_func.{program}"), *given) == 0

    monkeypatch.setattr(h200, "alone", lambda fn, *args: fn(*args))
    monkeypatch.setattr(h200, "call", call)
    parts = ["256", "peer", "curves"]
    found, failed = h200.measure(parts, h200.TINY, "cpu", 2, "bfl", None, tmp_path)
    assert failed == {} and list(found) == parts
    wide, narrow = found["256"]["bfloat16"], found["256"]["float8"]
    assert found["256"].keys() == h200.NUMERICS.keys()
    for each in (wide, narrow):
        assert len(each["seconds"]) == 2 and each["peak_bytes"] > 2**26
    # Over one state: each goes on from where the other left it; first each by itself.
    first = wide["losses"][: h200.WARMUP] + narrow["losses"][: h200.WARMUP]
    turns = zip(wide["losses"][h200.WARMUP :], narrow["losses"][h200.WARMUP :], strict=True)
    losses = [*first, *(loss for pair in turns for loss in pair)]
    assert losses == sorted(losses, reverse=True) and len(losses) == 2 * (h200.WARMUP + 2)
    assert "ms a step" in (tmp_path / "256" / "profile" / "step_000003" / "top_operations.txt").read_text()
    assert found["peer"].keys() == {"ours", "bfl"}
    assert {name: len(losses) for name, losses in found["curves"].items()} == dict.fromkeys(
        ("float32", *h200.NUMERICS), h200.TINY.curves["train.steps"]
    )
    json.dumps(found, allow_nan=False)


def test_a_part_that_fails_is_named_and_the_others_go_on(h200, tmp_path, monkeypatch, capfd):
    def take_steps(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(h200, "alone", take_steps)
    monkeypatch.setattr(h200, "curves", lambda *args: FOUND["curves"] | {"float8": [1.0, 0.5]})
    out = tmp_path / "out"
    assert tiny_run.program(h200, "--parts=256,curves", "--device=cpu", f"--out={out}") == 1
    said = capfd.readouterr().out
    assert (out / "h200.txt").read_text() == said
    lines = said.splitlines()
    assert lines[-1] == "256: FAILED: OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert "in take_steps" in (out / "256.failure.txt").read_text()
    assert [line.endswith("reached") for line in lines[:-1]] == [True, True]
    assert json.loads((out / "h200.json").read_text())["found"]["curves"]["bfloat16"] == [1.0, 0.509]
    assert tiny_run.program(h200, "--parts=curves", "--device=cpu", f"--out={tmp_path}/good") == 0


def test_a_type_that_fails_leaves_the_others_times(h200, tmp_path, monkeypatch):
    whole = h200.ours.training

    def training(config, *args):
        if config.numerics.linear:
            raise ValueError("backend='inductor' raised:\nnothing of it\n\nSet TORCHDYNAMO_VERBOSE=1")
        return whole(config, *args)

    monkeypatch.setattr(h200, "alone", lambda fn, *args: fn(*args))
    monkeypatch.setattr(h200.ours, "training", training)
    monkeypatch.setattr(h200, "trace_one", lambda *args: 1 / 0)
    kept = []
    found, failed = h200.measure(
        ["256"], h200.TINY, "cpu", 1, "bfl", None, tmp_path, lambda found, failed: kept.append(dict(failed))
    )
    line = "ValueError: backend='inductor' raised: nothing of it"
    assert failed == {"256, float8": line} and kept == [failed]
    assert found["256"]["float8"] == {"failed": line} and len(found["256"]["bfloat16"]["seconds"]) == 1
    assert found["256"]["bfloat16"]["profile"].startswith("ZeroDivisionError")
    assert "in training" in (tmp_path / "256.float8.failure.txt").read_text()
    assert [goal.name for goal in h200.goals(found, 989.0)] == ["flux-schnell, 256 pixels, bfloat16: share of the peak"]


def test_a_loss_that_is_none_has_no_speed(h200):
    nan = {**row(1.0), "losses": [1.0, math.nan]}
    assert h200.rates_of({"bfloat16": nan, "float8": row(1.0), "none": {"failed": "it"}}) == {
        "bfloat16": 0.0,
        "float8": 600.0,
    }


def test_a_peer_that_cannot_be_imported_is_said_before_anything_is_written(h200, tmp_path, monkeypatch):
    monkeypatch.setattr(h200.process, "PROGRAM", tmp_path / "answer.py")
    (tmp_path / "with_bfl.py").write_text("from torch import NoSuchName\n")
    with pytest.raises(
        UserError, match="^--peer is 'bfl': .* cannot import it: ImportError: cannot import name 'NoSuchN"
    ):
        h200.beside("bfl", None, (), "cpu", 1, tmp_path / "out")


def test_the_picture(h200, tmp_path):
    for name, found in {"all": FOUND, "none": {}}.items():
        h200.draw_all(found, 1000.0, tmp_path / f"{name}.png")
    whole, empty = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("all", "none"))
    assert whole.size == empty.size and len(whole.getcolors(1 << 24)) > len(empty.getcolors(1 << 24))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--parts=512", "--parts is '512': should be one of '256', '1024', 'peer', 'curves'"),
        ("--parts=", "--parts is '': should be one of '256'"),
        ("--rounds=0", "flag --rounds=0"),
        ("--peer=ours", "--peer is 'ours': should be one of 'bfl', 'diffusers', 'torchtitan'"),
        ("--reference_python=/no/python", "--reference_python is '/no/python': cannot be run"),
        ("--peak_tflops=0", "flag --peak_tflops=0"),
        ("--device=tpu", "flag --device=tpu"),
        ("--peer=bfl --out=full", "full: is there already"),
    ],
)
def test_bad_input_is_one_line(h200, given, line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert line in tiny_run.refused(capfd, tmp_path, h200, "--out=new", *given.split())


def test_programs_leave_logs(h200, tmp_path):
    with pytest.raises(UserError, match="No module named flux_func.bad_main"):
        h200.call({"good": ["convert_main", "--help"], "bad": ["bad_main"]}, tmp_path)
    assert "--from" in (tmp_path / "good.log").read_text()


def test_a_process_of_its_own(h200):
    assert h200.alone(os.getppid) == os.getpid()
