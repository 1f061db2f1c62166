"""Runs that lose a rank, or half of their replicas, come back by themselves with the losses of one that lost none."""

import os
import signal

import pytest

from tests.helpers import launch, tiny_run

FIELDS = {
    "model.init": "nonzero",
    "train.steps": 14,
    "train.batch_size": 4,
    "checkpoint.every": 4,
    "parallel.replicate": -1,
    "parallel.shard": 1,
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of one process that nothing happens to."""
    fields = {name: value for name, value in FIELDS.items() if not name.startswith("parallel")}
    return tiny_run.losses(tiny_run.train(tmp_path_factory.mktemp("unbroken"), fields))


def program(workdir, **more):
    return ["-m", "flux_func.train_main", *tiny_run.arguments(workdir, FIELDS | more), "--device=cpu"]


def assert_same(workdir, unbroken):
    found = tiny_run.losses(tiny_run.records(workdir))
    assert [step for step, *_ in found] == [step for step, *_ in unbroken]
    for (step, loss, norm), (_, loss_1, norm_1) in zip(found, unbroken, strict=True):
        assert loss == pytest.approx(loss_1, rel=1e-6) and norm == pytest.approx(norm_1, rel=1e-5), step


def test_a_killed_rank_comes_back_with_the_others(tmp_path, unbroken):
    workdir, logs = tmp_path / "run", tmp_path / "logs"
    command = launch.options(logs, 2, "--standalone", "--max-restarts=2")
    process = launch.begin([*command, *program(workdir, **{"parallel.shard": 2})])
    launch.wait_until(process, logs, "step 6/")  # the checkpoint of step 4 may be under way
    launch.kill(process, 1)
    done = launch.end(process, logs)
    assert done.code == 0, done
    assert "exitcode: -9" in done.console and len(list(logs.rglob("attempt_*/0/stdout.log"))) == 2
    assert_same(workdir, unbroken)


def test_a_lost_node_leaves_half_the_replicas_which_go_on(tmp_path, unbroken):
    workdir, end = tmp_path / "run", f"127.0.0.1:{launch.free_port()}"
    # Seconds after which a node that is silent is given up, and in which another may come.
    patience = "--rdzv-conf=last_call_timeout=8,keep_alive_interval=2,keep_alive_max_attempt=3"
    how = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint={end}", "--rdzv-id=e", patience, "--max-restarts=2"]
    nodes = []
    for name in ("a", "b"):
        command = [*launch.options(tmp_path / name, 1, *how), *program(workdir)]
        nodes.append(launch.begin(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))  # docs/scaling.md says why
        if name == "a":
            launch.wait_for_listener(end)  # this node keeps the store, and is to survive
    launch.wait_until(nodes[0], tmp_path, r"replicate=2[\s\S]*step 6/")  # on whichever node rank 0 is
    [rank] = launch.ranks_of(nodes[1])
    for pid in (nodes[1].pid, rank):
        os.kill(pid, signal.SIGKILL)
    nodes[1].communicate()
    done = launch.end(nodes[0], tmp_path / "a", 1)
    assert done.code == 0, done
    assert_same(workdir, unbroken)
