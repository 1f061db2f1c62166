"""plan_main as a user calls it."""

import json

import pytest

from flux_func import plan_main
from tests.helpers import tiny_run

DEV = ("--config=configs/flux_dev.py", "--config.model.flavor=flux-tiny", "--config.data.image_size=64")
TINY = (*DEV, "--config.text.kind=hash", "--config.text.max_length=8", "--config.autoencoder.kind=dct")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Programs run where the configs are, and write to a folder of the test's own."""
    monkeypatch.chdir(tiny_run.ROOT)
    monkeypatch.setattr(plan_main.tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("plan_*"))


def planned(*args, code=0):
    assert tiny_run.program(plan_main, *args) == code


def test_a_mesh_and_its_trace(capfd, tmp_path):
    out = tmp_path / "plan.json"
    planned(*TINY, "--mesh=replicate=2,shard=16,context=2", "--trace", f"--json={out}", "--device=h100")
    said = capfd.readouterr().out
    assert "replicate=2 x shard=16 x context=2: a process has params" in said
    assert "double_blocks.*_attn.qkv.weight (x4)" in said and "dimension 0 over shard=16 x context=2" in said
    assert "64 h100, 8 to a node; batch 256: 1 x 8 on a process" in said
    assert "fits: h100 has 79.65 GiB" in said
    rows = [line.split() for line in said.rpartition("planned")[2].splitlines()[1:] if line]
    assert rows and all(row[-1] == row[-2] for row in rows[:1] + rows[2:])
    (saved,) = json.loads(out.read_text())["plans"]
    assert saved["mesh"] == {"replicate": 2, "shard": 16, "context": 2} and saved["fits"]
    assert saved["seconds"]["step"] == pytest.approx(saved["seconds"]["compute"] + saved["seconds"]["exposed"])
    kinds = {(row["collective"], row["over"]): row for row in saved["sent"]}
    reduced = kinds["all_reduce", "replicate"]
    # Each of the two is in another node than the other.
    assert reduced["between_nodes"] == reduced["bytes"] > 0
    assert 0 < kinds["all_gather", "shard x context"]["between_nodes"] < kinds["all_gather", "shard x context"]["bytes"]


def test_encoders_are_flux_own_where_none_are_named(capfd, tmp_path):
    out = tmp_path / "plan.json"
    planned(*DEV, "--mesh=shard=4", "--config.train.batch_size=8", f"--json={out}")
    frozen = json.loads(out.read_text())["plans"][0]["bytes"]["frozen"]
    # T5 v1.1 XXL's encoder, CLIP-L's text model and the autoencoder, in bfloat16.
    assert frozen["T5"] == pytest.approx(4_762_310_656 * 2 / 4, rel=1e-6)
    assert frozen["CLIP"] == 123_060_480 * 2
    assert frozen["autoencoder"] == 83_819_683 * 2
    assert "T5, frozen" in capfd.readouterr().out


def test_all_meshes_the_cheapest_first(capfd, tmp_path):
    out = tmp_path / "plan.json"
    planned(*TINY, "--processes=4", f"--json={out}", "--config.remat.policy=none")
    plans = json.loads(out.read_text())["plans"]
    assert len(plans) == 6
    seconds = [plan["seconds"]["step"] for plan in plans]
    assert seconds == sorted(seconds)
    said = capfd.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:7]] == [
        ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) for plan in plans
    ]


def test_meshes_that_cannot_be_are_counted(capfd):
    planned(*TINY, "--processes=4", "--config.train.batch_size=2")
    assert "3 meshes cannot be, such as replicate=4,shard=1,context=1: train.batch_size is 2" in capfd.readouterr().out


def test_what_is_left_of_the_processes(capfd):
    planned(*TINY, "--mesh=replicate=-1,shard=4", "--processes=8")
    assert "replicate=2 x shard=4 x context=1" in capfd.readouterr().out


