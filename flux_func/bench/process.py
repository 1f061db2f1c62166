"""The processes that are measured: started, told to take a step at a time, and ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flux_func.bench import serve
from flux_func.errors import UserError
from flux_func.parity import process as parity

# Waits for an answer.
Ask = Callable[[], dict[str, Any]]


@contextlib.contextmanager
def started(peer: str, python: str, request: Path, cache: Path | None = None) -> Iterator[tuple[Ask, Ask]]:
    """Yields (what waits until it is ready, what takes a step), each to be asked; the process ends with the context.

    Args:
      peer: one of `cases.PEERS`.
      python: what it is run by.
      request: its file; the process runs in that folder.
      cache: where torch.compile keeps what it made; None: where it does by itself.

    Raises:
      UserError: the process ended, with its last line, when it is asked.
    """
    command = [python, serve.__file__, peer, str(request)]
    if peer == "ours":
        command = [python, "-m", "flux_func.bench.ours", str(request)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(peer, cache),
            cwd=request.parent,
            start_new_session=True,  # so that those which it starts to compile end with it
        )

        def answer() -> dict[str, Any]:
            if line := process.stdout.readline():
                return json.loads(line)
            code = process.wait()
            errors.seek(0)
            raise UserError(f"--peers has {peer!r}: its process {parity.how(code)}: {parity.last(errors.read())}")

        def step() -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which is what there is to read
                print("step", file=process.stdin, flush=True)
            return answer()

        try:
            yield answer, step
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _environment(peer: str, cache: Path | None) -> dict[str, str]:
    # Another environment is not to find what is in this one.
    ours = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} if peer == "ours" else {}
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
    return {**os.environ, **parity.QUIET, **ours, **compiled}
