"""Processes that talk to each other by gloo, each running one function."""

import functools
import multiprocessing
import pathlib
import tempfile
import traceback
from collections.abc import Callable
from typing import Any


@functools.cache
def _server() -> Any:
    # Forked from a process that has imported the heavy parts already, and has no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.tensor", "sklearn.datasets", "flux_func.train.loop"]
    )
    return context


def run(world: int, fn: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Returns [fn(rank, *args) of every rank], each in a process of a gloo group of `world`.

    Args:
      world: processes.
      fn: at the top level of a module of tests/helpers (a test's own module has no name in another process); what it
        takes and returns is pickled.
      args: what it is given after the rank.
      timeout: seconds that a collective may wait, and all of it.

    Raises:
      AssertionError: a rank raised; the first one's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = pathlib.Path(folder) / "store"
        context = _server()
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, str(store), rank, world, timeout, fn, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            answers = [_receive(pipe, timeout) for pipe in pipes]
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    # A rank that lost another one fails too, and says less than the one that failed first.
    failures = sorted((answer for answer in answers if not answer[0]), key=lambda answer: answer[2])
    assert not failures, f"{len(failures)} of {world} ranks failed; the first one:\n{failures[0][1]}"
    return [answer[1] for answer in answers]


def _receive(pipe: Any, timeout: float) -> tuple:
    import time

    try:
        return pipe.recv() if pipe.poll(timeout) else (False, f"nothing came within {timeout} s", time.time())
    except EOFError:
        return False, "the process died", time.time()


def _work(pipe: Any, store: str, rank: int, world: int, timeout: float, fn: Callable, args: tuple) -> None:
    import datetime
    import time

    import torch
    import torch.distributed as dist

    from flux_func.launch import gloo

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            gloo.register(),
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        answer = (True, fn(rank, *args), 0.0)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = (False, f"rank {rank}: {traceback.format_exc()}", time.time())
    pipe.send(answer)
    pipe.close()
