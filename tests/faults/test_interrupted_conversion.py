"""Conversions that are stopped in the middle: what was there is as it was, and the next try is whole."""

import json
import os
import signal
import subprocess
import sys

import pytest

import flux_func as ff
from flux_func import convert_main, tree
from tests.helpers import tiny_pipeline, tiny_run

TARGETS = {"bfl": "new.safetensors", "diffusers": "new", "torchtitan": "new", "orbax": "new", "pipeline": "new"}
# Forks a process for each command line, which is killed at the n-th step of its progress bar, or once --to has been
# renamed away.
KILLED = """
import json, os, signal, sys
from flux_func import convert_main

class Bar:
    format_sizeof = staticmethod(str)
    left = 5
    def __init__(self, *args, **options): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def update(self, count):
        Bar.left -= 1
        if not Bar.left:
            os.kill(os.getpid(), signal.SIGKILL)

real = os.rename
def rename(source, to):
    real(source, to)
    if os.path.basename(to) == "old":
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "write":
    convert_main.tqdm = Bar
else:
    os.rename = rename
for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = ["convert_main", *arguments]
        convert_main.run()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A transformer in BFL's format, and a whole pipeline."""
    root = tmp_path_factory.mktemp("sources")
    ff.save(root / "flux.safetensors", ff.init(ff.flavor("flux-tiny"), scheme="nonzero"), ff.flavor("flux-tiny"))
    tiny_pipeline.whole(root / "whole")
    return root


def arguments(sources, to, kind):
    if kind == "pipeline":
        return [f"--from={sources / 'whole'}", f"--to={to}", "--format=diffusers"]
    return [f"--from={sources / 'flux.safetensors'}", f"--to={to}", f"--format={kind}"]


def assert_whole(sources, to, kind):
    """Checks that a conversion has all its weights."""
    source = sources / ("whole" if kind == "pipeline" else "flux.safetensors")
    for part in ("transformer", "autoencoder") if kind == "pipeline" else ("transformer",):
        ours, theirs = (tree.flatten(ff.load(path, part=part)[0]) for path in (to, source))
        assert tiny_run.identical(ours, theirs)


def kill(lines, where):
    """Runs convert_main with each of several command lines; each is killed at "write" or "rename"."""
    command = [sys.executable, "-c", KILLED, json.dumps(list(lines)), where]
    environment = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    codes = [line for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert codes == [str(-signal.SIGKILL)] * len(lines), done.stderr


def test_killed(sources, tmp_path, capfd):
    lines = {kind: arguments(sources, tmp_path / kind / name, kind) for kind, name in TARGETS.items()}
    kill(lines.values(), "write")
    for kind, name in TARGETS.items():
        folder = tmp_path / kind
        assert os.listdir(folder) == [f".{name}.partial"]
        # What is left bears no name that is looked for, and stands in nobody's way.
        assert tiny_run.program(convert_main, f"--from={folder}", f"--to={tmp_path}/x", "--format=orbax") == 2
        assert tiny_run.program(convert_main, *lines[kind]) == 0
        assert os.listdir(folder) == [name]
        assert_whole(sources, folder / name, kind)


def test_killed_between_the_renames(sources, tmp_path, capfd):
    """Where a folder is overwritten, the old one is away for a moment; the next try puts it back."""
    to = {kind: tmp_path / kind / name for kind, name in TARGETS.items() if name == "new"}
    lines = {kind: arguments(sources, path, kind) for kind, path in to.items()}
    contents = {}
    for kind, line in lines.items():
        assert tiny_run.program(convert_main, *line) == 0
        contents[kind] = tiny_run.snapshot(to[kind])
    kill([[*line, "--overwrite", "--dtype=bfloat16"] for line in lines.values()], "rename")
    for kind, line in lines.items():
        assert os.listdir(tmp_path / kind) == [".new.partial"]
        capfd.readouterr()
        assert tiny_run.program(convert_main, *line) == 2
        assert f"{to[kind]}: is there already" in capfd.readouterr().err
        assert os.listdir(tmp_path / kind) == ["new"] and tiny_run.snapshot(to[kind]) == contents[kind]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("there", [False, True])
def test_interrupted_as_by_the_keyboard(sources, tmp_path, monkeypatch, capfd, kind, there):
    """SIGINT, where nothing is there and where something is to be overwritten."""
    to = tmp_path / TARGETS[kind]
    more = ["--overwrite", "--dtype=bfloat16"] if there else []
    if there:
        assert tiny_run.program(convert_main, *arguments(sources, to, kind)) == 0
    before = tiny_run.snapshot(to)

    class Bar(convert_main.tqdm):
        steps = 0

        def update(self, count=1):
            Bar.steps += 1
            if Bar.steps == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().update(count)

    with monkeypatch.context() as patch:
        patch.setattr(convert_main, "tqdm", Bar)
        capfd.readouterr()
        assert tiny_run.program(convert_main, *arguments(sources, to, kind), *more) == 128 + signal.SIGINT
    err = capfd.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1] == f"interrupted: {to} is as it was, or new and whole"
    assert tiny_run.snapshot(to) == before and os.listdir(tmp_path) == ([to.name] if there else [])
