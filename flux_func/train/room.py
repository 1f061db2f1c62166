"""Whether the disk has room for the checkpoints of a run."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

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
