import builtins
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.errors import UserError
from flux_func.train import metrics

RECORD = {
    "loss": 1.0234,
    "grad_norm": 0.51,
    "lr": 1e-4,
    "images_per_s": 0.26,
    "tokens_per_s": 134.4,
    "tflops": 0.19,
    "mfu": None,
    "peak_memory_gib": 6.14,
    "data_wait_s": 0.01,
    "time_share": {
        "data": 0.01,
        "encode": 0.02,
        "compute": 0.9,
        "gather": 0.0,
        "reduce": 0.0,
        "optimizer": 0.06,
        "other": 0.01,
    },
    "samples_skipped": 0,
}
VALIDATION = {"validation_loss": 0.7, "validation_loss_by_timestep": [None, 0.5, 0.9]}


def strictly(text):
    """json.loads without NaN and Infinity, which are Python's own."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def lines(path):
    return [strictly(line) for line in path.read_text().splitlines()]


def run(workdir, steps, resumed=0, scale=1.0, **options):
    """Writes a record for each step after `resumed`, and leaves as a killed run does: nothing closed."""
    written = metrics.open_metrics(workdir, steps, resumed, **{"tensorboard": False, **options})
    for step in range(resumed + 1, steps + 1):
        written.write(step, {**RECORD, "loss": scale * step})
    return written


def events(workdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(workdir)).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_the_fields_of_a_record_are_the_designs():
    assert tuple(RECORD) == metrics.TRAINING and tuple(VALIDATION) == metrics.VALIDATION


numbers = st.floats() | st.integers(-(2**60), 2**60) | st.none()
values = st.dictionaries(st.text(min_size=1, max_size=8), numbers | st.lists(numbers, max_size=4), max_size=5)


@settings(max_examples=60, deadline=None)
@given(written=st.lists(values, max_size=5))
def test_every_line_is_strict_json_with_the_values(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    sink = metrics.JsonLines(path)
    for step, record in enumerate(written):
        sink.write(step, record)
    # Before it is closed: each line is on the disk when it is written.
    read = lines(path)
    sink.close()

    def plain(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    for step, (record, line) in enumerate(zip(written, read, strict=True)):
        expected = {k: [plain(x) for x in v] if isinstance(v, list) else plain(v) for k, v in record.items()}
        assert line == {"step": step, **expected}


def test_a_resumed_run_has_each_step_once(tmp_path):
    run(tmp_path, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # torn by the kill
    resumed = run(tmp_path, 9, resumed=4, scale=10.0)
    resumed.write(9, VALIDATION)
    expected = [1, 2, 3, 4, 50, 60, 70, 80, 90]
    read = lines(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in read[:-1]] == list(zip(range(1, 10), expected, strict=True))
    assert read[-1] == {"step": 9, **VALIDATION}
    assert read == metrics.read_jsonl(tmp_path / "metrics.jsonl")


def test_a_run_that_starts_again_from_the_start_drops_all(tmp_path):
    first = run(tmp_path, 3)
    first.write(0, VALIDATION)
    run(tmp_path, 2, scale=10.0)
    assert [r["loss"] for r in lines(tmp_path / "metrics.jsonl")] == [10, 20]


def test_last_goes_on_over_a_resume(tmp_path):
    first = run(tmp_path, 3)
    assert first.last("samples_skipped") == 0 and first.last("other", 5) == 5
    first.write(4, {**RECORD, "samples_skipped": 2})
    first.write(4, VALIDATION)
    assert run(tmp_path, 4, resumed=4).last("samples_skipped") == 2
    assert run(tmp_path, 3, resumed=3).last("samples_skipped") == 0


def test_tensorboard_shows_each_step_once(tmp_path):
    run(tmp_path, 7, tensorboard=True).__exit__()
    with run(tmp_path, 9, resumed=4, scale=10.0, tensorboard=True) as resumed:
        resumed.write(9, VALIDATION)
    scalars = events(tmp_path)
    expected = list(zip(range(1, 10), [1, 2, 3, 4, 50, 60, 70, 80, 90], strict=True))
    assert scalars["train/loss"] == expected
    assert [step for step, _ in scalars["train/tokens_per_s"]] == list(range(1, 10))
    assert scalars["validation/loss"] == [(9, pytest.approx(0.7))]
    assert scalars["validation/loss_by_timestep/2"] == [(9, pytest.approx(0.9))]
    assert "train/mfu" not in scalars and "validation/loss_by_timestep/0" not in scalars


def test_tensorboard_forgets_a_run_that_starts_again(tmp_path):
    run(tmp_path, 3, tensorboard=True).__exit__()
    run(tmp_path, 2, scale=10.0, tensorboard=True).__exit__()
    assert events(tmp_path)["train/loss"] == [(1, 10), (2, 20)]


def test_close_draws_and_sums_up(tmp_path):
    written = run(tmp_path, 4)
    for step, loss in ((2, 0.9), (3, 0.6), (4, 0.8)):
        written.write(step, {"validation_loss": loss})
    written.write(5, {**RECORD, "loss": 0.5, "images_per_s": 7.0, "peak_memory_gib": 7.5, "samples_skipped": 3})
    summary = written.close(device="cpu")
    assert strictly((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert 0 <= summary.pop("wall_time_s") < 60
    assert summary.pop("versions") == metrics.versions()
    assert summary == {
        "steps": 5,
        "final_loss": 0.5,
        "last_validation_loss": 0.8,
        "best_validation_loss": 0.6,
        "best_validation_step": 3,
        "images_per_s_median": 0.26,
        "time_share_median": RECORD["time_share"],
        "peak_memory_gib": 7.5,
        "samples_skipped": 3,
        "device": "cpu",
    }


def test_a_summary_of_little():
    empty = metrics.summarize([], 1.5)
    assert empty["steps"] == 0 and empty["final_loss"] is None and empty["wall_time_s"] == 1.5
    diverged = metrics.summarize([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None, "validation_loss": None}], 1.0)
    assert diverged["steps"] == 2 and diverged["final_loss"] is None and diverged["last_validation_loss"] is None


def test_versions_are_those_that_run():
    versions = metrics.versions()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["flux_func"]


def test_write_json_is_strict_and_whole(tmp_path):
    metrics.write_json(tmp_path / "a.json", {"x": [1.5, math.nan, {"y": -math.inf}], "z": "é"})
    assert strictly((tmp_path / "a.json").read_text()) == {"x": [1.5, None, {"y": None}], "z": "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            RECORD,
            "loss 1.0234  grad 0.51  lr 1.0e-04  0.26 img/s  134 tok/s  0.19 TFLOP/s  mem 6.1 GiB  data 0.01 s",
        ),
        (
            {"loss": math.nan, "tokens_per_s": 1234567.8, "mfu": 0.4321, "samples_skipped": 2},
            "loss nan  1,234,568 tok/s  mfu 43.2%  skipped 2",
        ),
        (VALIDATION, "validation loss 0.7000  by timestep null 0.500 0.900"),
    ],
)
def test_console_line(values, line):
    assert metrics.console_line(values) == line


def test_the_console_is_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    written = run(tmp_path, 3)
    written.advance(3)
    written.say("checkpoint 3 saved")
    written.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("step 1/3  loss 1.0000  grad 0.51")
    assert out.splitlines()[-1] == "checkpoint 3 saved"
    assert len(out.splitlines()) == 4 and all(c.isprintable() or c == "\n" for c in out)


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console = metrics.Console(20, resumed=5)
    console.write(6, {"loss": 1.0})
    console.advance(10)
    console.advance(9)
    console.close()
    out, err = capsys.readouterr()
    assert out == "step 6/20  loss 1.0000\n"
    assert "5/20" in err and "10/20" in err.split("\r")[-1]


def test_weights_and_biases_missing_is_one_line(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "wandb":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"metrics.wandb is 'ours': .*: pip install flux-func\[wandb\], or set"):
        metrics.open_metrics(tmp_path, 3, wandb="ours")
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    begun, logged, ended = [], [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: ended.append(1))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run(tmp_path, 2, wandb="ours", config={"train": {"steps": 2}}).close()
    run(tmp_path, 3, resumed=2, wandb="ours").close()
    assert [options["project"] for options in begun] == ["ours", "ours"] and ended == [1, 1]
    assert begun[0]["id"] == begun[1]["id"] and begun[1]["resume"] == "allow"
    assert begun[0]["config"] == {"train": {"steps": 2}}
    assert [(record["step"], record["train/loss"]) for record in logged] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_peak_memory_is_a_peak():
    before = metrics.peak_memory_gib()
    ballast = torch.ones(2**25)  # 128 MiB
    after = metrics.peak_memory_gib("cpu")
    del ballast
    assert 0.05 < before <= after < 1024
    assert metrics.peak_memory_gib() >= after


def test_one_bad_sink_leaves_the_others_written(tmp_path):
    # Sinks are closed in turn by the context manager when the run fails, and again by nobody.
    closed = []
    sink = SimpleNamespace(write=lambda step, values: None, close=lambda: closed.append(1))
    with pytest.raises(RuntimeError), metrics.Metrics(tmp_path, [sink], metrics.Console(1)) as written:
        written.write(1, RECORD)
        raise RuntimeError
    written.__exit__()
    assert closed == [1]
