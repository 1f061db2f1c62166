"""What cannot be honoured under torchrun: one rank says so in one line, all end, and nothing is written."""

import re
import shutil
import sys

import pytest

from tests.helpers import launch, tiny_run

SHARDED = "--config.parallel.shard"


def refused(tmp_path, *program, **environment):
    """Launches two ranks that should refuse; returns the one line that they say."""
    logs, before = tmp_path / "logs", tiny_run.snapshot(tmp_path / "run")
    logs.mkdir()
    done = launch.end(launch.begin([*launch.options(logs), "--max-restarts=2", *program], **environment), logs)
    assert done.code != 0 and done.seconds < 30, done
    assert "".join(done.out) == "" and "Traceback" not in "".join(done.err)
    [line] = "".join(done.err).splitlines()
    assert not list(logs.rglob("attempt_1")), "it was started again"
    assert tiny_run.snapshot(tmp_path / "run") == before
    name, _, said = line.partition(": error: ")
    assert name == "train_main.py"
    return said


def train(tmp_path, *more):
    return [*tiny_run.arguments(tmp_path / "run"), "--device=cpu", *more]


def by_rank(tmp_path, *more):
    """A command in which $RANK is each rank's own."""
    words = " ".join([sys.executable, "-m", "flux_func.train_main", *train(tmp_path, *more)])
    return ["--no-python", "bash", "-c", f"exec {words}"]


REFUSED = {
    "mesh": (
        "parallel.shard=3",
        "parallel is replicate=1 x shard=3 x context=1: does not make up the 2 processes there are; would: ",
    ),
    "batch": ("train.batch_size=3", "train.batch_size is 3: "),
    "axis": ('parallel.params=(("*",{"shrad":0}),)', "parallel.params has the row "),
    "flag": ("train.step=3", "train.step is no field of the config: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_the_ranks(tmp_path, case):
    field, said = REFUSED[case]
    line = refused(tmp_path, "-m", "flux_func.train_main", *train(tmp_path, f"--config.{field}"))
    assert line.startswith(said), line


def test_heads_or_a_sequence_that_does_not_divide(tmp_path):
    more = ["--config.parallel.shard=1", "--config.parallel.context=2", "--config.text.max_length=5"]
    line = refused(tmp_path, "-m", "flux_func.train_main", *train(tmp_path, *more))
    assert line.startswith(
        "parallel.context is 2: does not divide the 5 tokens that text.max_length comes to; degrees that "
    )


def test_ranks_with_different_settings(tmp_path):
    line = refused(tmp_path, *by_rank(tmp_path, "--config.train.seed=$RANK"))
    assert line.startswith(
        "train.seed is 0 on rank 0 and 1 on rank 1: every rank should be started by the same command"
    )


def test_ranks_with_different_code(tmp_path):
    shutil.copytree(tiny_run.ROOT / "flux_func", tmp_path / "0" / "flux_func")
    shutil.copytree(tiny_run.ROOT / "flux_func", tmp_path / "1" / "flux_func")
    with (tmp_path / "1" / "flux_func" / "random.py").open("a") as file:
        file.write("# another version\n")
    command = by_rank(tmp_path)
    command[-1] = command[-1].replace("exec ", f"cd {tmp_path}/$RANK; PYTHONPATH=. exec ", 1)
    line = refused(tmp_path, *command)
    hashes = re.match(r"the code is 'flux_func (\w+), torch (\S+)' on rank 0 and 'flux_func (\w+), torch \2' on ", line)
    assert hashes and hashes[1] != hashes[3]


def test_a_master_that_is_not_there(tmp_path):
    port, address = launch.free_port(), "127.0.0.1"
    command = by_rank(tmp_path)
    variables = f"MASTER_ADDR={address} MASTER_PORT={port} FLUX_FUNC_JOIN_SECONDS=2 "
    command[-1] = command[-1].replace("exec ", f"export {variables}; exec ", 1)
    process = launch.begin([*launch.options(tmp_path / "logs"), *command])
    done = launch.end(process, tmp_path / "logs")
    assert done.code != 0 and done.seconds < 30
    for rank in (0, 1):  # with no place to meet at, each has to say it
        [line] = done.err[rank].splitlines()
        assert line.startswith(f"train_main.py: error: MASTER_ADDR:MASTER_PORT is {address}:{port}: cannot be reached")
    assert not (tmp_path / "run").exists()
