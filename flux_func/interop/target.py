"""Where files are written: nothing is overwritten unasked, and what is not whole never bears its name."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from flux_func.errors import UserError

# The files that diffusers and torchtitan write: weights, configurations, tokenizers.
_OURS = ("*.safetensors", "*.safetensors.index.json", "*.distcp", ".metadata", "flux_func.json", "model_index.json")
_OURS += ("config.json", "*_config.json", "tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
_OURS += ("special_tokens_map.json", "added_tokens.json")
# What Orbax puts into a step's folder once it is whole; below it are names of its own.
_ORBAX_STEP = "commit_success.txt"


def check(path: str | Path, size: int, overwrite: bool = False, folders: Collection[str] = ()) -> None:
    """Raises UserError where `size` bytes cannot be written to a file or folder `path`; nothing is touched.

    Args:
      path: of a file or folder to be. Where it is there already, only an empty folder will do or, with `overwrite`, a
        .safetensors file, or a folder that holds nothing, at any depth, but files by the names that diffusers and
        torchtitan give them, and Orbax's checkpoints.
      folders: that the folder to be will have. One that has others too is not replaced: they would be lost.
    """
    path = Path(path)
    _check_free(path, overwrite, folders)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written, {parent} is read-only or no folder; choose another path")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise UserError(f"{path}: needs {_gb(size)}, {parent} has {_gb(free)} free; make room or choose another path")


@contextlib.contextmanager
def beside(path: str | Path, overwrite: bool = False, folders: Collection[str] = ()) -> Iterator[Path]:
    """Yields a path, not yet there, to write a file or folder to; it becomes `path` at the end.

    It is `new` in a sibling `.NAME.partial`, which is locked as long and then removed. A folder that is replaced is
    `old` there for the moment between two renames, and is put back where the second fails. An interruption or an error
    thus leaves `path` as it was; after a kill the next try puts back what is to be, and removes the rest. All is on the
    disk before it is renamed.

    Raises:
      UserError: `path` is there already (see `check`) or appears meanwhile, another process writes it, or the disk is
        full or read-only.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    new, old = aside / "new", aside / "old"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with _locked(aside, path):
            try:
                _tidy(new, old, path)
                _check_free(path, overwrite, folders)
                yield new
                _sync(new)
                _check_free(path, overwrite, folders)
                _replace(new, path, old)
            finally:
                # What cannot be removed now is by the next try. The lock is last.
                with contextlib.suppress(OSError):
                    _tidy(new, old, path)
                    (aside / "lock").unlink()
                    aside.rmdir()
    except OSError as error:
        lost = os.path.lexists(old) and not os.path.lexists(path)
        state = f"what was there is {old}, and the next try puts it back" if lost else "it is as it was"
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {state}") from error
    except UserError as error:
        # Of a file in the folder: only the name that it was to have says something.
        raise UserError(str(error).replace(str(new), str(path))) from error


def _check_free(path: Path, overwrite: bool, folders: Collection[str]) -> None:
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{path}: is there already; choose another path, or overwrite it")
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: is no safetensors file and is not overwritten; choose another path")
    elif foreign := min(_foreign(path), default=""):
        raise UserError(f"{path}: holds {foreign!r} beside weights and is not overwritten; choose another path")
    elif lost := sorted(child.name for child in path.iterdir() if child.is_dir() and child.name not in folders):
        raise UserError(
            f"{path}: holds a folder {lost[0]!r}, which would be lost, and is not overwritten; "
            f"choose another path, or the folder in it that is meant (such as transformer)"
        )


def _foreign(path: Path) -> Iterator[str]:
    """Yields the files in a folder, at any depth, that are named as none of weights are."""
    for name, folders, files in os.walk(path):
        folder = Path(name)
        if folder == path / "checkpoints":
            folders[:] = [step for step in folders if not (folder / step / _ORBAX_STEP).is_file()]
        for file in (folder / file for file in files):
            if not any(file.match(pattern) for pattern in _OURS):
                yield str(file.relative_to(path))


@contextlib.contextmanager
def _locked(aside: Path, path: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; the system ends that with the process, however it ends."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((aside / "lock").open("ab"))
            _lock(file)
            # Who was here first may have removed it in the meantime.
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(aside / "lock"))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise UserError(f"{path}: is being written by another process; wait for it, or choose another path")
        yield


def _lock(file: IO[bytes]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks, and should be written to nevertheless.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _replace(new: Path, path: Path, old: Path) -> None:
    # A file takes the place of a file at once. With a folder it takes two renames.
    if os.path.lexists(path) and (new.is_dir() or path.is_dir()):
        os.rename(path, old)
    os.replace(new, path)
    # From here on `path` is the new one, and what fails is of no account.
    with contextlib.suppress(OSError):
        _sync_one(path.parent)


def _tidy(new: Path, old: Path, path: Path) -> None:
    """Puts back what a replacement that did not come to its end took away, and removes the rest."""
    if os.path.lexists(old) and not os.path.lexists(path):
        os.rename(old, path)
    _remove(new)
    if os.path.lexists(old):
        # By this name, as half of it should never be put back.
        os.rename(old, new)
        _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for child in path.rglob("*") if path.is_dir() else ():
        _sync_one(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
