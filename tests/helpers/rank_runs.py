"""Whole runs of the trainer on each process of a mesh, which the process group of `ranks.run` is."""

import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image

from flux_func.train import loop
from tests.helpers import rank_training


def train(rank: int, workdir: str, sizes: dict[str, int], fields: dict[str, Any]) -> None:
    """Trains in a workdir, which all processes share."""
    del rank
    loop.train(rank_training.config(sizes, fields), workdir, torch.device("cpu"))


def pictures(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {name: int16 [height, width, 3]} of the pictures in a run's folder of samples."""
    return {path.name: np.asarray(Image.open(path)).astype(np.int16) for path in (workdir / "samples").glob("*.png")}
