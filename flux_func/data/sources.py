"""Where samples come from: random access by index, picklable, so that worker processes hold a source as it is."""

import dataclasses
import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import ml_collections
import numpy as np
from absl import logging
from grain.experimental import index_shuffle
from PIL import Image

from flux_func import random
from flux_func.data import captions, hub, images
from flux_func.data.images import Unusable
from flux_func.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
Sample = tuple[Image.Image, str]  # RGB, and its caption


class Source(Protocol):
    """Samples by index: the same one for the same index, in any process and order."""

    def __len__(self) -> int:
        """Returns the number of samples, unusable ones included."""

    def name(self, index: int) -> str:
        """Returns what a user would know the sample by."""

    def __getitem__(self, index: int) -> Sample:
        """Returns the sample; raises Unusable where it has no readable image or no caption."""


class Stream(Protocol):
    """Rows as they come, epoch after epoch without end."""

    def __iter__(self) -> Iterator[Any]:
        """Yields rows, not decoded."""

    def read(self, row: Any) -> Sample:
        """Returns the sample of a row; raises Unusable where it has no readable image or no caption."""


def build(config: ml_collections.ConfigDict, split: str) -> Source | Stream:
    """Returns the source that config.data names.

    Args:
      config: of the run.
      split: "train" or "validation": the data's own where it has both, else a part held out by
        data.validation_fraction, the same part whatever the seed of the run.

    Raises:
      UserError: data.path is not what data.source reads, or there is nothing in the split.
    """
    data = config.data
    path = os.path.expanduser(data.path)
    if data.streaming:
        if data.source != "hf":
            raise UserError(f"data.streaming is True: should be False, as data.source {data.source!r} is read by index")
        return hub.stream(data, path, split)
    if data.source == "hf":
        rows, own_split = hub.rows(data, path, split)
        return rows if own_split else held_out(rows, data.validation_fraction, split)
    if data.source == "wds":
        whole = Tars.scan(path)
    elif data.source == "folder":
        whole = Folder.scan(path)
    else:
        whole = Digits.load(data.image_size)
    return held_out(whole, data.validation_fraction, split)


def shuffled(index: int, size: int, seed: int, purpose: str, *position: int) -> int:
    """Returns the place of `index` in the permutation of range(size) that (seed, purpose, position) names.

    Nothing is stored: the permutation is a block cipher on the range (grain's index_shuffle).
    """
    key = int(random.generator(seed, purpose, *position).integers(1 << 32))
    return index_shuffle(index, max_index=size - 1, seed=key, rounds=4)


@dataclasses.dataclass(frozen=True)
class Part:
    """Samples `start` to `start + count` of a source shuffled once and for all."""

    source: Source
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.name(self._index(index))

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._index(index)]

    def _index(self, index: int) -> int:
        # Seed 0, not the run's: a run that goes on from another's weights must not train on what that one held out.
        return shuffled(self.start + index, len(self.source), 0, "validation split")


