"""How one of many ranks ends that cannot go on: what it says, in what order, and that the others end too.

A rank that fails takes the others with it: their collectives break, or whoever started them ends them. So several
reports come at once, and the one that matters should stand out: what the user can put right is said by one rank, in
one line; a rank that failed by itself says so with its traceback, which torchrun's summary repeats; and one that only
lost another says that much, and leaves after it.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from flux_func.launch import joining, processes

# Seconds that a rank which lost another waits, so that torchrun sees the other one first and takes that for the cause.
LINGER = 8
# What the backends say where the other end of a connection is gone.
_LOST = re.compile(
    r"(connection closed by peer|connection reset by peer|broken pipe|remote process exited|no route to host|"
    r"connection refused|socket (is )?closed|connection was closed|communicator was aborted|ncclRemoteError)"
    r"( \[[\w.:]+\]:\d+)?",
    re.IGNORECASE,
)

_asked = threading.Event()  # to end, by a SIGTERM


def refuse(line: str, again: bool = False) -> NoReturn:
    """Ends this rank over a user's error, said once by whichever rank comes first; exit code 2.

    Args:
      line: what is said.
      again: whether another start may go better. If not, torchrun is asked to end, which would start the same again as
        often as --max-restarts says, whatever the exit code.
    """
    if _first(line, unasked=True):
        _say(line)
    _record(line)
    if not again:
        _stop_restarts()
    if not joining.by_agent():
        time.sleep(1)  # where rank 0 keeps the store, the others still ask it who has said what
    leave(2)


def fail(error: BaseException) -> NoReturn:
    """Ends this rank over what it raised: its traceback, or a line where it was only another rank that went; code 1."""
    rank, _ = processes.launched()
    lost = None if isinstance(error, OSError) else _LOST.search(str(error))
    if lost:
        _say(f"rank {rank} (on {socket.gethostname()}): lost another rank, and ends ({lost[0]})")
        _linger()
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        _say(f"rank {rank} (on {socket.gethostname()}): {text}")
        _record(text)
    leave(1)


def watch(reacted: Callable[[], bool]) -> None:
    """Watches, under torchrun, for a SIGTERM that Python does not come to handle, as in a collective that never ends.

    torchrun sends it where another rank failed, and kills after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30). At two
    thirds of them this rank says what it hangs in, and ends.

    Args:
      reacted: whether the program has come to know of the signal.
    """
    if not joining.by_torchrun():
        return
    inner, outer = socket.socketpair()
    outer.setblocking(False)
    signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(inner, outer, reacted), daemon=True, name="watch").start()


def _watch(inner: socket.socket, outer: socket.socket, reacted: Callable[[], bool]) -> None:
    main = threading.main_thread().ident
    while signal.SIGTERM not in inner.recv(1):
        pass
    _asked.set()
    grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or 30) * 2 / 3
    time.sleep(grace)
    if reacted():
        return
    where = "".join(traceback.format_stack(sys._current_frames()[main])[-3:]).rstrip()
    rank, _ = processes.launched()
    _say(f"rank {rank}: no step has ended in the {grace:.0f} s since SIGTERM, so it ends here:\n{where}")
    del outer  # until here: Python writes to it
    leave(1)


# Saying and leaving.


def _say(text: str) -> None:
    # In one write, that the reports of ranks do not mix.
    sys.stderr.flush()
    os.write(2, f"{text}\n".encode(errors="replace"))


def _first(what: str, unasked: bool) -> bool:
    """Returns whether no other rank came by here with the same words; `unasked` where there is no way to tell."""
    with contextlib.suppress(Exception):
        return processes.store().add(f"flux_func/{joining.attempt()}/{what}", 1) == 1
    return unasked


def _record(text: str) -> None:
    """Leaves what happened where torchrun looks for its summary."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            more = {"py_callstack": text, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": text, "extraInfo": more}}, file)


def _linger() -> None:
    if _asked.is_set():
        return
    # Who ends this rank meanwhile need not wait for it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(LINGER)


def _stop_restarts() -> None:
    """Ends the torchrun that started this process, where it would start it again."""
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    left = joining.by_torchrun() and int(joining.attempt()) < most
    # Once a node: a second signal would break off what the first one began.
    if left and _first(f"stop node {os.environ['GROUP_RANK']}", unasked=False):
        os.kill(os.getppid(), signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """Ends at once: what is registered for exit may wait for other ranks."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
