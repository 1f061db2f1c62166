"""Folders of torch.distributed.checkpoint, which is what torchtitan writes: read and written a tensor at a time.

    FOLDER/.metadata      a pickle: every tensor's type, shape and chunks, and in which file each chunk is where
    FOLDER/__R_N.distcp   of rank R: chunks, each as torch.save writes it

A pickle can run any code, so `.metadata` is read by an unpickler that knows a few names alone and makes inert records
of them, never torch's objects. The chunks are read by torch's own reader, which loads nothing but tensors.
"""

import functools
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_func.errors import UserError
from flux_func.interop.safetensors_io import Tensors
from flux_func.interop.spans import Shape

METADATA = ".metadata"


def open_folder(folder: str | Path) -> Tensors:
    """Returns the tensors of a DCP folder, whichever ranks wrote them.

    What the folder holds beside tensors, such as numbers of an optimizer, is in the metadata: {name: "not a tensor"}.

    Raises:
      UserError: the folder cannot be read, names a file that is not there or is cut short, or its `.metadata` names
        something that no checkpoint needs.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata

    folder = Path(folder)
    entries, others, places = _parse(folder / METADATA)
    _check_files(folder, places)
    metadata, reader = Metadata(entries, storage_data=places), dcp.FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    @functools.lru_cache(maxsize=1)  # chunks are read whole, and rows asked for in order, often of one tensor in pieces
    def whole(name: str) -> Tensor:
        tensor = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({name: tensor}, metadata)
        try:
            reader.read_data(planner.create_local_plan(), planner)
        except Exception as error:  # what torch raises for damaged files is of many kinds
            raise UserError(f"{folder}: {name} cannot be read ({_line(error)}); get the files anew") from error
        return tensor if tensor.dim() else tensor.reshape(1)

    return Tensors(
        shapes={name: tuple(entry.size) for name, entry in entries.items()},
        dtypes={name: entry.properties.dtype for name, entry in entries.items()},
        metadata=dict.fromkeys(others, "not a tensor"),
        read=lambda name, first, last: whole(name)[first:last].clone(),
    )


def write(
    folder: str | Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a DCP folder, for torch.distributed.checkpoint.load or torchtitan's checkpoint.initial_load_path.

    Args:
      folder: which need not exist.
      shapes, dtypes: {name: shape} and {name: type} of the tensors.
      read: name to tensor. It is called for one name after another, and each tensor is let go of before the next.
      progress: called with the bytes of each tensor once it is read.

    Raises:
      OSError: the disk is full or refuses for another reason.
    """
    import torch.distributed.checkpoint as dcp

    class Streaming(dcp.DefaultSavePlanner):
        def lookup_object(self, index):
            tensor = read(index.fqn)
            progress(tensor.nbytes)
            return tensor

    tensors = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    # A file for each tensor, as the writer holds on to all tensors of a file; none ahead of its turn.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            dcp.save(tensors, storage_writer=writer, planner=Streaming(), no_dist=True)
        except dcp.CheckpointException as error:
            [(failure, _)] = error.failures.values()
            raise _cause(failure) from None