def held_out(source: Source, fraction: float, split: str) -> Part:
    """Returns one of the two parts of a source: "validation" has `fraction` of it, at least one sample.

    Raises:
      UserError: the part is empty.
    """
    count = max(1, round(len(source) * fraction)) if fraction else 0
    part = Part(source, 0, count) if split == "validation" else Part(source, count, len(source) - count)
    if not len(part):
        limit = "above 0" if split == "validation" else f"smaller, as there are {len(source)} samples"
        raise UserError(f"data.validation_fraction is {fraction}: should be {limit}: nothing is left for {split}")
    return part


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998): 1,797 of 8x8 pixels, light ink on dark.

    Attributes:
      pixels: uint8 [1797, 8, 8].
      labels: int64 [1797], 0 to 9.
      size: pixels of the squares that they are enlarged to.
    """

    pixels: np.ndarray
    labels: np.ndarray
    size: int

    NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    @classmethod
    def load(cls, size: int) -> "Digits":
        """Returns the source; the data comes with scikit-learn."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        return cls(np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target, size)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digit {index}"

    def __getitem__(self, index: int) -> Sample:
        enlarged = Image.fromarray(self.pixels[index]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return enlarged.convert("RGB"), f"a handwritten {self.NAMES[self.labels[index]]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Tars:
    """WebDataset tars: members of one key (`KEY.jpg`, `KEY.txt` or `KEY.json`) are a sample.

    Attributes:
      paths: of the tars.
      index: one record a sample: its tar's number and key, and (offset, size) of its image, its .txt and its .json,
        size -1 for what it has not.
    """

    paths: list[str]
    index: np.ndarray

    @classmethod
    def scan(cls, path: str) -> "Tars":
        """Returns the source of a tar, a glob of tars or several of them with commas between, by headers alone."""
        paths = _tar_paths(path)
        if len(paths) > 1:
            logging.info("data.path: reading the headers of %d tars", len(paths))
        rows = [(number, *row) for number, tar in enumerate(paths) for row in _scan_tar(path, tar)]
        if not rows:
            raise UserError(f"data.path is {path!r}: no samples in it: should hold members such as KEY.jpg and KEY.txt")
        length = max(len(row[1]) for row in rows)
        parts = [(part, np.int64, (2,)) for part in ("image", "txt", "json")]
        return cls(paths, np.array(rows, dtype=[("tar", np.int32), ("key", f"U{length}"), *parts]))

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        row = self.index[index]
        return f"{self.paths[row['tar']]}:{row['key']}"

    def __getitem__(self, index: int) -> Sample:
        row = self.index[index]
        if row["image"][1] < 0:
            raise Unusable("no image")
        # Opened for each sample: that costs less than a decode, is safe in threads and needs no limit on open files.
        try:
            with open(self.paths[row["tar"]], "rb") as file:
                caption = self._caption(file, row)
                return images.decode(_read(file, row["image"])), caption
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from error

    def _caption(self, file: Any, row: np.void) -> str:
        if row["txt"][1] >= 0:
            return captions.from_bytes(_read(file, row["txt"]))
        if row["json"][1] < 0:
            raise Unusable("no caption")
        try:
            caption = json.loads(_read(file, row["json"]))["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise Unusable("no caption in its JSON") from error
        return captions.clean(caption)


def _read(file: Any, part: np.ndarray) -> bytes:
    offset, size = part.tolist()
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise Unusable("the tar is shorter than when it was opened")
    return data


def _tar_paths(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    paths = []
    for pattern in path.split(","):
        found = [name for name in glob.glob(pattern.strip(), recursive=True) if os.path.isfile(name)]
        if not found:
            hint = f", such as {pattern}/*.tar" if os.path.isdir(pattern) else ""
            raise UserError(f"data.path is {path!r}: no such file: should name a tar or a glob of tars{hint}")
        paths += found
    return sorted(set(paths))


def _scan_tar(path: str, tar_path: str) -> Iterable[tuple]:
    """Returns (key, image, txt, json) of each sample in a tar, each part as (offset, size); see `Tars`."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    problem = ""
    try:
        with tarfile.open(tar_path, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                part = "image" if f".{suffix.lower()}" in IMAGES else suffix.lower()
                if member.isreg() and stem and part in ("image", "txt", "json"):
                    samples.setdefault(folder + slash + stem, {})[part] = (member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)
            # tarfile ends without a word at a header that is cut off or damaged; a whole tar ends with zeros.
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                problem = "it ends or is damaged in the middle"
    except (tarfile.TarError, OSError, ValueError) as error:
        problem = str(error)
    if problem:
        remedy = "should be a whole tar, not compressed; copy it again"
        raise UserError(f"data.path is {path!r}: {tar_path} cannot be read ({problem}): {remedy}")
    absent = (-1, -1)
    return [(key, *(parts.get(p, absent) for p in ("image", "txt", "json"))) for key, parts in samples.items()]


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files of a folder and the folders in it, in the order of their names, each with a .txt caption beside.

    Attributes:
      root: the folder.
      names: of the images, relative to it, with "/" between folders.
    """

    root: str
    names: list[str]

    @classmethod
    def scan(cls, path: str) -> "Folder":
        """Returns the source; only folders are listed, no file is opened."""
        if not os.path.isdir(path):
            raise UserError(f"data.path is {path!r}: no such folder: should hold images with .txt captions beside them")
        names = [
            os.path.relpath(os.path.join(folder, file), path).replace(os.sep, "/")
            for folder, _, files in os.walk(path)
            for file in files
            if file.lower().endswith(IMAGES) and not file.startswith(".")
        ]
        if not names:
            raise UserError(f"data.path is {path!r}: no images in it: should hold files ending in {', '.join(IMAGES)}")
        return cls(path, sorted(names))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> Sample:
        path = os.path.join(self.root, self.names[index])
        caption_path = os.path.splitext(path)[0] + ".txt"
        if not os.path.isfile(caption_path):
            raise Unusable(f"no caption: {os.path.basename(caption_path)} is not there")
        try:
            with open(caption_path, "rb") as caption, open(path, "rb") as image:
                return images.decode(image.read()), captions.from_bytes(caption.read())
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from error
