"""How the ranks that a launcher started find each other: a store that rank 0 keeps, and where every rank is.

torchrun keeps a store too, but it outlives a restart: a rank that comes back would find addresses of those that are
gone, and wait for them (torch 2.13; tests/distributed/test_launch.py kills a rank). What tells one start from another
is not told to the ranks either, where nodes come and go. So rank 0 opens a store for each start, and only where it is
goes by torchrun's.
"""

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable

import torch.distributed as dist

from flux_func.errors import UserError

JOIN = "FLUX_FUNC_JOIN_SECONDS"
COLLECTIVE = "FLUX_FUNC_COLLECTIVE_SECONDS"
# Seconds: for rank 0 to be there and the others to come; and for a collective operation, after which a rank that
# neither answers nor dies is given up.
LIMITS = {JOIN: 120, COLLECTIVE: 600}


class Unreachable(UserError):
    """Other ranks that do not come, which may be better at another start."""


def number(name: str, least: int, most: float = float("inf")) -> int:
    """Returns the whole number that a variable of the environment has; UserError where it is none in its range."""
    given = os.environ.get(name) or str(LIMITS.get(name, ""))
    if not given:
        raise UserError(f"{name} is not set, though WORLD_SIZE is: torchrun sets them all; see docs/scaling.md")
    if not (given.isascii() and given.isdigit() and least <= int(given) <= most):
        should = f"at least {least}" if most == float("inf") else f"in {least}..{most}"
        raise UserError(f"{name} is {given!r}: should be a whole number {should}")
    return int(given)


def by_torchrun() -> bool:
    """Returns whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def by_agent() -> bool:
    """Returns whether torchrun keeps a store where MASTER_ADDR:MASTER_PORT is; else rank 0 should."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> str:
    """Returns how often torchrun has started the ranks again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def agents_store() -> dist.Store:
    """Returns torchrun's own store; RuntimeError or Unreachable where there is none."""
    if not by_agent():
        raise RuntimeError("not started by torchrun")
    host, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 1)
    _reach(host, port, 1)
    return _client(host, port, 5)


def join(rank: int, count: int) -> dist.Store:
    """Returns the store of this start, once all its ranks have come.

    Raises:
      UserError: MASTER_ADDR or MASTER_PORT is missing.
      Unreachable: the others were not all there within FLUX_FUNC_JOIN_SECONDS.
    """
    host, port, limit = os.environ.get("MASTER_ADDR", ""), number("MASTER_PORT", 1, 65535), number(JOIN, 1)
    if not host:
        raise UserError("MASTER_ADDR is not set, though WORLD_SIZE is: should be the host of rank 0")
    end = time.monotonic() + limit
    if rank or by_agent():
        _reach(host, port, limit)
    else:
        _reach(host, port, limit, socket.getaddrinfo)
    try:
        return _open(host, port, count, end) if rank == 0 else _find(host, port, count, end)
    except dist.DistError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise Unreachable(
            f"MASTER_ADDR:MASTER_PORT is {host}:{port}: the {count} ranks of WORLD_SIZE did not meet there within "
            f"{limit} s (rank {rank}: {why}); start them all, or give them longer by {JOIN}"
        ) from error


def _open(host: str, port: int, count: int, end: float) -> dist.Store:
    agent = _client(host, port, end - time.monotonic()) if by_agent() else None
    limit = datetime.timedelta(seconds=max(end - time.monotonic(), 1))
    opened = dist.TCPStore(host, 0 if agent else port, is_master=True, timeout=limit, wait_for_workers=False)
    if agent:
        agent.set(_key(), str(opened.port))
    while opened.add("joined", 0) < count - 1:
        if time.monotonic() > end:
            raise dist.DistStoreError(f"{opened.add('joined', 0) + 1} came")
        time.sleep(0.05)
    opened.set("complete", "")
    return opened


def _find(host: str, port: int, count: int, end: float) -> dist.Store:
    while time.monotonic() < end:
        where = int(_client(host, port, end - time.monotonic()).get(_key())) if by_agent() else port
        with contextlib.suppress(OSError):  # where it was before a restart, nobody listens
            socket.create_connection((host, where), timeout=5).close()
            found = _client(host, where, end - time.monotonic())
            if found.add("joined", 1) < count:  # else it is of an earlier start, and had all its ranks
                found.wait(["complete"])
                return found
        time.sleep(0.2)
    raise dist.DistStoreError("rank 0 did not come")


def _key() -> str:
    return f"flux_func/store/{attempt()}"


def _client(host: str, port: int, limit: float) -> dist.Store:
    limit = datetime.timedelta(seconds=max(limit, 1))
    return dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=1).close()


def _reach(host: str, port: int, limit: float, reach: Callable = _connect) -> None:
    """Waits until something listens there, or at least (socket.getaddrinfo) until the host is known by its name.

    In Python, since torch's own store warns of every try on the console, and does not look at signals meanwhile.
    """
    end = time.monotonic() + limit
    while True:
        try:
            reach(host, port)
            return
        except OSError as error:  # a name that is not known yet, too: Kubernetes gives names late
            why = error.strerror or str(error)
        if time.monotonic() + 0.2 > end:
            break
        time.sleep(0.2)
    raise Unreachable(
        f"MASTER_ADDR:MASTER_PORT is {host}:{port}: cannot be reached from {socket.gethostname()} within {limit} s "
        f"({why}); should be the host of rank 0 and a port that no firewall closes; {JOIN} gives it longer"
    )
