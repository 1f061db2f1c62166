import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from flux_func import bench_main
from flux_func.bench import cases, measure, process, report
from flux_func.models import flops
from tests.helpers import tiny_bench, tiny_run

TINY = ("--flavor=flux-tiny", "--depth=1", "--image_size=32", "--tokens=5", "--rounds=2", "--warmup=2", "--device=cpu")
MODEL = tiny_bench.case().cfg


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the program runs in, with another for what it writes and removes."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(bench_main.tempfile, "tempdir", str(scratch))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert not list(scratch.iterdir())


def stand_in(monkeypatch, step):
    """Has `step(peer)` answer in the place of processes."""

    @contextlib.contextmanager
    def started(peer, python, request, cache=None):
        usual = {"seconds": 0.5, "loss": 1.0, "peak_bytes": 10, "kept_bytes": 3}
        yield lambda: {"about": {}, "imported_bytes": 1}, lambda: usual | (step(peer) or {})

    monkeypatch.setattr(process, "started", started)


def test_end_to_end(folder, capfd):
    assert tiny_run.program(bench_main, *TINY) == 0
    out, err = capfd.readouterr()
    where = folder / "bench" / "000"
    assert sorted(path.name for path in where.iterdir()) == ["bench.json", "bench.png", "bench.txt"]
    assert out == f"{(where / 'bench.txt').read_text()}\nbench/000/bench.json\n"
    assert "diffusers: timed" in err
    saved = json.loads((where / "bench.json").read_text())
    assert [row["side"]["peer"] for row in saved["rows"]] == ["ours", "bfl", "diffusers"]
    assert saved["peers"]["diffusers"]["versions"]["diffusers"] == "0.42.1"
    assert saved["peers"]["bfl"]["versions"]["fluxbfl"] == "0.0.3"
    first, *others = saved["rows"]
    for row in saved["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["losses"] == pytest.approx(first["losses"], rel=1e-5) and row["losses"][1] < row["losses"][0]
        assert row["peak_bytes"] > row["imported_bytes"] + row["kept_bytes"]
        assert row["kept_bytes"] == pytest.approx(12 * flops.parameters(MODEL), rel=1e-4)
    assert {row["to"] for row in saved["rows"]} == {min(others, key=lambda row: row["median"])["side"]["peer"]}


def test_lists_are_every_combination(folder, monkeypatch, capfd):
    stand_in(monkeypatch, lambda peer: None)
    monkeypatch.setattr(report, "draw", lambda rows, path: path.touch())
    lists = ("--depth=1,1+3", "--batch=1,2", "--tokens=4,5", "--image_size=32,48", "--work=forward,compile")
    assert tiny_run.program(bench_main, "--peers=ours,bfl", TINY[0], *lists, "--device=cpu") == 0
    rows = json.loads((folder / "bench" / "000" / "bench.json").read_text())["rows"]
    assert len({json.dumps([row["case"], row["side"]]) for row in rows}) == len(rows) == 2**5 * 2
    assert {tuple(row["case"]["depth"]) for row in rows} == {(1, 1), (1, 3)}
    assert "1+3 after 1+1 takes 1.000 times the seconds" in capfd.readouterr().out


def test_reports_are_numbered(folder, monkeypatch):
    stand_in(monkeypatch, lambda peer: None)
    for number in range(2):
        assert tiny_run.program(bench_main, *TINY, "--peers=ours") == 0
        assert [path.name for path in sorted((folder / "bench").iterdir())][number] == f"00{number}"


def test_types_and_policies_are_sides_of_one_case(folder, monkeypatch):
    stand_in(monkeypatch, lambda peer: None)
    given = ("--peers=ours,bfl", "--dtype=float32,bfloat16", "--remat=none,full", "--out=out")
    assert tiny_run.program(bench_main, *TINY, *given) == 0
    rows = json.loads((folder / "out" / "bench.json").read_text())["rows"]
    names = [(row["side"]["peer"], row["side"]["remat"], row["side"]["dtype"]) for row in rows]
    of_type = [("ours", "none"), ("ours", "full"), ("bfl", "none")]
    assert names == [(*side, dtype) for dtype in ("float32", "bfloat16") for side in of_type]


def test_a_flavor_left_alone_has_its_own_depth(folder, monkeypatch):
    stand_in(monkeypatch, lambda peer: None)
    assert tiny_run.program(bench_main, "--peers=ours", "--flavor=flux-tiny,flux-digits", "--device=cpu") == 0
    rows = json.loads((folder / "bench" / "000" / "bench.json").read_text())["rows"]
    assert [row["case"]["depth"] for row in rows] == [[2, 2], [2, 4]]


def test_a_disagreement_is_exit_code_1_and_no_report(folder, monkeypatch, capfd):
    stand_in(monkeypatch, lambda peer: {"loss": 1.0 if peer == "ours" else 1.01})
    assert tiny_run.program(bench_main, *TINY) == 1
    out, err = capfd.readouterr()
    line = "train_step of flux-tiny 1+1: batch 2, 32 pixels, 5 tokens: loss of step 1 is 1 of ours and 1.01 of bfl"
    assert err.splitlines()[-1].startswith(f"bench_main: {line}, 1.0e-02 apart") and out == ""
    assert not list(folder.iterdir())


def test_a_weight_that_differs_is_found(folder, monkeypatch, capfd):
    """Of real processes, one of which is given other weights."""
    write = cases.write_weights

    def wrong(cfg, peers, seed, folder):
        (folder / "other").mkdir()
        return write(cfg, peers, seed, folder) | write(cfg, ["bfl"], seed + 1, folder / "other")

    monkeypatch.setattr(cases, "write_weights", wrong)
    assert tiny_run.program(bench_main, *TINY, "--peers=ours,bfl", "--work=forward") == 1
    assert "of bfl" in capfd.readouterr().err and not list(folder.iterdir())


def test_a_peer_that_is_killed_is_one_line(folder, capfd, monkeypatch):
    monkeypatch.setattr(measure, "_turns", lambda steps, *rest: kill(next(iter(steps.values()))))

    def kill(step):
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
        served = [int(pid) for pid in children.stdout.split() if is_ours(pid)]
        assert len(served) == 1
        os.kill(served[0], signal.SIGKILL)
        step()

    def is_ours(pid):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                return "flux_func.bench.ours" in file.read()
        except FileNotFoundError:
            return False

    assert tiny_run.program(bench_main, *TINY, "--peers=ours") == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert "--peers has 'ours': its process was ended by SIGKILL (out of memory?): " in err
    assert not list(folder.iterdir())


def test_a_signal_ends_it_and_leaves_nothing(folder, monkeypatch):
    stand_in(monkeypatch, lambda peer: os.kill(os.getpid(), signal.SIGTERM))
    assert tiny_run.program(bench_main, *TINY) == 128 + signal.SIGTERM
    assert not list(folder.iterdir())


BAD = [
    ("--peers=ours,bfi", "--peers is 'ours,bfi': did you mean 'bfl'? should be one of 'ours', 'bfl',"),
    ("--peers=", "--peers is '': should be one of 'ours', 'bfl', 'diffusers', 'torchtitan'"),
    ("--peers=bfl,bfl", "--peers names one twice: leave one of them out"),
    ("--flavor=flux-debg", "--flavor is 'flux-debg': did you mean 'flux-debug'?"),
    ("--work=forwards", "--work is 'forwards': did you mean 'forward'?"),
    ("--depth=1+2+3", "--depth is '1+2+3': should be numbers of blocks, such as 4, or 19+38"),
    ("--depth=2,x", "--depth is '2,x': should be numbers of blocks"),
    ("--depth=0", "--depth is '0': should be numbers of blocks"),
    ("--depth=2,2+2", "--depth names one twice"),
    ("--image_size=32,40", "--image_size is '32,40': should be numbers from 16 on, multiples of 16, such as 256"),
    ("--image_size=", "--image_size is '': should be numbers from 16 on"),
    ("--tokens=0", "--tokens is '0': should be numbers from 1 on, such as 16"),
    ("--batch=1,-2", "--batch is '1,-2': should be numbers from 1 on"),
    ("--batch=1.5", "--batch is '1.5': should be numbers from 1 on"),
    ("--dtype=float16", "--dtype is 'float16': did you mean 'bfloat16'?"),
    ("--remat=some", "--remat is 'some': should be one of 'none', 'full'"),
    ("--remat=full --work=forward", "--remat is 'full': is ours, and of train_step and compile alone; leave it out"),
    ("--remat=full --peers=bfl", "--remat is 'full': is ours, and of train_step and compile alone; leave it out"),
    ("--steps=0", "flag --steps=0"),
    ("--rounds=0", "flag --rounds=0"),
    ("--warmup=0", "flag --warmup=0"),
    ("--seed=x", "flag --seed=x"),
    ("--device=tpu", "flag --device=tpu"),
    ("--device=cuda", "--device is 'cuda': torch finds no such device here; use --device=cpu"),
    ("--compile=perhaps", "flag --compile=perhaps"),
    ("--out=full", "full: is there already; choose another path"),
    ("--reference_python=python", "--reference_python is 'python': is torchtitan's, and --peers has none; leave it"),
    ("--peers=torchtitan --reference_python=/no/python", "--reference_python is '/no/python': cannot be run"),
    ("--peers=torchtitan", "--peers has 'torchtitan': "),
    ("--peers=torchtitan --work=sample", "--work is 'sample': torchtitan always shifts its sampler's schedule"),
    ("--peers=torchtitan --flavor=flux-dev", "--flavor is 'flux-dev': torchtitan has no guidance embedding"),
    ("extra", "argument 'extra' is not a flag"),
]


@pytest.mark.parametrize(("given", "line"), BAD, ids=[given for given, _ in BAD])
def test_what_a_user_can_put_right_is_one_line_before_anything_is_done(given, line, folder, capfd, monkeypatch):
    if given == "--peers=torchtitan" and process.parity.importlib.util.find_spec("torchtitan"):
        pytest.skip("torchtitan is installed here")
    if given == "--device=cuda" and cases.torch.cuda.is_available():
        pytest.skip("there is one here")
    monkeypatch.setattr(report, "available_bytes", lambda: 2**50)
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("kept")
    assert line in tiny_run.refused(capfd, folder, bench_main, *TINY, *given.split())


def test_what_memory_does_not_hold_is_refused(folder, capfd, monkeypatch):
    monkeypatch.setattr(report, "available_bytes", lambda: 2**33)
    line = tiny_run.refused(capfd, folder, bench_main, "--device=cpu")
    assert "--peers: train_step of flux-debug 2+2" in line and "8.0 GiB are free" in line


def test_help_answers_from_the_command_line(folder):
    root = os.path.dirname(os.path.dirname(bench_main.__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "flux_func.bench_main", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, env=env)
    assert answer.returncode == 0 and "--peers: Of ours,bfl,diffusers,torchtitan" in answer.stdout
    assert "kept (weights and moments, counted)" in answer.stdout
