"""Checkpoints of the train state, by Orbax.

    WORKDIR/checkpoints/STEP/config/    the configuration the checkpoint was written with, as JSON

What else there is, `interop/orbax.py` says.

Reading is functions of (workdir, step); writing is `Checkpoints`, which holds Orbax's manager and the host buffers.
Under a process group each process reads and writes its own part of every leaf, and none more. What is written is the
same for any number of processes, and any other number restores it.
"""

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import arrays, orbax
from flux_func.interop.orbax import find, steps
from flux_func.interop.stored import cast, to_json
from flux_func.launch import processes
from flux_func.models.flux import FluxConfig
from flux_func.parallel import placements as layouts
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.placements import Placement
from flux_func.train import meeting
from flux_func.train.state import DTYPES, size_in_bytes
from flux_func.train.workdir import check_room

# What `restore` reads at a time, unless a single leaf is larger: the memory it takes on top of the state itself.
GROUP_BYTES = 256 << 20
# How long one of several processes that fails goes on with a save that is under way, and how often it looks.
GRACE_SECONDS = 10
PAUSE_SECONDS = 0.01


def latest(workdir: str | Path) -> int | None:
    """Returns the step of the newest committed checkpoint, or None where there is none."""
    return max(steps(workdir), default=None)


def resume_point(workdir: str | Path) -> tuple[int, dict[str, Any]] | None:
    """Returns (step, configuration) of the newest checkpoint, or None where there is none.

    Raises:
      UserError: the newest checkpoint holds weights only, or cannot be read.
    """
    step = latest(workdir)
    if step is None:
        return None
    _check_resumable(workdir, step)
    return step, read_config(workdir, step)


def read_config(workdir: str | Path, step: int) -> dict[str, Any]:
    """Returns the configuration that a checkpoint was written with, as JSON gives it back."""
    with _reading(workdir, step):
        return orbax.read_json(find(workdir, step), "config")


def read_model(workdir: str | Path, step: int) -> FluxConfig:
    """Returns the model whose weights a checkpoint holds."""
    with _reading(workdir, step):
        return orbax.read_model(find(workdir, step))


def abstract(workdir: str | Path, step: int) -> dict[str, Any]:
    """Returns the stored state as a tree of meta tensors, which is what `restore` takes, whole or in part."""
    with _reading(workdir, step):
        return {member: _in_lists(orbax.describe(find(workdir, step), member)) for member in members(workdir, step)}


def _in_lists(flat: dict[str, torch.Tensor]) -> Any:
    """Returns the tree of the leaves; blocks of which a LoRA has nothing are there, and empty."""
    found = map(re.compile(rf"(.*(?:{'|'.join(tree.LISTS)}))\.(\d+)\.").match, flat)
    there = {match.groups() for match in found if match}
    gaps = {f"{blocks}.{i}": {} for blocks, last in there for i in range(int(last)) if (blocks, str(i)) not in there}
    return tree.unflatten({**flat, **gaps})


def members(workdir: str | Path, step: int) -> list[str]:
    """Returns which members of the state a checkpoint holds: ema, opt, params."""
    with _reading(workdir, step):
        return orbax.members(find(workdir, step))


def restore(
    workdir: str | Path,
    step: int,
    like: Mapping[str, Any],
    device: torch.device | str = "cpu",
    cast: bool = False,
    placements: Mapping[str, Placement] | None = None,
    mesh: Mesh = ONE,
) -> dict[str, Any]:
    """Reads a checkpoint, or the members of it that `like` has, bit for bit into new tensors.

    Args:
      workdir: the run's folder.
      step: which checkpoint.
      like: the state, or members of it, as tensors (meta ones too) that give structure, shapes and types;
        `{"params": ...}` alone reads neither moments nor averages.
      device: where the new tensors are.
      cast: convert to the types of `like` where the stored ones differ, which is otherwise an error.
      placements: {dotted path: placement} of the leaves on `mesh`, whatever mesh they were written on; every process
        of it makes this call. None: this process reads every leaf whole, by itself.
      mesh: the processes.

    Returns:
      The tree of tensors: DTensors on a mesh that has processes. Beside them it takes `GROUP_BYTES` of memory, or what
      this process has of one leaf where that is larger.

    Raises:
      UserError: the checkpoint has other leaves, shapes or types, or cannot be read; or `like` has moments and the
        checkpoint holds weights only. With placements, on every process where it was raised on one.
    """
    with processes.together() if placements is not None else contextlib.nullcontext():
        if "opt" in like:
            _check_resumable(workdir, step)
        for member, subtree in like.items():
            _check_leaves(workdir, step, member, tree.flatten(subtree), cast)
        read = {m: _read_member(workdir, step, m, like[m], device, placements or {}, mesh) for m in like}
    return read


