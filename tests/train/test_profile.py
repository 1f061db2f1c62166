import gzip
import itertools
import json
import types

import pytest
import torch

from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.train import metrics, profile
from tests.helpers import rank_runs, ranks, tiny_run
from tests.helpers.tiny_run import CPU, losses, train

PHASES = {"data", "encode", "compute", "optimizer"}
STAGES = [stage.name for stage in flux.chain(flux.flavor("flux-tiny")) if stage.keys]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Half of a tiny run's time is curves.png."""
    monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)


def read(path):
    """The complete events of a trace: [(name, start, duration)], in microseconds."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [(event["name"], event["ts"], event["dur"]) for event in events if event.get("ph") == "X"]


def test_a_run_leaves_a_trace_with_its_stages_and_a_table_which_it_prints(tmp_path, capfd):
    plain = losses(train(tmp_path / "plain", {"train.steps": 5}))
    capfd.readouterr()
    assert losses(train(tmp_path / "run", {"train.steps": 5, "profile.steps": 2})) == plain
    out, err = capfd.readouterr()
    folder = tmp_path / "run" / "profile" / "step_000003"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0.json.gz", "top_operations.txt"]
    table = (folder / "top_operations.txt").read_text()
    assert table in out and f"{folder} holds the trace" in out
    # How much torch's profiler logs it reads once in a process, and a test before this one may have profiled.
    assert [line for line in err.splitlines() if not line.startswith("USDT:")] == []
    events = read(folder / "rank_0.json.gz")
    names = [name for name, *_ in events]
    once_a_step = [*PHASES, *STAGES, *(f"{name} backward" for name in STAGES)]
    assert {name: names.count(name) for name in once_a_step} == dict.fromkeys(once_a_step, 2)
    assert "gather" not in names and "reduce" not in names
    # Matrix products are inside of the stages' events, and those inside of compute's.
    spans = {kind: [(start, start + long) for name, start, long in events if name == kind] for kind in set(names)}
    stages = [span for name in once_a_step[len(PHASES) :] for span in spans[name]]
    for inner, outer in ((spans["aten::addmm"], stages), (stages, spans["compute"])):
        assert all(any(a <= start and end <= b for a, b in outer) for start, end in inner)


def test_the_table_is_of_what_was_traced(tmp_path):
    train(tmp_path, {"train.steps": 4, "profile.steps": 1})
    folder = tmp_path / "profile" / "step_000003"
    lines = (folder / "top_operations.txt").read_text().splitlines()
    assert len(lines) == 1 + profile.TOP + 1 and lines[0].split() == ["operation", "ms", "a", "step", "calls", "share"]
    rows = [line.rsplit(maxsplit=3) for line in lines[1:]]
    assert sum(float(share.rstrip("%")) for *_, share in rows) == pytest.approx(100, abs=0.6)
    # Linears: 20 of the double blocks, 6 of the single ones, 6 of the stem and 2 of the head. Two products for the
    # gradients of each, but for the inputs of those four that see the batch.
    counts = {name: calls for name, _, calls, _ in rows}
    assert counts["aten::addmm"] == "34" and counts["aten::mm"] == "64"
    assert all(float(ms.replace(",", "")) > 0 for _, ms, *_ in rows)


def test_every_process_leaves_a_trace_with_what_it_gathers_and_reduces(tmp_path):
    mesh = {"replicate": 1, "shard": 2, "context": 1}
    ranks.run(2, rank_runs.train, str(tmp_path), mesh, {"train.steps": 3, "profile.steps": 1})
    folder = tmp_path / "profile" / "step_000003"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank_0.json.gz",
        "rank_1.json.gz",
        "top_operations.txt",
    ]
    for rank in (0, 1):
        names = {name for name, *_ in read(folder / f"rank_{rank}.json.gz")}
        assert {*PHASES, *STAGES, "gather", "reduce"} <= names


def test_a_run_that_is_stopped_writes_what_it_has(tmp_path):
    calls = itertools.count()
    fields = {"train.steps": 9, "profile.steps": 6}
    train(tmp_path, fields, stop=lambda: "SIGTERM" * (next(calls) > 3))
    folder = tmp_path / "profile" / "step_000003"
    steps = [name for name, *_ in read(folder / "rank_0.json.gz") if name.startswith("ProfilerStep")]
    assert 1 <= len(steps) < 6
    assert "aten::addmm" in (table := (folder / "top_operations.txt").read_text()) and "  34  " in table
    # Resumed, it is other steps that are traced.
    train(tmp_path, {"train.steps": 9, "profile.steps": 1})
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["step_000003", "step_000007"]


def test_more_steps_than_there_are_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="profile.steps is 3: .*train.steps, which is 4, should be at least 5"):
        train(tmp_path / "run", {"profile.steps": 3})
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run")
    before = tiny_run.snapshot(tmp_path / "run")
    with pytest.raises(UserError, match="after step 4 and 2 more, .*train.steps, which is 6, should be at least 7"):
        train(tmp_path / "run", {"train.steps": 6, "profile.steps": 1})
    assert tiny_run.snapshot(tmp_path / "run") == before


def event(key, cpu, gpu, count, there="CPU", named=False):
    """One of torch's profiler's events, times in microseconds."""
    kind = types.SimpleNamespace(name=there)
    times = {"self_cpu_time_total": cpu, "self_device_time_total": gpu}
    return types.SimpleNamespace(key=key, count=count, device_type=kind, is_user_annotation=named, **times)


EVENTS = [
    event("ProfilerStep*", 5000, 0, 3, named=True),
    event("optimizer", 5000, 0, 2, named=True),
    event("optimizer", 0, 9000, 2, "CUDA", named=True),
    event("double_blocks.0", 700, 0, 2, named=True),
    event("aten::mm", 1000, 6000, 8),
    event("aten::mul", 3000, 2000, 4),
    event("aten::empty", 0, 0, 4),
    event("gemm" + "_" * 100, 0, 6000, 8, "CUDA"),
    event("elementwise", 0, 2000, 4, "CUDA"),
]


def test_of_a_cpu_it_is_operations_and_of_a_gpu_its_kernels():
    of_cpu = [("aten::mul", 1.5, 2.0, 0.75), ("aten::mm", 0.5, 4.0, 0.25)]
    assert profile.operations(EVENTS, CPU) == of_cpu
    name = ("gemm" + "_" * 100)[: profile.LONGEST_NAME]
    of_gpu = [(name, 3.0, 4.0, 0.75), ("elementwise", 1.0, 2.0, 0.25)]
    assert profile.operations(EVENTS, torch.device("cuda")) == of_gpu


def test_what_is_not_among_the_first_is_added_up():
    rows = [profile.Row(f"operation {i}", 40.0 - i, 1000.0 * i, 0.05) for i in range(12)]
    lines = profile.table(rows).splitlines()
    assert lines[1].split() == ["operation", "0", "40.00", "0", "5.0%"]
    assert lines[10].split() == ["operation", "9", "31.00", "9,000", "5.0%"]
    assert lines[11].split() == ["2", "others", "59.00", "21,000", "10.0%"]
    assert len({len(line) for line in lines}) == 1
    assert profile.table(rows[:3]).splitlines()[-1].split() == ["0", "others", "0.00", "0", "0.0%"]
