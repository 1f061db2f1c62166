"""A run's folder: whether it will do, who writes there, and whether there is room for checkpoints."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import logging

from flux_func.errors import UserError
from flux_func.interop.orbax import steps

# Room for a checkpoint's metadata, and for what else a run writes.
MARGIN_BYTES = 64 << 20


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


def _most_held(ascending: Sequence[int], keep_last: int, keep_every: int) -> int:
    """Returns how many of the steps' checkpoints are there when the last is written and none has yet made room."""
    if not keep_last:
        return len(ascending)
    for_good = [step for step in ascending if keep_every and step % keep_every == 0]
    return len({*for_good, *ascending[-keep_last - 1 :]})


def check_workdir(workdir: str) -> None:
    """Checks that the workdir is a folder that can be written to, or can be made one; UserError if not."""
    path = Path(workdir).absolute()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UserError(f"workdir is {workdir!r}: {there} is not a folder; name another --workdir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"workdir is {workdir!r}: {there} may not be written to; name another --workdir")


@contextlib.contextmanager
def keeping_others_out(workdir: Path) -> Iterator[None]:
    """Makes the workdir, and lets no other run write there meanwhile.

    Raises:
      UserError: another run is writing there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    folder = os.open(workdir, os.O_RDONLY)
    try:
        _lock(folder, workdir)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, workdir: Path) -> None:
    # Held for as long as the folder is open: a process that is killed leaves no lock.
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"workdir is {str(workdir)!r}: another run is writing there; wait for it, or name another --workdir"
        ) from error
    except OSError as error:
        logging.warning("%s: its file system has no locks (%s), so keep other runs out", workdir, error.strerror)
