"""JAX as one of several processes, so that Orbax writes from all of them: who is who, and how they wait for each other.

JAX's own service for this ends every process that is left when the first one dies, within the second and with a stack
trace; and a process whose write failed leaves the others waiting for minutes. So that service lives for as long as
JAX needs to find its devices. After that, what Orbax asks of it is answered here, over torch.distributed's store:
nothing is sent between saves, nothing ends a process, and one that fails says so to those who wait for it.
"""

import contextlib
import functools
import itertools
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from flux_func.errors import UserError
from flux_func.interop import arrays
from flux_func.launch import processes

# Seconds that processes may take to find each other, and between two looks at whether the others are there.
JOIN_SECONDS = 60
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
NO_PROXY = "no_grpc_proxy"

_meetings = itertools.count()


class Abandoned(Exception):
    """Another process has given up what this one was waiting for it to do; that one says why."""


class Meeting:
    """What Orbax asks of JAX's distributed client, as answered by torch's store.

    Only calls that return at once are made to the store: others would hold up the collectives that set themselves up
    through it.
    """

    def __init__(self, store: dist.Store, processes: int, lines: Sequence[socket.socket] = ()):
        self._store, self._processes = store, processes
        self._lines = select.poll()
        for line in lines:
            self._lines.register(line)
        self._times: dict[str, Iterator[int]] = {}
        self._failed = False
        self.before: BaseException | None = None  # what was being handled already when Orbax was called

    def fail(self) -> None:
        """Lets go of everyone who waits here, now or later: with `Abandoned`."""
        self._failed = True
        self._store.set("failed", "")

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int, process_ids: Sequence[int] | None = None) -> None:
        """Returns when as many processes are here as there are, or as are named."""
        if sys.exception() not in (None, self.before):
            # Orbax comes by here on its way out too, and would wait for those who wait for it elsewhere.
            self.fail()
            return
        key = f"{barrier_id}/{next(self._times.setdefault(barrier_id, itertools.count()))}"
        if self._store.add(f"{key}/came", 1) == len(process_ids or range(self._processes)):
            self._store.set(f"{key}/all", "")
        pause, end = FIRST_PAUSE, time.monotonic() + timeout_in_ms / 1000
        while not self._store.check([f"{key}/all"]):
            if self._lost():
                self.fail()
            if self._failed or self._store.check(["failed"]):
                raise Abandoned(barrier_id)
            if time.monotonic() > end:
                raise TimeoutError(f"not every process came to {barrier_id} within {timeout_in_ms / 1000:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _lost(self) -> bool:
        # Nobody sends anything: there is news of a line when its other end is gone.
        return any(event & ~select.POLLOUT for _, event in self._lines.poll(0))

    def key_value_try_get(self, key: str) -> str:
        """Raises what JAX does where nothing was set, which nobody does here: directories are made before a save."""
        import jax

        raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")

    def shutdown(self) -> None:
        """Does nothing: JAX calls it at exit."""


def meet() -> Meeting:
    """Returns a new meeting of all of torch.distributed's processes, which Orbax uses from now on; all call it.

    Raises:
      UserError: on every process, where one cannot reach the first.
    """
    arrays.orbax()
    lines = _introduce()
    from jax._src import distributed

    store = dist.PrefixStore(f"flux_func/orbax/{next(_meetings)}", dist.distributed_c10d._get_default_store())
    distributed.global_state.client = meeting = Meeting(store, dist.get_world_size(), lines)
    return meeting


@functools.cache
def _introduce() -> list[socket.socket]:
    """Makes JAX's process index torch's rank, and every process's CPU one of its devices.

    Returns:
      Lines to the processes whose end this one should notice: the first one's to all, the others' to the first.
    """
    import jax
    from jax.extend import backend

    host, port, lines = _connect()
    # JAX may have been used already, to read a checkpoint: as one process alone.
    backend.clear_backends()
    for option, value in (
        ("jax_enable_preemption_service", False),  # it would take SIGTERM from the program
        ("jax_cpu_collectives_implementation", None),  # nothing is computed together
        ("jax_check_proxy_envs", False),
    ):
        jax.config.update(option, value)
    with _directly(host):
        jax.distributed.initialize(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            dist.get_world_size(),
            dist.get_rank(),
            cluster_detection_method="deactivate",
            initialization_timeout=JOIN_SECONDS,
            shutdown_timeout_seconds=JOIN_SECONDS,
        )
        jax.devices()
        jax.distributed.shutdown()
    processes.gather(None)
    return lines


def _connect() -> tuple[str, int, list[socket.socket]]:
    """Returns a host and a free port of the first process, and lines that have been opened to there."""
    hosts = processes.gather(socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else os.environ.get("MASTER_ADDR") or hosts[0]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    first = processes.is_first()
    serve = functools.partial(socket.create_server, ("", 0), family=family, backlog=len(hosts))
    with serve() if first else contextlib.nullcontext() as server:
        port = processes.from_first(server.getsockname()[1] if first else None)
        with processes.together():
            lines = [] if first else [_line(host, port)]
        if first:
            server.settimeout(JOIN_SECONDS)
            lines = [server.accept()[0] for _ in hosts[1:]]
    return host, port, lines


def _line(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=JOIN_SECONDS)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {host}: port {port} there cannot be reached from {socket.gethostname()} "
            f"({error.strerror or error}), and checkpoints need it; open the ports between the nodes"
        ) from error


@contextlib.contextmanager
def _directly(host: str) -> Iterator[None]:
    """Keeps gRPC from asking a proxy for a host of our own."""
    before = os.environ.get(NO_PROXY)
    os.environ[NO_PROXY] = host
    try:
        yield
    finally:
        del os.environ[NO_PROXY]
        if before is not None:
            os.environ[NO_PROXY] = before
