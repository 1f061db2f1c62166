"""Runs that are signalled or killed as processes, and go on as if they had never been."""

import os
import signal
import subprocess
import sys

import pytest

from flux_func import train_main
from flux_func.train import checkpoint
from tests.helpers import tiny_run
from tests.helpers.tiny_run import losses, records


def start(workdir, fields, **options):
    """Starts the program as a process of its own, with steps without end."""
    command = [
        sys.executable,
        "-m",
        "flux_func.train_main",
        *tiny_run.arguments(workdir, fields | {"train.steps": 10**6}),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def read_until(process, step):
    """Reads the console until the line of a step."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


def assert_goes_on(workdir, fields, step):
    """Checks that a run resumed at `step` is, three steps on, one that was never stopped."""
    fields = fields | {"train.steps": step + 3}
    for folder in (workdir, workdir.with_name("whole")):
        assert tiny_run.program(train_main, *tiny_run.arguments(folder, fields | {"data.workers": 0})) == 0
    whole = losses(records(workdir.with_name("whole")))
    assert [number for number, *_ in whole] == list(range(1, step + 4))
    assert losses(records(workdir)) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_says_how_to_go_on_and_exits_with_0(tmp_path, workers):
    """SIGTERM to the process; and SIGINT to its whole group, workers too, as Ctrl-C sends it."""
    fields, workdir = {"data.workers": workers, "ema.decay": 0.9}, tmp_path / "run"
    process = start(workdir, fields, start_new_session=True)
    read_until(process, 2)
    number = signal.SIGINT if workers else signal.SIGTERM
    os.killpg(process.pid, number) if workers else process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 0, err
    [step] = checkpoint.steps(workdir)
    said = f"stopped by {number.name} after step {step} of 1000000; the checkpoint is saved: the same command goes on"
    assert said in out and "Traceback" not in err
    assert [record["step"] for record in records(workdir)] == list(range(1, step + 1))
    assert_goes_on(workdir, fields, step)


def test_a_kill_between_checkpoints_loses_the_steps_since_the_last(tmp_path):
    fields, workdir = (
        {"checkpoint.every": 3, "optimizer.name": "SGD", "optimizer.options": "momentum=0.9"},
        tmp_path / "run",
    )
    process = start(workdir, fields)
    read_until(process, 8)  # the save of step 6 has waited for that of step 3
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = checkpoint.latest(workdir)
    assert last >= 3 and last % 3 == 0 and records(workdir)[-1]["step"] >= 8
    assert_goes_on(workdir, fields, last)
