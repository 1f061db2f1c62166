"""What a user sees of a wrong command line: one line, exit code 2, and no traceback."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from flux_func import cli
from flux_func.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def train(*args, cwd=ROOT):
    command = [sys.executable, "-m", "flux_func.train_main", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": ROOT})


def test_a_user_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(argv):
        raise UserError("train.steps is 0:\n should be at least 1")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "program: error: train.steps is 0: should be at least 1\n"


def test_a_device_that_is_full_is_one_line_that_says_what_needs_less(monkeypatch, capsys):
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("program: error: CUDA out of memory: a smaller batch") and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "args, says",
    [
        (["--config=configs/missing.py", "--workdir={tmp}/w"], "no such file"),
        (["--config={tmp}/empty.py", "--workdir={tmp}/w"], "get_config"),
        (["--config={tmp}/broken.py", "--workdir={tmp}/w"], "--config"),
        (["--config=configs/flux_debug.py"], "--workdir"),
        (["--workdir={tmp}/w"], "--config"),
        (["--config=configs/flux_debug.py", "--workdir="], "--workdir"),
        (["--config=configs/flux_debug.py", "--workdir={tmp}/w", "--config.train.step=3"], "steps"),
        (["--config=configs/flux_debug.py", "--workdir={tmp}/w", "--config.train.steps=many"], "train.steps"),
        (["--config=configs/flux_debug.py", "--workdir={tmp}/w", "--workdirr=x"], "workdirr"),
        (["--config=configs/flux_debug.py", "--workdir={tmp}/w", "stray"], "stray"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(args, says, tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    done = train(*(arg.format(tmp=tmp_path) for arg in args))
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "w").exists()


def test_help_answers_with_every_flag():
    done = train("--help")
    assert done.returncode == 0
    for word in ("--config", "--workdir", "--device", "Trains FLUX"):
        assert word in done.stdout


@pytest.fixture
def handlers():
    """Puts the handlers of signals back after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_asks_and_the_second_acts(handlers):
    stop = cli.stop_requested()
    assert stop() == ""
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_of_many_ranks_gets_the_same_signal_twice(handlers, monkeypatch):
    """From a scheduler, say, and from the launcher that the scheduler has told too."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    stop = cli.stop_requested()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == "SIGTERM"
    monkeypatch.setattr(cli, "SAME_SIGNAL", 0)  # as if some seconds had gone by
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    signal.raise_signal(signal.SIGTERM)
    assert killed == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_launcher_that_says_it_wrong_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda argv: None)
    assert stop.value.code == 2
    said = "program: error: WORLD_SIZE is 'many': should be a whole number at least 1\n"
    assert capsys.readouterr().err == said