def _cause(error: BaseException) -> BaseException:
    """Returns the disk's refusal behind an error, which torch hides by its own in closing the file; or the error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (OSError, UserError)):
        cause = cause.__cause__ or cause.__context__
    return cause or error


# The metadata.


class _Record:
    """Stands for an object of torch's: the state it was pickled with, and nothing that acts."""

    def __init__(self, *arguments: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TensorEntry(_Record):
    """Stands for torch's TensorStorageMetadata."""


_MODULE = "torch.distributed.checkpoint.metadata"
# All that torch 2.11 to 2.13 name. The callable ones, tuple and str, stand for torch.Size and for a table of layouts.
_ALLOWED = {
    (_MODULE, "Metadata"): _Record,
    (_MODULE, "TensorStorageMetadata"): _TensorEntry,
    (_MODULE, "BytesStorageMetadata"): _Record,
    (_MODULE, "ChunkStorageMetadata"): _Record,
    (_MODULE, "TensorProperties"): _Record,
    (_MODULE, "MetadataIndex"): _Record,
    (_MODULE, "StorageMeta"): _Record,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "WindowsPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
    ("pathlib._local", "WindowsPath"): _Record,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    **{tuple(str(dtype).split(".")): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}


class _RefusedError(Exception):
    """The pickle names what it should not."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


@dataclass(frozen=True)
class _Place:
    """Where a chunk is: the fields of torch's _StorageInfo, by which its reader takes them."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Sequence[str] | None = None

    def __post_init__(self):
        parts = Path(self.relative_path).parts
        if not parts or ".." in parts or Path(self.relative_path).is_absolute():
            raise ValueError(f"it names {self.relative_path!r}, which is no file in the folder")
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"it names bytes {self.offset} to {self.offset + self.length} of {self.relative_path}")


def _parse(path: Path) -> tuple[dict[str, Any], list[str], dict[Any, _Place]]:
    """Returns ({name: torch's metadata of the tensor}, names of what is no tensor, {chunk: where it is})."""
    try:
        with path.open("rb") as file:
            root = _Unpickler(file).load().state
        entries = {name: entry for name, entry in root["state_dict_metadata"].items() if isinstance(name, str)}
        tensors = {name: _tensor(entry.state) for name, entry in entries.items() if isinstance(entry, _TensorEntry)}
        places = {_index(key.state): _Place(**info.state) for key, info in root["storage_data"].items()}
        for name, entry in tensors.items():
            _check_chunks(name, entry, places)
    except _RefusedError as error:
        raise UserError(
            f"{path}: refused, it names {_line(error)}, which has no place in a checkpoint and may run anything; "
            f"use one from a source you trust"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); should be a DCP folder's {METADATA}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: is not a whole DCP {METADATA} ({_line(error)}); get the files anew") from error
    return tensors, [name for name in entries if name not in tensors], places


def _tensor(state: Mapping[str, Any]) -> Any:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    dtype = state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype!r} is no type of tensors")
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk.state["offsets"]), torch.Size(chunk.state["sizes"]))
        for chunk in state["chunks"]
    ]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(state["size"]), chunks)


def _index(state: Mapping[str, Any]) -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    return MetadataIndex(state["fqn"], state.get("offset"), state.get("index"))


def _check_chunks(name: str, entry: Any, places: Mapping[Any, _Place]) -> None:
    """Checks that a tensor's chunks lie within it, are stored somewhere and are the whole of it, each element once."""
    for chunk in entry.chunks:
        ends = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if any(offset < 0 or size < 0 or offset + size > whole for offset, size, whole in ends):
            raise ValueError(f"{name} of shape {list(entry.size)} has a chunk beyond it")
        if _index({"fqn": name, "offset": chunk.offsets}) not in places:
            raise ValueError(f"{name} has a chunk at {list(chunk.offsets)} that is stored nowhere")
    # As many elements as it has, and none twice: none is left out.
    count = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if count != math.prod(entry.size) or _overlap(entry.chunks):
        raise ValueError(f"the chunks of {name} are not the whole of it, each element once")


def _overlap(chunks: Iterable[Any]) -> bool:
    """Returns whether any two chunks have an element in common."""
    boxes = sorted(
        [(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
        if math.prod(chunk.sizes)
    )
    live: list[list[tuple[int, int]]] = []  # those that reach the row at which the box begins
    for box in boxes:
        live = [other for other in live if not box or other[0][1] > box[0][0]]
        if any(all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)) for other in live):
            return True
        live.append(box)
    return False


def _check_files(folder: Path, places: Mapping[Any, _Place]) -> None:
    ends: dict[str, int] = {}
    for place in places.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder}: lacks {name}, which its {METADATA} names; get the files anew")
        size = (folder / name).stat().st_size
        if size < end:
            raise UserError(f"{folder / name}: is cut short, {size} bytes of at least {end}; get the files anew")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
