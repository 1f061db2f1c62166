"""Hugging Face datasets: by row from the disk, or as a stream."""

import dataclasses
import os
from collections.abc import Iterator
from logging import getLogger
from typing import Any

import ml_collections
from absl import logging
from PIL import Image

from flux_func import random
from flux_func.config import one_of
from flux_func.data import captions, images
from flux_func.data.images import Unusable
from flux_func.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A data set by row: a `sources.Source`.

    Attributes:
      table: datasets.Dataset, memory-mapped (so that it is pickled by its path), its images not decoded.
      image_key, caption_key: its columns.
    """

    table: Any
    image_key: str
    caption_key: str

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"row {index}"

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return read(self.table[index], self.image_key, self.caption_key)


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A data set as it comes: a `sources.Stream`.

    Attributes:
      table: datasets.IterableDataset, its images not decoded.
      image_key, caption_key: its columns.
      split: "train" or "validation".
      fraction: of the rows, held out for validation; 0 where `table` is the split already.
      path: data.path.
    """

    table: Any
    image_key: str
    caption_key: str
    split: str
    fraction: float
    path: str

    def __iter__(self) -> Iterator[dict]:
        empty = False
        while not empty:
            empty = True
            for i, row in enumerate(self._rows()):
                if not self.fraction or self._split_of(i) == self.split:
                    empty = False
                    yield row
        raise UserError(f"data.path is {self.path!r}: should have rows for {self.split}; it came to its end without")

    def _rows(self) -> Iterator[dict]:
        try:
            yield from self.table
        except Exception as error:  # of many classes: network, storage, format
            reason = " ".join(str(error).split())
            raise UserError(f"data.path is {self.path!r}: its stream broke off ({reason}): start again") from error

    def read(self, row: dict) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a row, as `read`."""
        return read(row, self.image_key, self.caption_key)

    def _split_of(self, index: int) -> str:
        return "validation" if random.uniform(0, "validation split", index) < self.fraction else "train"


def rows(data: ml_collections.ConfigDict, path: str, split: str) -> tuple[Rows, bool]:
    """Returns the rows to take a split from, and whether they are that split already.

    Args:
      data: config.data.
      path: data.path with the home directory written out.
      split: "train" or "validation".

    Raises:
      UserError: data.path cannot be loaded, or lacks a split or column.
    """
    table, own = _split(_load(data, path), data, split)
    return Rows(_raw(table, data), data.image_key, data.caption_key), own


def stream(data: ml_collections.ConfigDict, path: str, split: str) -> Stream:
    """Returns a stream of a split; arguments and errors as `rows`."""
    if data.workers:
        raise UserError(f"data.workers is {data.workers}: should be 0 where data.streaming is True")
    logging.warning(
        "data.streaming: samples come in the stream's own order, and a resumed run skips as many rows as it had "
        "asked for; order and resume are exact only where data is read by index"
    )
    table, own = _split(_load(data, path), data, split)
    fraction = 0.0 if own else data.validation_fraction
    if split == "validation" and not own and not fraction:
        raise UserError("data.validation_fraction is 0.0: should be above 0: nothing is left for validation")
    return Stream(_raw(table, data), data.image_key, data.caption_key, split, fraction, data.path)


def read(row: dict, image_key: str, caption_key: str) -> tuple[Image.Image, str]:
    """Returns the image of a row in RGB, and its caption.

    Args:
      row: by column; the image as its bytes, its path or address, or a dict of the two.
      image_key, caption_key: the columns.

    Raises:
      Unusable: there is no readable image or no caption.
    """
    value = row[image_key]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _fetch(value)
    if not isinstance(value, bytes):
        raise Unusable("no image")
    return images.decode(value), captions.clean(row[caption_key])


def _fetch(path: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # each kind of storage has classes of its own
        raise Unusable(f"cannot be read: {error}") from error


def _load(data: ml_collections.ConfigDict, path: str) -> Any:
    """Returns a Dataset or IterableDataset, or a dict of them by split."""
    # While it is imported, it tells of the frameworks that it finds.
    getLogger("datasets").setLevel("WARNING")
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.source is 'hf': needs the package datasets: pip install 'flux-func[hub]'") from error
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            return datasets.load_dataset(path, streaming=data.streaming)
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # of many classes: network, storage, format
        raise _unloadable(data.path, error) from error
    if not data.streaming:
        return loaded
    if isinstance(loaded, dict):
        return {name: table.to_iterable_dataset() for name, table in loaded.items()}
    return loaded.to_iterable_dataset()


def _unloadable(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    remedy = "should be a folder written by save_to_disk, or a data set's name on the hub"
    return UserError(f"data.path is {path!r}: cannot be loaded ({reason}): {remedy}")


def _split(loaded: Any, data: ml_collections.ConfigDict, split: str) -> tuple[Any, bool]:
    """Returns the table to take a split from, and whether it is the data's own split of that name."""
    if not isinstance(loaded, dict):
        return loaded, False
    if "train" not in loaded:
        raise UserError(f"data.path is {data.path!r}: has the splits {', '.join(loaded)}: should have one named train")
    own = "validation" in loaded
    return loaded[split if own else "train"], own


def _raw(table: Any, data: ml_collections.ConfigDict) -> Any:
    """Returns the table with its images not decoded, so that a broken one is met where it can be replaced."""
    import datasets

    try:
        columns = table.column_names or list(next(iter(table), {}))
    except Exception as error:  # a stream is first opened here
        raise _unloadable(data.path, error) from error
    for field, column in (("data.image_key", data.image_key), ("data.caption_key", data.caption_key)):
        if column not in columns:
            raise UserError(f"{field} is {column!r}: {one_of(column, columns)}")
    if isinstance((table.features or {}).get(data.image_key), datasets.Image):
        return table.cast_column(data.image_key, datasets.Image(decode=False))
    return table
