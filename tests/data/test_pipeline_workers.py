"""Worker processes: the same batches as by threads, errors that arrive, and an end with their parent's."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from flux_func.data import pipeline, sources
from flux_func.errors import UserError
from tests.helpers import tiny_data
from tests.helpers.tiny_data import members, tokenize, write_tar

ROOT = pathlib.Path(__file__).parents[2]


def settings(path, workers):
    return tiny_data.settings(source="wds", path=str(path), validation_fraction=0.0, workers=workers)


def open_batches(path, workers):
    config = settings(path, workers)
    return pipeline.batches(config, sources.build(config, "train"), tokenize, batch_size=3, start_step=2)


def worker_processes():
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_workers_give_what_threads_give_until_they_are_killed(tmp_path):
    files = members(7)
    files["002.png"] = b"broken"
    path = write_tar(tmp_path / "a.tar", files)
    threads, processes = open_batches(path, 0), open_batches(path, 2)
    skipped = 0
    for ours, theirs in itertools.islice(zip(threads, processes, strict=True), 5):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert type(value) is type(theirs[key])  # plain arrays, not grain's in shared memory
            np.testing.assert_array_equal(value, theirs[key])
        skipped += len(ours["skipped"])
    assert skipped > 0
    threads.close()
    workers = worker_processes()
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(UserError, match="^data.workers is 2: should be smaller, .*exit code -9"):
        list(itertools.islice(processes, 9))
    assert not worker_processes()


def test_a_users_error_arrives_from_a_worker(tmp_path):
    files = {name: b"" if name.endswith("png") else data for name, data in members(3).items()}
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError) as caught:
        next(open_batches(path, 1))
    message = str(caught.value)
    assert message.startswith(f"data.path is {str(path)!r}: every sample is unusable (3 tried), such as {path}:")
    assert message.endswith(": not an image")


PROGRAM = """
import multiprocessing, os, sys
from absl import app
from flux_func.data import pipeline, sources
from tests.helpers import tiny_data

def main(argv):
    config = tiny_data.settings(source="wds", path=argv[1], validation_fraction=0.0, workers=1)
    batches = pipeline.batches(config, sources.build(config, "train"), tiny_data.tokenize, batch_size=3)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for line in sys.stdin:
        print(next(batches)["position"][0], flush=True)

if __name__ == "__main__":
    app.run(main)
"""


@pytest.fixture
def program(tmp_path):
    """Starts a console script that reads by a worker; returns it and the worker."""
    script = tmp_path / "program"
    script.write_text(PROGRAM)
    path = write_tar(tmp_path / "a.tar", members(4))
    command = [sys.executable, str(script), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
    yield process, psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()


def ask(process):
    process.stdin.write("next\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_a_worker_outlives_signals_but_not_its_parent(program):
    process, worker = program
    for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal or a scheduler sends them to all of a job
        worker.send_signal(number)
    assert [ask(process) for _ in range(6)] == [3, 6, 9, 12, 15, 18]
    process.kill()
    process.wait()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_an_end_without_close_is_quiet(program):
    process, worker = program
    out, error = process.communicate("next\n")
    assert (out, error, process.returncode) == ("3\n", "", 0)
    assert not worker.is_running()