def test_state_in_the_host_s_memory_is_not_the_device_s(tmp_path, capfd):
    found = []
    for offload in (False, True):
        out = tmp_path / f"{offload}.json"
        planned(*TINY, "--mesh=shard=2", f"--config.parallel.offload={offload}", f"--json={out}")
        found.append(json.loads(out.read_text())["plans"][0]["bytes"])
    assert found[0]["state"] == found[1]["state"]
    assert found[0]["in_all"] - found[1]["in_all"] == sum(found[0]["state"].values())
    assert "moments (in the host's memory)" in capfd.readouterr().out


def test_a_lora_over_flux_dev(capfd, tmp_path):
    """Its weights take two bytes a parameter, its own parameters and two moments four each; no weights are needed."""
    out = tmp_path / "plan.json"
    given = ("--config=configs/flux_dev_lora.py", "--config.model.flavor=flux-dev", "--config.train.batch_size=1")
    simple = ("--config.train.accumulate=1", "--config.text.kind=hash", "--config.autoencoder.kind=dct")
    planned(*given, *simple, "--mesh=shard=1", f"--json={out}")
    (saved,) = json.loads(out.read_text())["plans"]
    trained = 76_578_816
    state = saved["bytes"]["state"]
    assert state["base"] == 2 * 11_901_408_320 and state["params"] == 4 * trained
    assert state["opt"] == pytest.approx(8 * trained, rel=1e-6)
    assert saved["bytes"]["in_all"] == pytest.approx(25.6e9, rel=0.01)
    said = capfd.readouterr().out
    assert "under the LoRA, a process has weights 23,802.82 MB" in said and "weights under the LoRA    22.17" in said


def test_what_does_not_fit_is_said_and_is_the_exit_code(capfd):
    big = ("--config=configs/flux_dev.py", "--config.text.kind=hash", "--config.autoencoder.kind=dct")
    planned(*big, "--mesh=replicate=2", "--config.train.batch_size=4", "--device=h100", code=1)
    assert "does not fit: h100 has 79.65 GiB" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "--mesh is not given: should be such as replicate=2,shard=8; or give --processes for all"),
        (("--mesh=shards=8",), "--mesh is 'shards=8': did you mean 'shard'? should be one of"),
        (("--mesh=shard",), "--mesh is 'shard': shard should be a whole number"),
        (("--mesh=shard=-1",), "--mesh is 'shard=-1': -1 is what is left of --processes"),
        (("--mesh=shard=0",), "parallel.shard is 0: should be at least 1"),
        (("--mesh=shard=3", "--processes=8"), "does not make up the 8 processes there are; would: "),
        (
            ("--mesh=shard=4", "--config.train.batch_size=6"),
            "train.batch_size is 6: does not divide into 1 micro-batches",
        ),
        (("--mesh=shard=8", "--device=h20"), "--device is 'h20': did you mean 'h200'? should be one of"),
        (("--mesh=shard=8", "--node=0"), "--node is 0: should be at least 1"),
        (("--mesh=shard=8", "--network_gbps=0"), "--network_gbps is 0.0: should be above 0"),
        (("--processes=0",), "--processes is 0: should be at least 1"),
        (("--mesh=context=16",), "parallel.context is 16: does not divide"),
        (("--mesh=shard=2", "--config.remat.policy=some"), "remat.policy is 'some'"),
        (
            ("--mesh=shard=8", "--json=/nowhere/plan.json"),
            "--json is '/nowhere/plan.json': there is no folder /nowhere",
        ),
        (
            ("--mesh=shard=8", "--config.lora.rank=4", "--config.lora.patterns=('*.attn.qkv',)"),
            "lora.patterns is ('*.attn.qkv',): pattern '*.attn.qkv' fits no path of the tree; the nearest are",
        ),
    ],
)
def test_bad_input_is_one_line(capfd, tmp_path, args, line):
    assert tiny_run.program(plan_main, *TINY, *args) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and line in err
