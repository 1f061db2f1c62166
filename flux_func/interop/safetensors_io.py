"""Safetensors files: read a few rows at a time, written a tensor at a time, so that memory does not grow with them.

The format is eight bytes of the header's length, the header (JSON: each tensor's type, shape and place), and the
tensors' bytes without a gap. safetensors itself checks headers; the tensors are read by plain reads rather than by its
memory map, whose pages count as this process's memory, and which ends the process where a file is cut short meanwhile.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_func.errors import UserError
from flux_func.interop import target
from flux_func.interop.spans import Rows, Shape

# In the order in which safetensors lays tensors out: the aligned ones first.
_CODES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {code: dtype for dtype, code in _CODES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_CODES)}


@dataclass(frozen=True)
class Tensors:
    """Named tensors in files; nothing is read until `read` is called.

    Attributes:
      shapes: {name: shape}.
      dtypes: {name: type}.
      metadata: what the files say beside their tensors.
      read: (name, first row, row after the last) to those rows on the CPU, in the stored type and in memory of their
        own; a tensor without dimensions is one row.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    read: Rows


class _Place(NamedTuple):
    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape

    def read(self, first: int, last: int) -> Tensor:
        rows, *rest = self.shape or (1,)
        if not 0 <= first <= last <= rows:
            raise ValueError(f"rows {first} to {last} should lie within 0 to {rows}")
        tensor = torch.empty(last - first, *rest, dtype=self.dtype)
        row = math.prod(rest) * self.dtype.itemsize
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + first * row)
                filled = file.readinto(_bytes(tensor))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more ({error.strerror})") from error
        if filled < tensor.nbytes:
            raise UserError(f"{self.path}: has become shorter since it was opened")
        return tensor


def _bytes(tensor: Tensor) -> np.ndarray:
    # One dimension first: a tensor without any has no bytes to view.
    return tensor.reshape(-1).view(torch.uint8).numpy()


# Reading.


def open_files(paths: Iterable[str | Path]) -> Tensors:
    """Returns the tensors of safetensors files; their headers are read and checked now.

    Raises:
      UserError: a file that cannot be read, is no safetensors file or is cut short; a name that two files have.
    """
    places, metadata = dict[str, _Place](), dict[str, str]()
    for path in map(Path, paths):
        found, said = _open(path)
        if twice := places.keys() & found:
            name = min(twice)
            raise UserError(f"{path}: holds {name!r}, which {places[name].path} holds too; keep one of them")
        places |= found
        metadata |= said
    return Tensors(
        {name: place.shape for name, place in places.items()},
        {name: place.dtype for name, place in places.items()},
        metadata,
        lambda name, first, last: places[name].read(first, last),
    )


def open_sharded(index: str | Path) -> Tensors:
    """Returns the tensors of the files that an index (`*.safetensors.index.json`) names, which lie beside it.

    Raises:
      UserError: an index that cannot be read, a shard that is not there, an index and shards that do not hold the same
        names, or what `open_files` raises.
    """
    index = Path(index)
    weight_map = _weight_map(index)
    shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    # A name is not a path: what lies elsewhere is none of this model's shards.
    absent = [name for name, path in shards.items() if path.name != name or not path.is_file()]
    if absent:
        raise UserError(f"{index}: names {absent[0]!r}, which is not there ({len(absent)} absent of {len(shards)})")
    tensors = open_files(shards.values())
    if wrong := tensors.shapes.keys() ^ weight_map.keys():
        where = "the index has and no shard" if min(wrong) in weight_map else "a shard has and the index has not"
        raise UserError(f"{index}: does not fit its shards: {min(wrong)!r} {where} ({len(wrong)} such)")
    return tensors


def _open(path: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    places = {}
    try:
        with path.open("rb") as plain, safe_open(path, "pt") as file:
            offset = 8 + int.from_bytes(plain.read(8), "little")
            # There are no gaps: a tensor starts where the one before ends.
            for name in file.offset_keys():
                part = file.get_slice(name)
                shape, code = tuple(part.get_shape()), part.get_dtype()
                if code not in _TYPES:
                    raise UserError(
                        f"{path}: {name!r} is of type {code}, which is not read; use weights of a float type"
                    )
                places[name] = _Place(path, offset, _TYPES[code], shape)
                offset += math.prod(shape) * _TYPES[code].itemsize
            return places, file.metadata() or {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: is cut short or no safetensors file ({error}); get it again") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of safetensors files (it should have a weight_map)") from error


# Writing.


def write(
    path: str | Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda count: None,
    overwrite: bool = False,
) -> None:
    """Writes a safetensors file, a tensor at a time, beside `path` and renamed at the end.

    The file is that of `safetensors.torch.save_file` byte for byte, and its metadata sorted.

    Args:
      path: of the file.
      shapes, dtypes: of the tensors, by name.
      read: name to tensor, of that shape and type; called once for each.
      metadata: what the file says beside its tensors.
      progress: called with the bytes written after each tensor.
      overwrite: whether to replace a file that is there.

    Raises:
      UserError: `path` is there already, or cannot be written.
      ValueError: `read` returned something else than was announced.
    """
    names = sorted(shapes, key=lambda name: (_ORDER[dtypes[name]], name))
    with target.beside(path, overwrite) as partial, partial.open("wb") as file:
        file.write(_header(names, shapes, dtypes, metadata or {}))
        for name in names:
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shapes[name]) or tensor.dtype != dtypes[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as announced")
            file.write(_bytes(tensor.detach().cpu().contiguous()))
            progress(tensor.nbytes)


def write_sharded(
    folder: str | Path,
    stem: str,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    max_bytes: int = 10_000_000_000,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes `stem.safetensors` into a folder; in shards with an index where it would pass `max_bytes`.

    Names, index and the filling of shards in the order of `shapes` are huggingface_hub's, whose readers want them so.

    Args:
      folder: is there already.
      stem: the files' name: "diffusion_pytorch_model" for diffusers, "model" for transformers.
      max_bytes: of the tensors in a shard; a tensor larger than that has a shard of its own.
      shapes, dtypes, read, metadata, progress: see `write`.
    """
    folder, sizes = Path(folder), _sizes(shapes, dtypes)
    shards = _shards(sizes, max_bytes)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        write(folder / file, {name: shapes[name] for name in shard}, dtypes, read, metadata, progress)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _header(
    names: Iterable[str], shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end, sizes = 0, _sizes(shapes, dtypes)
    for name in names:
        start, end = end, end + sizes[name]
        header[name] = {"dtype": _CODES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sizes(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    return {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
