"""Runs of a model so small that a step takes milliseconds, in this process, and what they leave behind."""

import hashlib
import json
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_collections
import pytest
import torch
from absl import flags
from absl.testing import flagsaver

from flux_func import config as configs
from flux_func import tree
from flux_func.train import checkpoint, loop

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs/flux_debug.py"
# What makes of configs/flux_debug.py a run of a second or two.
TINY = {
    "metrics.tensorboard": False,
    "model.flavor": "flux-tiny",
    "data.image_size": 32,
    "text.max_length": 4,
    "validate.every": 0,
    "sample.every": 0,
}
CPU = torch.device("cpu")


def config(fields: dict[str, Any] | None = None) -> ml_collections.ConfigDict:
    """Returns the default config made tiny, from weights that leave nothing out, and `fields` by dotted name."""
    made = configs.default()
    made.update_from_flattened_dict({**TINY, "model.init": "nonzero", "train.steps": 4, **(fields or {})})
    return made


def train(
    workdir: pathlib.Path, fields: dict[str, Any] | None = None, stop: Callable[[], str] = lambda: ""
) -> list[dict[str, Any]]:
    """Trains `config(fields)` in `workdir`, and returns the records of training in its metrics.jsonl."""
    loop.train(config(fields), str(workdir), CPU, stop)
    return records(workdir)


def records(workdir: pathlib.Path, field: str = "loss") -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl that have a field."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if field in record]


def losses(found: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Returns (step, loss, gradient norm) of each record: what must be equal bit for bit."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in found]


def stored(workdir: pathlib.Path, step: int) -> dict[str, torch.Tensor]:
    """Returns the whole state in a checkpoint, by dotted path."""
    return tree.flatten(checkpoint.restore(workdir, step, checkpoint.abstract(workdir, step)))


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Returns whether two states by dotted path have the same leaves, types and bits."""
    same = (torch.equal(one[path], other[path]) and one[path].dtype == other[path].dtype for path in one)
    return one.keys() == other.keys() and all(same)


def arguments(workdir: pathlib.Path, fields: dict[str, Any] | None = None) -> list[str]:
    """Returns train_main's arguments for configs/flux_debug.py made tiny."""
    given = {**TINY, **(fields or {})}
    return [
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in given.items()),
    ]


def program(main: ModuleType, *args: object) -> int:
    """Runs a program's `run` in this process on a command line; returns its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of ml_collections' way of loading a config file
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # the config file of the run before: its functions would stay
        patch.setattr(sys, "argv", [main.__name__.rpartition(".")[2], *map(str, args)])
        try:
            main.run()
        except SystemExit as end:
            return end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    raise AssertionError("absl ends a program by SystemExit")


def refused(capfd: pytest.CaptureFixture[str], root: pathlib.Path, main: ModuleType, *arguments: object) -> str:
    """Runs a program that should refuse; returns its one line, once nothing under `root` is found changed."""
    before = snapshot(root)
    capfd.readouterr()
    assert program(main, *arguments) == 2
    out, err = capfd.readouterr()
    assert snapshot(root) == before
    assert out == "" and err.count("\n") == 1, err
    name, _, line = err.rstrip("\n").partition(": error: ")
    assert name == main.__name__.rpartition(".")[2]
    return line


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Returns {path: (time of its last change in ns, hash of its bytes)} of all that is in a folder, itself too."""
    found = [folder, *folder.rglob("*")] if folder.exists() else []
    return {str(path): (path.lstat().st_mtime_ns, _digest(path)) for path in found}


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