def weights(state: Mapping[str, Any], dtype: str = "") -> dict[str, Any]:
    """Returns the state without its moments, in the type named ("": as it is).

    Saved, it is a weights-only checkpoint: there to sample from or to start from, not to resume from.

    Raises:
      UserError: a weight lies beyond what the type reaches; on every process, which all call this.
    """
    kept = {member: subtree for member, subtree in state.items() if member != "opt"}
    if not dtype:
        return kept
    with (
        processes.together()
        if any(isinstance(leaf, DTensor) for leaf in tree.leaves(kept))
        else contextlib.nullcontext()
    ):
        exported = [_exported(leaf, DTYPES[dtype], path) for path, leaf in tree.flatten(kept).items()]
    each = iter(exported)
    return tree.map(lambda _: next(each), kept)


def _exported(leaf: torch.Tensor, dtype: torch.dtype, path: str) -> torch.Tensor:
    local = cast(layouts.local(leaf), dtype, path, "checkpoint.export_dtype")
    if not isinstance(leaf, DTensor):
        return local
    whole = {"shape": leaf.shape, "stride": leaf.stride()}
    return DTensor.from_local(local, leaf.device_mesh, leaf.placements, run_check=False, **whole)


class Checkpoints:
    """Writes a workdir's checkpoints. A context manager, which is left with every save committed.

    Orbax writes from the very memory it is given, and the trainer donates the state to the next step while a save is
    under way. So a save that is not waited for copies the state into host buffers first; they are kept for the next
    one, which would need them again, and new memory costs page faults. A save that is waited for lets go of the buffers
    and writes from the state itself, or from one copy on the host where that is a GPU's. Nothing is compressed: on
    float32 weights it would save 8% of the bytes, take 4 to 10 times as long and as much memory again as the state.

    Under a process group every process has one, and calls its methods when the others do. Leaves are DTensors; each
    process writes its own part of them, and its share of what several have. What fails on one fails on all.
    """

    def __init__(self, workdir: str | Path, keep_last: int = 2, keep_every: int = 0):
        """Keeps the newest `keep_last` (0: all), and multiples of `keep_every` (0: none) for good.

        Until the first save, nothing in the workdir is touched but leftovers of interrupted saves: they are removed.
        """
        self._workdir, self._keep_last, self._keep_every = workdir, keep_last, keep_every
        self._manager: Any = None
        self._meeting: meeting.Meeting | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        if processes.is_first():
            _remove_leftovers(workdir)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        if kind is None or processes.world() == 1:
            self.close()
        else:
            self._leave()

    def save(
        self, step: int, state: Mapping[str, Any], cfg: FluxConfig, config: Mapping[str, Any], wait: bool = False
    ) -> None:
        """Saves the state, once the save before is committed; a step that is already there is left as it is.

        Args:
          step: optimizer steps taken so far.
          state: trees of tensors by name: params, opt, ema. Without "opt" the checkpoint holds weights only.
          cfg: the model.
          config: the run's configuration, as JSON can hold it.
          wait: True: return when the checkpoint is committed; the state must not change until then. False: return
            as soon as the state may be changed in place.

        Raises:
          UserError: the disk has no room (then nothing was written), or this save or the one before failed.
        """
        self.wait()
        if processes.from_first(step in steps(self._workdir)):
            return
        flat = tree.flatten(state)
        with processes.together():
            if processes.is_first():
                check_room(self._workdir, size_in_bytes(state), [step])
        parts = {path: arrays.part(leaf) for path, leaf in flat.items()}
        tensors = {path: part.tensor for path, part in parts.items()}
        self._buffers = {} if wait else arrays.copies(tensors, self._buffers)
        if self._manager is None and processes.world() > 1:
            self._meeting = meeting.meet()
        with self._writing():
            if self._manager is None:
                self._manager = _manager(self._workdir, self._keep_last, self._keep_every, self._meeting)
            said = {"model": to_json(cfg), "config": dict(config)}
            self._start(step, parts, tensors if wait else self._buffers, said)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when every save is committed.

        Raises:
          UserError: the save under way failed. The checkpoints before it are whole.
        """
        if self._manager is None:
            return
        # Together rather than each for itself, so that a process that has died is missed here and not hours later.
        while processes.world() > 1 and any(processes.gather(self._manager.is_saving_in_progress())):
            time.sleep(PAUSE_SECONDS)
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of Orbax's threads and of the buffers."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
        self._manager, self._buffers = None, {}

    def _leave(self) -> None:
        """Goes without the other processes, which may not come: they are where this one failed, or have died.

        Their threads take part in a save under way for as long as they live, so it may yet be committed.
        """
        if self._manager is None:
            return
        end = time.monotonic() + GRACE_SECONDS
        while self._manager.is_saving_in_progress() and time.monotonic() < end:
            time.sleep(PAUSE_SECONDS)
        self._meeting.fail()

    def _start(
        self,
        step: int,
        parts: Mapping[str, arrays.Part],
        tensors: Mapping[str, torch.Tensor],
        said: Mapping[str, dict[str, Any]],
    ) -> None:
        ocp = arrays.orbax()
        members: dict[str, dict[str, Any]] = {}
        for path, part in parts.items():
            member, _, rest = path.partition(".")
            members.setdefault(member, {})[rest] = arrays.assemble(part, tensors[path])
        items = {member: orbax.save_args(leaves) for member, leaves in members.items()}
        items |= {item: ocp.args.JsonSave(content) for item, content in said.items()}
        args = ocp.args.Composite(**items)
        self._manager.save(step, args=args, force=True, custom_metadata={"weights_only": "opt" not in members})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with processes.together(), self._failing_together():
                yield
        except UserError:
            # Nobody writes any longer.
            processes.gather(None)
            if processes.is_first():
                _remove_leftovers(self._workdir)
            raise

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        if self._meeting is not None:
            self._meeting.before = sys.exception()
        try:
            yield
        except Exception as error:
            # Orbax's manager has lost count of its steps by now.
            self._manager, self._buffers = None, {}
            if self._meeting is not None:
                self._meeting.fail()
            if isinstance(error, meeting.Abandoned):
                return  # the process that failed says why
            cause = orbax.disk_error(error)
            if cause is None:
                raise
            step = latest(self._workdir)
            whole = "no checkpoint is there yet" if step is None else f"the checkpoint of step {step} is whole"
            raise UserError(
                f"workdir is {str(self._workdir)!r}: a checkpoint could not be written there "
                f"({cause.strerror or cause}); {whole}: free some room or name another --workdir"
            ) from error


def _read_member(
    workdir: str | Path,
    step: int,
    member: str,
    like: Any,
    device: torch.device | str,
    placements: Mapping[str, Placement],
    mesh: Mesh,
) -> Any:
    flat = tree.flatten(like)
    placed = {path: placements.get(f"{member}.{path}", _everywhere(leaf)) for path, leaf in flat.items()}
    parts = {path: placement.local(mesh) for path, placement in placed.items()}
    read: dict[str, torch.Tensor] = {}
    for paths in tree.bundles({path: placement.local_bytes(mesh) for path, placement in placed.items()}, GROUP_BYTES):
        with _reading(workdir, step):
            found = orbax.read(find(workdir, step), member, paths, parts)
        for path, array in found.items():
            shard = torch.empty(array.shape, dtype=flat[path].dtype, device=device).copy_(arrays.to_torch(array))
            read[path] = layouts.distribute(shard, placed[path], mesh)
    leaves = iter([read[path] for path in flat])
    return tree.map(lambda _: next(leaves), like)


def _everywhere(leaf: torch.Tensor) -> Placement:
    return Placement(tuple(leaf.shape), leaf.dtype)


def _check_leaves(workdir: str | Path, step: int, member: str, flat: Mapping[str, torch.Tensor], cast: bool) -> None:
    if not flat:
        return
    where = f"workdir is {str(workdir)!r}: its checkpoint of step {step}"
    checkpoint = find(workdir, step)
    if not (checkpoint / member).is_dir():
        raise UserError(f"{where} holds no {member}: name another --workdir")
    with _reading(workdir, step):
        stored = orbax.describe(checkpoint, member)
    for path in sorted(stored.keys() | flat.keys()):
        old, new = _describe(stored.get(path), cast), _describe(flat.get(path), cast)
        if old != new:
            raise UserError(f"{where} has {member}.{path} as {old}, this run as {new}: name another --workdir")


def _describe(leaf: torch.Tensor | None, any_dtype: bool) -> str:
    if leaf is None:
        return "absent"
    return f"{list(leaf.shape)}" if any_dtype else f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def _check_resumable(workdir: str | Path, step: int) -> None:
    with _reading(workdir, step):
        weights_only = orbax.weights_only(find(workdir, step))
    if weights_only:
        raise UserError(
            f"workdir is {str(workdir)!r}: its checkpoint of step {step} holds weights only "
            f"(checkpoint.last_weights_only) and cannot be resumed from: name another --workdir"
        )


def _reading(workdir: str | Path, step: int) -> contextlib.AbstractContextManager[None]:
    return orbax.reading(
        f"workdir is {str(workdir)!r}: its checkpoint of step {step}",
        f"remove {orbax.folder(workdir) / str(step)} to go on from the one before it",
    )


def _remove_leftovers(workdir: str | Path) -> None:
    """Removes what interrupted saves left: folders of a step's name that have no marker."""
    whole = {str(step) for step in steps(workdir)}
    for path in orbax.folder(workdir).glob("*"):
        if path.name.partition(".")[0].isdecimal() and path.name not in whole:
            shutil.rmtree(path, ignore_errors=True)


def _manager(workdir: str | Path, keep_last: int, keep_every: int, met: meeting.Meeting | None) -> Any:
    policies = arrays.orbax().checkpoint_managers
    kept = [policies.LatestN(keep_last or None), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    if met is not None:
        if processes.is_first():
            orbax.folder(workdir).mkdir(parents=True, exist_ok=True)
        met.wait_at_barrier("folder", 1000 * meeting.JOIN_SECONDS)
    return orbax.manager(workdir, processes=processes.world(), preservation_policy=policies.AnyPreservationPolicy(kept))
