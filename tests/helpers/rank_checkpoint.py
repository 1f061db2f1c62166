"""What one of several processes does in the tests of checkpoints."""

import hashlib
import os
import resource
import signal
import time
from types import SimpleNamespace
from typing import Any

import torch

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import arrays, orbax
from flux_func.models import flux
from flux_func.parallel import mesh as meshes
from flux_func.parallel import placements
from flux_func.train import checkpoint, room

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
        if leaf.placements != expected[path].placements
        or leaf.shape != expected[path].shape
        or leaf.stride() != expected[path].stride()
        or leaf.dtype != expected[path].dtype
        or not torch.equal(placements.local(leaf), placements.local(expected[path]))
    ]


def refused(rank: int, workdir: str, case: str) -> tuple[list[str], list[int]]:
    """Saves step 1, then meets an error that one process alone has; returns its lines and the steps that are there.

    Args:
      rank: of this process.
      workdir: of the run.
      case: "quota" (the second process may write no large files, in a save that is waited for and in one that is not),
        "room" (the first sees a full disk), "read" (the second cannot read), "export" (its weights overflow).
    """
    mesh, where = placed((1, 2, 1))
    lines = []
    with checkpoint.Checkpoints(workdir, keep_last=0) as checkpoints:
        checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {}, wait=True)
        state = sharded(whole(2), mesh, where)
        for attempt in _attempts(rank, workdir, case, checkpoints, state, where, mesh):
            try:
                attempt()
                lines.append("nothing was refused")
            except UserError as error:
                lines.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpoints.save(3, sharded(whole(3), mesh, where), CFG, {})
    return lines, checkpoint.steps(workdir)


def _attempts(rank, workdir, case, checkpoints, state, where, mesh):
    if case == "quota":
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        yield lambda: checkpoints.save(2, state, CFG, {}, wait=True)
        checkpoints.save(2, state, CFG, {})
        yield checkpoints.wait
    elif case == "room":
        if rank == 0:
            room.shutil.disk_usage = lambda path: SimpleNamespace(free=10**6)
        yield lambda: checkpoints.save(2, state, CFG, {})
        if rank == 0:
            room.shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)
    elif case == "read":
        if rank == 1:
            read, orbax.read = orbax.read, _cut_short
        yield lambda: checkpoint.restore(workdir, 1, state, placements=where, mesh=mesh)
        if rank == 1:
            orbax.read = read
    else:
        if rank == 1:
            placements.local(state["params"]["img_in"]["weight"])[0, 0] = 1e6
        yield lambda: checkpoint.weights(state, "float16")


def _cut_short(*args):
    raise ValueError("cut\nshort")


def lose_one(rank: int, workdir: str, victim: int) -> str:
    """Kills one process while a save is under way; returns, on the other, how it learned of that and how long it took."""
    mesh, where = placed((1, 2, 1))
    state = sharded(whole(2), mesh, where)
    start = 0.0
    try:
        with checkpoint.Checkpoints(workdir, keep_last=0) as checkpoints:
            checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {}, wait=True)
            if rank == victim:
                # It goes in the middle of writing.
                arrays.assemble = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            start = time.monotonic()
            checkpoints.save(2, state, CFG, {})
            checkpoints.wait()
    except Exception as error:
        return f"{type(error).__name__} after {time.monotonic() - start:.0f} s"
    return "nothing happened"


def die_between(rank: int, workdir: str, victim: int) -> str:
    """Kills one process after a save; the other goes on for as long as it talks to nobody."""
    mesh, where = placed((1, 2, 1))
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=0)
    checkpoints.save(1, sharded(whole(1), mesh, where), CFG, {})
    checkpoints.wait()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3)
    start = time.monotonic()
    try:
        checkpoints.wait()
    except Exception:
        return f"alive, and knew within {time.monotonic() - start:.0f} s; {checkpoint.steps(workdir)}"
    return "nothing happened"


def exported(rank: int, workdir: str) -> None:
    """Saves weights alone in half precision, and once more in a run whose leaves are repeated and large."""
    mesh, where = placed((2, 1, 1))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        weights = checkpoint.weights(sharded(whole(1), mesh, where), "float16")
        checkpoints.save(1, weights, CFG, {}, wait=True)


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
