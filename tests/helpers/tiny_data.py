"""Tiny data sets made on the spot, and a tokenizer that worker processes can hold."""

import io
import pathlib
import tarfile
from collections.abc import Mapping

import numpy as np
from PIL import Image

from flux_func import config

PHOTOGRAPHS = pathlib.Path(__file__).parents[3] / "shared/data/cc12m-train-0000.tar"


def tokenize(captions: list[str]) -> dict[str, np.ndarray]:
    """Returns the captions' first 8 code points for T5 and the negatives of the first 3 for CLIP."""
    ids = np.array([[ord(c) for c in caption[:8].ljust(8, "\0")] for caption in captions], dtype=np.int64)
    return {"t5": ids, "clip": -ids[:, :3]}


def settings(**data) -> object:
    """Returns the default config with some fields of config.data set."""
    made = config.default()
    made.data.image_size = 16
    made.data.update(data)
    return made


def picture(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Returns an image of random pixels."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    channels = [Image.fromarray(pixels[..., band]) for band in range(bands)]
    return channels[0] if bands == 1 else Image.merge(mode, channels)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """Returns an image's file as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: pathlib.Path, members: Mapping[str, bytes]) -> pathlib.Path:
    """Writes a tar of the members, in their order, and returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def members(count: int) -> dict[str, bytes]:
    """Returns PNGs and captions of `count` samples, by name in a tar or folder."""
    out = {}
    for i in range(count):
        out[f"{i:03d}.png"] = encoded(picture(i))
        out[f"{i:03d}.txt"] = f"caption {i}".encode()
    return out
