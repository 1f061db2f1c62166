"""Checkpoints of the train state, by Orbax.

    WORKDIR/checkpoints/STEP/config/    the configuration the checkpoint was written with, as JSON

What else there is, `interop/orbax.py` says.

Reading is functions of (workdir, step); writing is `Checkpoints`, which holds Orbax's manager and the host buffers.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import arrays, orbax
from flux_func.interop.orbax import find, steps
from flux_func.interop.stored import cast, to_json
from flux_func.models.flux import FluxConfig
from flux_func.train.state import DTYPES, size_in_bytes

# What `restore` reads at a time, unless a single leaf is larger: the memory it takes on top of the state itself.
GROUP_BYTES = 256 << 20
# Room for a checkpoint's metadata, and for what else a run writes.
MARGIN_BYTES = 64 << 20


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
        checkpoint = find(workdir, step)
        return {member: tree.unflatten(orbax.describe(checkpoint, member)) for member in orbax.members(checkpoint)}


def restore(
    workdir: str | Path, step: int, like: Mapping[str, Any], device: torch.device | str = "cpu", cast: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint, or the members of it that `like` has, bit for bit into new tensors.

    Args:
      workdir: the run's folder.
      step: which checkpoint.
      like: the state, or members of it, as tensors (meta ones too) that give structure, shapes and types;
        `{"params": ...}` alone reads neither moments nor averages.
      device: where the new tensors are.
      cast: convert to the types of `like` where the stored ones differ, which is otherwise an error.

    Returns:
      The tree of tensors. Beside them it takes `GROUP_BYTES` of memory, or one leaf where that is larger.

    Raises:
      UserError: the checkpoint has other leaves, shapes or types, or cannot be read; or `like` has moments and the
        checkpoint holds weights only.
    """
    if "opt" in like:
        _check_resumable(workdir, step)
    for member, subtree in like.items():
        _check_leaves(workdir, step, member, tree.flatten(subtree), cast)
    return {member: _restore_member(workdir, step, member, subtree, device) for member, subtree in like.items()}


def weights(state: Mapping[str, Any], dtype: str = "") -> dict[str, Any]:
    """Returns the state without its moments, in the type named ("": as it is).

    Saved, it is a weights-only checkpoint: there to sample from or to start from, not to resume from.

    Raises:
      UserError: a weight lies beyond what the type reaches.
    """
    kept = {member: subtree for member, subtree in state.items() if member != "opt"}
    if not dtype:
        return kept
    field = "checkpoint.export_dtype"
    return tree.unflatten({path: cast(leaf, DTYPES[dtype], path, field) for path, leaf in tree.flatten(kept).items()})


def check_room(
    workdir: str | Path, bytes_each: int, upcoming: Iterable[int], keep_last: int = 0, keep_every: int = 0
) -> None:
    """Checks that the disk has room for the checkpoints to come; writes nothing.

    Args:
      workdir: the run's folder, which need not exist yet.
      bytes_each: bytes of one checkpoint, see `state.size_in_bytes`.
      upcoming: the steps at which one will be saved; those that are there already need no room.
      keep_last, keep_every: as in `Checkpoints`.

    Raises:
      UserError: naming the workdir, what is needed and what is free.
    """
    there = steps(workdir)
    after = sorted({*there, *upcoming})
    if after == there:
        return
    more = max(1, _most_held(after, keep_last, keep_every) - len(there))
    path = Path(workdir).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    if free < more * bytes_each + MARGIN_BYTES:
        raise UserError(
            f"workdir is {str(workdir)!r}: checkpoints need {more} x {bytes_each / 1e9:.2f} GB more, and its disk "
            f"has {free / 1e9:.2f} GB free: free some, keep fewer (checkpoint.keep_last) or name another --workdir"
        )


