"""Programs started by torchrun, and what every rank of them said."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from tests.helpers import tiny_run


class Ended(NamedTuple):
    """A launch that is over.

    Attributes:
      code: torchrun's exit code.
      console: what torchrun itself said.
      out: what each rank printed, over all its starts.
      err: what each rank said on stderr, likewise.
      seconds: from when a rank last said anything until torchrun was over, and all its ranks with it. (Not from the
        start: to import torch takes as long as the machine is busy.)
    """

    code: int
    console: str
    out: list[str]
    err: list[str]
    seconds: float


def options(logs: pathlib.Path, ranks: int = 2, *more: str) -> list[str]:
    """Returns the command of a torchrun of one node, each rank writing its own logs, up to the program."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--log-dir={logs}"),
        *("--redirects=3", *(more or ("--standalone",))),
    ]


def begin(command: list[str], **environment: str) -> subprocess.Popen:
    """Starts a launch."""
    given = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT), **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=given)


def end(process: subprocess.Popen, logs: pathlib.Path, ranks: int = 2, timeout: float = 200) -> Ended:
    """Waits for a launch; one that takes longer is ended."""
    try:
        console = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        console = process.communicate()[0] + f"\nnot over in {timeout} s"
    over, written = time.time(), [path.stat().st_mtime for path in logs.rglob("std*.log")]
    out, err = ([said(logs, rank, stream) for rank in range(ranks)] for stream in ("stdout", "stderr"))
    return Ended(process.returncode, console, out, err, over - max(written, default=over))


def said(logs: pathlib.Path, rank: int, stream: str) -> str:
    """Returns what a rank (of a single node) has written to a stream so far."""
    return "".join(path.read_text() for path in sorted(logs.rglob(f"attempt_*/{rank}/{stream}.log")))


def wait_until(process: subprocess.Popen, logs: pathlib.Path, pattern: str, timeout: float = 120) -> None:
    """Waits until rank 0 has printed something."""
    deadline = time.monotonic() + timeout
    while not re.search(pattern, said(logs, 0, "stdout")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise AssertionError(process.communicate()[0] + said(logs, 0, "stderr"))
        time.sleep(0.1)


def wait_for_listener(endpoint: str, timeout: float = 60) -> None:
    """Waits until something listens at host:port."""
    host, port = endpoint.split(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, int(port))).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Returns the process ids of the ranks that a torchrun has running, in their order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


def kill(process: subprocess.Popen, rank: int) -> None:
    """Kills a rank so that it has no say in it."""
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
