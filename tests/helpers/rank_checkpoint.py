"""What one of several processes does in the tests of checkpoints."""

import hashlib
import os
import pathlib
import resource
import signal
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import arrays, orbax
from flux_func.models import flux
from flux_func.parallel import mesh as meshes
from flux_func.parallel import placements
from flux_func.train import checkpoint
from flux_func.train import workdir as workdirs

CFG = flux.flavor("flux-tiny")
FSDP = (("*", {"shard": 0, "context": 0}),)


def whole(step: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns the state of one process, other values at every step."""
    params = flux.init(CFG, seed=step, dtype=dtype, scheme="nonzero")
    moments = tree.map(lambda leaf: (leaf * leaf).bfloat16(), params)
    return {"params": params, "opt": {"exp_avg_sq": moments, "step": torch.tensor(2**40 + step)}}


def placed(
    sizes: tuple[int, int, int], table: placements.Table = FSDP
) -> tuple[meshes.Mesh, dict[str, placements.Placement]]:
    """Returns the mesh of these processes and the placement of every leaf of the state."""
    mesh = meshes.build(dict(zip(meshes.AXES, sizes, strict=True)))
    return mesh, placements.resolve(table, tree.flatten(whole()), mesh, "parallel.params")


def sharded(state: dict[str, Any], mesh: meshes.Mesh, where: dict[str, placements.Placement]) -> dict[str, Any]:
    """Returns the state as DTensors, each process keeping memory of its own."""
    flat = tree.flatten(state)
    return tree.unflatten(
        {
            path: placements.distribute(leaf[where[path].local(mesh)].clone(), where[path], mesh)
            for path, leaf in flat.items()
        }
    )


def digest(state: dict[str, Any]) -> str:
    """Returns a hash of every bit of a state that one process has."""
    found = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(state).items()):
        found.update(f"{path} {leaf.dtype} {list(leaf.shape)}".encode())
        found.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save(
    rank: int, workdir: str, sizes: tuple, table: placements.Table, steps: tuple, wait: bool, keep: int = 0
) -> None:
    """Saves steps one after the other, changing the state in place as soon as it may be."""
    mesh, where = placed(sizes, table)
    with checkpoint.Checkpoints(workdir, keep_last=keep) as checkpoints:
        for step in steps:
            state = sharded(whole(step), mesh, where)
            checkpoints.save(step, state, CFG, {"step": step}, wait=wait)
            for leaf in tree.leaves(state):
                placements.local(leaf).mul_(-3).add_(1)


def restore(rank: int, workdir: str, step: int, sizes: tuple, table: placements.Table) -> list[str]:
    """Returns the paths of the leaves of which this process's part is not that of the whole state."""
    mesh, where = placed(sizes, table)
    like = checkpoint.abstract(workdir, step)
    found = checkpoint.restore(workdir, step, like, placements=where, mesh=mesh)
    expected = tree.flatten(sharded(whole(step), mesh, where))
    return [
        path
        for path, leaf in tree.flatten(found).items()
        if getattr(leaf, "placements", None) != getattr(expected[path], "placements", None)
        or leaf.shape != expected[path].shape
        or leaf.stride() != expected[path].stride()
        or leaf.dtype != expected[path].dtype
        or not torch.equal(placements.local(leaf), placements.local(expected[path]))
    ]


def refused(rank: int, workdir: str) -> tuple[list[str], list[int]]:
    """Saves step 1, meets errors that one process alone has, and saves step 3.

    Returns:
      The lines: the second cannot read; its weights overflow; the first sees a full disk; the second may write no
      large files, in a save that is waited for and in one that is not. And the steps that are there.
    """
    mesh, where = placed((1, 2, 1))
    lines: list[str] = []
    with checkpoint.Checkpoints(workdir, keep_last=0) as checkpoints:
        checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {}, wait=True)
        for attempt in _attempts(rank, workdir, checkpoints, sharded(whole(2), mesh, where), where, mesh):
            try:
                attempt()
                lines.append("nothing was refused")
            except UserError as error:
                lines.append(str(error))
        checkpoints.save(3, sharded(whole(3), mesh, where), CFG, {})
    return lines, checkpoint.steps(workdir)


def _attempts(rank, workdir, checkpoints, state, where, mesh):
    if rank == 1:
        read, orbax.read = orbax.read, _cut_short
    yield lambda: checkpoint.restore(workdir, 1, state, placements=where, mesh=mesh)
    if rank == 1:
        orbax.read = read
    large = tree.map(torch.clone, {"params": state["params"]})
    if rank == 1:
        placements.local(large["params"]["img_in"]["weight"])[0, 0] = 1e6
    yield lambda: checkpoint.weights(large, "float16")
    usage = workdirs.shutil.disk_usage
    if rank == 0:
        workdirs.shutil.disk_usage = lambda path: SimpleNamespace(free=10**6)
    yield lambda: checkpoints.save(2, state, CFG, {})
    workdirs.shutil.disk_usage = usage
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    yield lambda: checkpoints.save(2, state, CFG, {}, wait=True)
    checkpoints.save(2, state, CFG, {})
    yield checkpoints.wait
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _cut_short(*args):
    raise ValueError("cut\nshort")


def lose_one(rank: int, workdir: str, victim: int, when: str) -> None:
    """Kills one process; the other writes to `said` how it learned of that, and how long it took.

    Args:
      rank: of this process.
      workdir: of the run.
      victim: the rank that is killed.
      when: "saving", or "between" saves, when the other goes on for as long as it talks to nobody.
    """
    mesh, where = placed((1, 2, 1))
    state = sharded(whole(2), mesh, where)
    said = "nothing happened"
    try:
        with checkpoint.Checkpoints(workdir, keep_last=0) as checkpoints:
            checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {})
            checkpoints.wait()
            if rank == victim:
                if when == "between":
                    _die()
                arrays.assemble = _die
            elif when == "between":
                time.sleep(1)
            start = time.monotonic()
            checkpoints.save(2, state, CFG, {})
            checkpoints.wait()
    except Exception as error:
        said = f"{type(error).__name__} after {time.monotonic() - start:.0f} s"
    (pathlib.Path(workdir).parent / "said").write_text(said)


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail_alone(rank: int, workdir: str) -> float:
    """Raises on one process while a save is under way; returns the seconds that leaving took it."""
    mesh, where = placed((1, 2, 1))
    start = time.monotonic()
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=0)
    if rank == 0:
        checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {})
        dist.barrier()  # the other has left, and its threads go on
        checkpoints.close()
        return 0
    try:
        with checkpoints:
            checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {})
            start = time.monotonic()
            raise ZeroDivisionError
    except ZeroDivisionError:
        took = time.monotonic() - start
    dist.barrier()
    # What the first one's close() asks of all.
    checkpoints.close()
    return took


def peak_of_restore(rank: int, workdir: str, like: dict[str, Any]) -> float:
    """Returns how far restoring its part raises this process's memory, in MiB."""
    mesh = meshes.build(dict(zip(meshes.AXES, (1, 2, 1), strict=True)))
    where = placements.resolve(FSDP, tree.flatten(like), mesh, "parallel.params")
    checkpoint.abstract(workdir, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = checkpoint.restore(workdir, 1, like, placements=where, mesh=mesh)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert all(placements.local(leaf).eq(7).all() for leaf in tree.leaves(found))
    return (after - before) / 1024
