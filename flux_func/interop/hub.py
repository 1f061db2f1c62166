"""Weights from the hub: `hf://owner/repo[@revision][/path]`, just the files that are needed, in the hub's own cache.

The token, the cache's place and the hub's address are huggingface_hub's own settings (`hf auth login` or HF_TOKEN,
HF_HOME, HF_ENDPOINT). What is in the cache already is not fetched again, and serves without a network.
"""

import contextlib
import errno
import glob
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flux_func.errors import UserError
from flux_func.interop.pipelines import FOLDERS, INDEX

PREFIX = "hf://"
# What a repository calls its parts: a file in its root, as Black Forest Labs keep them, or else one of `FOLDERS`.
FILES = {"transformer": "flux1*.safetensors", "autoencoder": "ae.safetensors"}
# Of a folder's files those are read: neither pickles, nor other frameworks' weights, nor pictures.
SUFFIXES = (".safetensors", ".json", ".txt", ".model")
# diffusers' names of weights in a second precision, beside the plain ones.
VARIANT = re.compile(r"\.\w+(-\d+-of-\d+)?\.safetensors$|\.safetensors\.index\.\w+\.json$")
# Room to leave on the cache's disk.
MARGIN_BYTES = 64 << 20


def is_address(path: str) -> bool:
    """Returns whether a path is meant as the address of a repository on the hub."""
    return path.startswith(PREFIX)


def fetch(address: str, parts: Collection[str], whole: bool = False) -> dict[str, Path]:
    """Downloads a repository's files, those that are needed and not in the cache yet.

    Args:
      address: `hf://owner/repo`, with `@revision` where not the newest, and a file's or folder's path in it where the
        repository does not say by its names which one is meant.
      parts: which of "transformer" and "autoencoder" are wanted; none: the one safetensors file there is, of a LoRA.
      whole: the whole pipeline is wanted, where the repository has one.

    Returns:
      {part: its file or folder in the cache}, or {"pipeline": folder} where the whole pipeline was fetched, or
      {"": file or folder} where the address names one or there is but one. A part that the repository lacks is left
      out.

    Raises:
      UserError: the address is none; the repository, the revision or the files do not exist; they may not be read; the
        hub cannot be reached; the disk is full.
    """
    where = _parse(address)
    with _explained(address):
        import huggingface_hub

        hub = huggingface_hub.HfApi(library_name="flux_func")
        revision = hub.resolve_revision(where.id, revision=where.revision)
        sizes = _listing(hub, where.id, revision)
        chosen = choose(address, list(sizes), where.path_in_repo, parts, whole)
        names = sorted({name for files in chosen.values() for name in files})
        missing = [name for name in names if not _cached(where.id, name, revision.resolved)]
        _check_room(address, sum(sizes[name] for name in missing))
        root = Path(hub.snapshot_download(where.id, revision=revision, allow_patterns=[*map(glob.escape, names)]))
    return {part: root / _common(part, files, where.path_in_repo) for part, files in chosen.items()}


def choose(address: str, names: list[str], path: str, parts: Collection[str], whole: bool) -> dict[str, list[str]]:
    """Returns {part: files}, as `fetch` returns their places; UserError where it is not clear which files are meant.

    Args:
      address: for the error.
      names: of all files in the repository.
      path: in the repository, "" where the address has none.
      parts, whole: as in `fetch`.
    """
    if path:
        below = [path] if path in names else _below(names, path)
        if not below:
            raise UserError(f"--from is {address!r}: the repository has no such file; {_offers(names)}")
        return {"": [*below, *_adapter_config(names, below)]}
    if whole and INDEX in names:
        folders = {name.split("/")[0] for name in names if "/" in name}
        return {"pipeline": [INDEX, *(name for folder in sorted(folders) for name in _below(names, folder))]}
    chosen = {}
    for part in parts:
        files = [name for name in names if fnmatch(name, FILES[part])]
        if len(files) > 1:
            raise UserError(f"--from is {address!r}: it has {', '.join(files)}: name one, as {address}/{files[0]}")
        files = files or _below(names, FOLDERS[part])
        chosen |= {part: files} if files else {}
    if chosen:
        return chosen
    alone = [name for name in names if name.endswith(".safetensors")]
    if len(alone) != 1:
        said = f"no file's name says {' or '.join(parts)}" if parts else "it is not clear which of its files is meant"
        raise UserError(f"--from is {address!r}: {said}; {_offers(names)}")
    return {"": [*alone, *_adapter_config(names, alone)]}


def _adapter_config(names: list[str], files: list[str]) -> list[str]:
    """Returns what PEFT keeps beside a LoRA's file, where it says alpha."""
    beside = [re.sub(r"(^|/)adapter_model\.safetensors$", r"\1adapter_config.json", name) for name in files]
    return [name for name in beside if name in names and name not in files]


def _below(names: list[str], folder: str) -> list[str]:
    """Returns the files of a folder of weights or settings: of several precisions, the plain one."""
    found = [name for name in names if name.startswith(f"{folder}/") and name.endswith(SUFFIXES)]
    return [name for name in found if not VARIANT.search(name)]


def _common(part: str, files: list[str], path: str) -> str:
    """Returns the path in the repository that stands for a part's files."""
    if part == "pipeline":
        return ""
    return path or (FOLDERS[part] if part and "/" in files[0] else files[0])


def _offers(names: list[str]) -> str:
    there = [name for name in names if name.endswith(".safetensors")]
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    return f"it has {shown}" if there else "it has no safetensors file"


def _parse(address: str) -> Any:
    import huggingface_hub
    from huggingface_hub.errors import HfUriError

    remedy = "should be hf://owner/repo, hf://owner/repo@revision or hf://owner/repo/file.safetensors"
    try:
        where = huggingface_hub.parse_hf_uri(address)
    except HfUriError as error:
        raise UserError(f"--from is {address!r}: {remedy}") from error
    if where.type != "model":
        raise UserError(f"--from is {address!r}: a {where.type} holds no weights; {remedy}")
    return where


def _listing(hub: Any, repo: str, revision: Any) -> Mapping[str, int]:
    """Returns {file: bytes} of a commit: from the cache where it is known there, as a commit never changes."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        found = huggingface_hub.get_cached_repo_tree(repo, revision=revision)
    except CachedRepoTreeNotFoundError:
        found = hub.list_repo_tree(repo, revision=revision.resolved, recursive=True)
    return {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}


def _cached(repo: str, name: str, commit: str) -> bool:
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(repo, name, revision=commit), str)


def _check_room(address: str, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed and free < needed + MARGIN_BYTES:
        raise UserError(
            f"--from is {address!r}: {needed / 1e9:.2f} GB are to be downloaded, and the disk of {str(cache)!r} has "
            f"{free / 1e9:.2f} GB free: free some, or set HF_HOME to a folder on another disk"
        )


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # of many classes: network, protocol, cache, disk
        raise UserError(f"--from is {address!r}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    from huggingface_hub import constants, errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"not permitted: accept the licence on the repository's page, and {login} as who accepted it"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is not yours to see: mind the spelling, or {login}"
    if status == 401:
        return f"the token is not accepted: {login}"
    if status is not None:
        return f"the hub answers with HTTP status {status}: try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk of {constants.HF_HUB_CACHE!r} is full: free some, or set HF_HOME to a folder on another disk"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{os.fspath(error.filename)} cannot be written ({error.strerror}); HF_HOME says where the cache is"
    if constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE is set: unset it to download"
    root = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__
    reason = " ".join(f"{type(root).__name__}: {root}".split())[:200]
    return f"the hub cannot be reached ({reason}); what the cache holds whole needs no network"