class Checkpoints:
    """Writes a workdir's checkpoints. A context manager, which is left with every save committed.

    Orbax writes from the very memory it is given, and the trainer donates the state to the next step while a save is
    under way. So a save that is not waited for copies the state into host buffers first; they are kept for the next
    one, which would need them again, and new memory costs page faults. A save that is waited for writes from the
    state itself and lets go of the buffers. Nothing is compressed: on float32 weights it would save
    8% of the bytes, take 4 to 10 times as long and as much memory again as the state.
    """

    def __init__(self, workdir: str | Path, keep_last: int = 2, keep_every: int = 0):
        """Keeps the newest `keep_last` (0: all), and multiples of `keep_every` (0: none) for good.

        Until the first save, nothing in the workdir is touched but leftovers of interrupted saves: they are removed.
        """
        self._workdir, self._keep_last, self._keep_every = workdir, keep_last, keep_every
        self._manager: Any = None
        self._buffers: dict[str, torch.Tensor] = {}
        _remove_leftovers(workdir)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

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
        if step in steps(self._workdir):
            return
        check_room(self._workdir, size_in_bytes(state), [step])
        flat = {path: leaf.detach() for path, leaf in tree.flatten(state).items()}
        self._buffers = {} if wait else arrays.copies(flat, self._buffers)
        with self._writing():
            self._start(step, flat if wait else self._buffers, model=to_json(cfg), config=dict(config))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when every save is committed.

        Raises:
          UserError: the save under way failed. The checkpoints before it are whole.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of Orbax's threads and of the buffers."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
        self._manager, self._buffers = None, {}

    def _start(self, step: int, flat: Mapping[str, torch.Tensor], **said: dict[str, Any]) -> None:
        ocp = arrays.orbax()
        members: dict[str, dict[str, Any]] = {}
        for path, leaf in flat.items():
            member, _, rest = path.partition(".")
            members.setdefault(member, {})[rest] = arrays.to_jax(leaf)
        items = {member: ocp.args.PyTreeSave(leaves) for member, leaves in members.items()}
        items |= {item: ocp.args.JsonSave(content) for item, content in said.items()}
        if self._manager is None:
            self._manager = _manager(self._workdir, self._keep_last, self._keep_every)
        args = ocp.args.Composite(**items)
        self._manager.save(step, args=args, force=True, custom_metadata={"weights_only": "opt" not in members})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Orbax's manager has lost count of its steps by now.
            self._manager, self._buffers = None, {}
            cause = orbax.disk_error(error)
            if cause is None:
                raise
            _remove_leftovers(self._workdir)
            step = latest(self._workdir)
            whole = "no checkpoint is there yet" if step is None else f"the checkpoint of step {step} is whole"
            raise UserError(
                f"workdir is {str(self._workdir)!r}: a checkpoint could not be written there "
                f"({cause.strerror or cause}); {whole}: free some room or name another --workdir"
            ) from error


def _restore_member(workdir: str | Path, step: int, member: str, like: Any, device: torch.device | str) -> Any:
    flat = tree.flatten(like)
    restored: dict[str, torch.Tensor] = {}
    for paths in _groups({path: size_in_bytes(leaf) for path, leaf in flat.items()}):
        with _reading(workdir, step):
            read = orbax.read(find(workdir, step), member, paths)
        for path, array in read.items():
            leaf = flat[path]
            restored[path] = torch.empty(leaf.shape, dtype=leaf.dtype, device=device).copy_(arrays.to_torch(array))
    leaves = iter([restored[path] for path in flat])
    return tree.map(lambda _: next(leaves), like)


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Returns the paths in groups of at most GROUP_BYTES each, or of one path."""
    groups: list[list[str]] = []
    total = GROUP_BYTES
    for path, size in sizes.items():
        if total + size > GROUP_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(path)
        total += size
    return groups


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


def _most_held(ascending: Sequence[int], keep_last: int, keep_every: int) -> int:
    """Returns how many of the steps' checkpoints are there when the last is written and none has yet made room."""
    if not keep_last:
        return len(ascending)
    for_good = [step for step in ascending if keep_every and step % keep_every == 0]
    return len({*for_good, *ascending[-keep_last - 1 :]})


def _remove_leftovers(workdir: str | Path) -> None:
    """Removes what interrupted saves left: folders of a step's name that have no marker."""
    whole = {str(step) for step in steps(workdir)}
    for path in orbax.folder(workdir).glob("*"):
        if path.name.partition(".")[0].isdecimal() and path.name not in whole:
            shutil.rmtree(path, ignore_errors=True)


def _manager(workdir: str | Path, keep_last: int, keep_every: int) -> Any:
    policies = arrays.orbax().checkpoint_managers
    kept = [policies.LatestN(keep_last or None), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    return orbax.manager(workdir, preservation_policy=policies.AnyPreservationPolicy(kept))
