"""A reference in a process of its own, in whatever environment it is installed."""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from flux_func.errors import UserError

PROGRAM = Path(__file__).parent / "references" / "answer.py"
# references/answer.py's exit code for: the module on the last line is not installed.
_MISSING = 3
# What a user is told to install; torchtitan pins what it builds on, so it has an environment of its own.
INSTALL = {
    "bfl": "pip install fluxbfl==0.0.3",
    "diffusers": "pip install diffusers==0.42.1",
    "torchtitan": (
        "in an environment of its own, pip install torch==2.13.0 torchtitan==0.3.0 triton transformers sentencepiece "
        "pillow, and name its python with --reference_python"
    ),
}
# What each imports, torchtitan on a machine without a GPU too.
_MODULES = {"bfl": ("fluxbfl",), "diffusers": ("diffusers",), "torchtitan": ("torchtitan", "triton")}
# Warnings and bars of what a reference imports are no part of what is said.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
QUIET |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}
_FIND = """
import importlib.util as util, sys
print("lacks", next((name for name in sys.argv[1:] if util.find_spec(name) is None), ""))
"""


def check(reference: str, python: str, flag: str = "--reference is") -> None:
    """Raises UserError, of what `flag` asked for, where a python cannot be run or has not what the reference needs."""
    wanted, quiet = (*_MODULES[reference], "torch", "safetensors"), dict(stdin=subprocess.DEVNULL, capture_output=True)
    try:
        found = subprocess.run([python, "-c", _FIND, *wanted], **quiet, text=True, cwd=PROGRAM.parent)
    except OSError as error:
        raise UserError(f"--reference_python is {python!r}: cannot be run ({error.strerror})") from error
    answered, _, lacking = found.stdout.strip().partition("lacks")
    if found.returncode or answered or not found.stdout:
        raise UserError(f"--reference_python is {python!r}: {last(found.stderr)}; should be a python")
    if lacking := lacking.strip():
        raise UserError(_missing(flag, reference, python, lacking))


def try_import(reference: str, python: str) -> None:
    """Imports what a reference needs, in its own environment; UserError, with the last line, where that fails."""
    command = [python, "-c", f"import with_{reference}"]
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=PROGRAM.parent)
    if found.returncode:
        raise UserError(f"--peer is {reference!r}: {python} cannot import it: {last(found.stderr)}")


def answer(reference: str, python: str, folder: Path, say: Callable[[str], object]) -> None:
    """Lets a reference answer the questions in `folder`, and passes on what it says it is doing.

    Raises:
      UserError: there is no such python, the reference is not installed there, or its process died, with its last line.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [python, str(PROGRAM), reference, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **QUIET},
            cwd=folder,
        )
        try:
            for line in process.stdout:
                say(line.rstrip())
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        line = last(errors.read())
    if code == _MISSING:
        raise UserError(_missing("--reference is", reference, python, line))
    if code:
        raise UserError(f"--reference is {reference!r}: its process {how(code)}: {line}")


def answer_here(reference: str, folder: Path, say: Callable[[str], object] = print) -> None:
    """Lets a reference answer in this process, for tests; ModuleNotFoundError where it is not installed here."""
    if str(PROGRAM.parent) not in sys.path:
        sys.path.append(str(PROGRAM.parent))
    importlib.import_module("answer").answer(reference, folder, say)


def _missing(flag: str, reference: str, python: str, module: str) -> str:
    return f"{flag} {reference!r}: {python} has no module {module!r}; {INSTALL[reference]}"


def how(code: int) -> str:
    """Returns in words how a process ended."""
    if code >= 0:
        return f"ended with {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def last(errors: str) -> str:
    """Returns the last line of what a process wrote to stderr, where what ended it is."""
    return next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "it said nothing")
