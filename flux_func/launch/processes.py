"""The processes of a run: they are told of each other by who started them, join up, and agree on what they are about.

A launcher (torchrun, or Slurm, MPI and Kubernetes with the same variables set) gives RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. One process alone needs none of them, and everything here is then free.
"""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from flux_func.errors import UserError
from flux_func.launch import gloo, joining

_joined: list[dist.Store] = []


def launched() -> tuple[int, int]:
    """Returns (rank, number of ranks) as the environment has them: (0, 1) where nothing was launched.

    Raises:
      UserError: a variable that is missing beside the others, or is no number in its range.
    """
    if not os.environ.get("WORLD_SIZE"):
        return 0, 1
    count = joining.number("WORLD_SIZE", 1)
    return (joining.number("RANK", 0, count - 1), count) if count > 1 else (0, 1)


def start(device: torch.device) -> None:
    """Joins this process to the others that were launched with it; nothing to do where there are none.

    Collectives of CPU tensors go by gloo, those of CUDA tensors by NCCL, and each rank takes the device of its
    LOCAL_RANK.

    Raises:
      UserError: the variables do not fit, a device is missing, or the others cannot be reached in the time that
        FLUX_FUNC_JOIN_SECONDS gives.
    """
    rank, count = launched()
    if count == 1:
        return
    backend = gloo.register()
    if device.type == "cuda":
        backend = f"cpu:{backend},cuda:nccl"
        torch.cuda.set_device(_local_device(rank, torch.cuda.device_count()))
    _joined.append(joining.join(rank, count))
    _joined[0].set_timeout(limit())
    dist.init_process_group(backend, store=_joined[0], rank=rank, world_size=count, timeout=limit())


def limit() -> datetime.timedelta:
    """Returns what a collective operation may take, which FLUX_FUNC_COLLECTIVE_SECONDS gives."""
    return datetime.timedelta(seconds=joining.number(joining.COLLECTIVE, 1))


def stop() -> None:
    """Leaves the others, once all are here."""
    if dist.is_initialized():
        gather(None)  # the one that keeps the store should not leave before the rest
        dist.destroy_process_group()
        _joined.clear()


def store() -> dist.Store:
    """Returns a store where all ranks meet, of whoever ends last: torchrun's, else rank 0's; RuntimeError without."""
    if joining.by_agent() or not _joined:
        return joining.agents_store()
    return _joined[0]


def rank() -> int:
    """Returns the number of this process among those that joined up; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Returns how many processes joined up; 1 where there is one alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Returns whether this process is the one that prints and writes what is wanted once."""
    return rank() == 0


# What every rank takes part in.


def gather(value: Any) -> list[Any]:
    """Returns the value of every rank, in their order; small ones, which are pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Returns the value of rank 0, which is pickled; that of the others is not looked at."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what may fail on some ranks only, such as a file that one node lacks: then all fail, and none waits.

    What is inside should talk to no other rank.

    Raises:
      UserError: any rank raised one; the lowest such rank's, saying whose it is where not all have it.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    said = gather((str(mine), socket.gethostname()) if mine else None)
    failed = [number for number, message in enumerate(said) if message]
    if failed:
        message, host = said[failed[0]]
        others = f" and {len(failed) - 1} more" if failed[1:] else ""
        where = f" (on rank {failed[0]} of {len(said)}, which is on {host}{others})" if len(failed) < len(said) else ""
        raise UserError(message + where) from mine


def agree(what: Mapping[str, Any]) -> None:
    """Checks that every rank has the same settings, and the same code.

    Args:
      what: {field: value}, such as every field of the config.

    Raises:
      UserError: the first field, on the first rank, that is not as it is on rank 0; on every rank.
    """
    mine = {"the code": code_version(), **what}
    first = from_first(mine)
    differing = [field for field in {**first, **mine} if _said(first, field) != _said(mine, field)]
    found = [f"{f} is {_said(first, f)} on rank 0 and {_said(mine, f)} on rank {rank()}" for f in differing]
    for lines in gather(found[:1]):
        for line in lines:
            raise UserError(f"{line}: every rank should be started by the same command, from the same files")


def _said(what: Mapping[str, Any], field: str) -> str:
    return repr(what[field]) if field in what else "not there"


def agreed_stop(stop: Callable[[], str]) -> str:
    """Returns the word of `stop` (the name of a signal, or "") of any rank: the same on all, which all call it.

    Args:
      stop: as `cli.stop_requested` gives it; words of up to 7 ASCII characters.
    """
    word = stop()
    if world() == 1:
        return word
    # As one number, of which the largest is as good as any: one small operation a step, on the CPU.
    number = torch.tensor(int.from_bytes(word.encode("ascii")[:7]))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number).to_bytes(7).lstrip(b"\0").decode("ascii")


@functools.cache
def code_version() -> str:
    """Returns what tells two versions of the code apart: a hash of the package's sources, and torch's version."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"flux_func {digest.hexdigest()[:12]}, torch {importlib.metadata.version('torch')}"


def _local_device(rank: int, devices: int) -> int:
    # Launchers other than torchrun may give none: then ranks are counted through the nodes.
    local = joining.number("LOCAL_RANK", 0) if os.environ.get("LOCAL_RANK") else rank % devices
    if local >= devices:
        raise UserError(
            f"LOCAL_RANK is {local}: this node has {devices} CUDA devices; start at most that many processes on it "
            f"(torchrun --nproc-per-node={devices})"
        )
    return local
