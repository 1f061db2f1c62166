"""Where files are written: nothing is overwritten unasked, and what is not whole never bears its name."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flux_func.errors import UserError

# What folders of weights hold. A folder with anything else in it is never overwritten.
_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "flux_func.json", ".metadata", "*.distcp")
_OURS += ("checkpoints",)
# And those of whole pipelines.
_OURS += ("model_index.json", "transformer", "vae", "text_encoder*", "tokenizer*", "scheduler")
_OURS += ("image_encoder", "feature_extractor")


def check(path: str | Path, size: int, overwrite: bool = False) -> None:
    """Raises UserError where `size` bytes cannot be written to a file or folder `path`; nothing is touched.

    Args:
      path: of a file or folder to be. Where it is there already, only an empty folder or, with `overwrite`, a file or
        a folder that holds nothing but weights will do.
    """
    path = Path(path)
    _check_free(path, overwrite)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written, {parent} is read-only or no folder; choose another path")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise UserError(f"{path}: needs {_gb(size)}, {parent} has {_gb(free)} free; make room or choose another path")


@contextlib.contextmanager
def beside(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields the path of a sibling, not yet there, to write a file or folder to; it becomes `path` at the end.

    An interruption or an error leaves `path` as it was, and at worst a sibling `.NAME.partial`, which the next try
    replaces. All is on the disk before it is renamed.

    Raises:
      UserError: `path` is there already (see `check`), or the disk is full or read-only.
    """
    path = Path(path)
    _check_free(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        _sync(partial)
        _replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); it is as it was") from error
    except UserError as error:
        # Of a file in the folder: only the name that it was to have says something.
        raise UserError(str(error).replace(str(partial), str(path))) from error
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    inside = list(path.iterdir()) if path.is_dir() else []
    if path.is_dir() and not inside:
        return
    if not overwrite:
        raise UserError(f"{path}: is there already; choose another path, or ask for it to be overwritten")
    foreign = [child.name for child in inside if not any(child.match(pattern) for pattern in _OURS)]
    if foreign:
        raise UserError(f"{path}: holds {foreign[0]!r} beside weights and is not overwritten; choose another path")


def _replace(partial: Path, path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        os.replace(partial, path)
    else:
        # A folder takes the place of an empty one alone.
        old = path.with_name(f".{path.name}.old")
        _remove(old)
        os.rename(path, old)
        os.rename(partial, path)
        _remove(old)
    _sync_one(path.parent)


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
