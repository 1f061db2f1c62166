"""All that is to be measured on one H200: the whole of FLUX at full speed, torchtitan beside it, and narrow types.

    python docs/h200.py --reference_python=titan/bin/python --out=runs/h200
    python docs/h200.py --tiny --device=cpu --peer=bfl --out=runs/h200_tiny

The second tries all of it out on a CPU, in a minute or two. The parts, each of which may be left out of --parts:

256, 1024: training steps of flux-schnell (11.9B parameters, configs/flux_schnell_h200.py) at so many pixels, in
bfloat16 and in Float8 in turn, from random latents and encodings that lie on the device, as encodings made beforehand
would. Then one step more in bfloat16 under torch's profiler.
peer: bench_main against torchtitan, with as many of flux-schnell's blocks as both hold at once.
curves: flux-debug for 200 steps by train_main, in float32, bfloat16 and Float8, with the same data and noise.

Writes OUT/h200.json, h200.txt (each figure beside its goal) and h200.png. A part that fails is named with its last
line, and the others go on. Exit code 1: a goal is missed, or a part failed.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import torch
from absl import flags
from torch import Tensor

from flux_func import cli, tree
from flux_func.bench import ours, report, serve
from flux_func.errors import UserError
from flux_func.interop import target
from flux_func.models import flops, flux
from flux_func.parity import process
from flux_func.train import metrics, optimizer, profile, state

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "flux_schnell_h200.py"
PARTS = ("256", "1024", "peer", "curves")
BFLOAT16: dict[str, Any] = {"numerics.param": "bfloat16", "numerics.compute": "bfloat16"}
NUMERICS: dict[str, dict[str, Any]] = {"bfloat16": BFLOAT16, "float8": BFLOAT16}
WARMUP = 2


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
      steps: {part: the config's fields}, of the training steps.
      peer: bench_main's flags.
      curves: train_main's fields.
    """

    steps: Mapping[str, Mapping[str, Any]]
    peer: Sequence[str]
    curves: Mapping[str, Any]


# Micro-batches are what plan_main finds room for: see the config. Each part's batch is four of them.
FULL = Sizes(
    steps={
        "256": {"data.image_size": 256, "text.max_length": 256, "train.batch_size": 32},
        "1024": {"data.image_size": 1024, "text.max_length": 512, "train.batch_size": 4},
    },
    peer=("--flavor=flux-schnell", "--depth=4+8", "--batch=8"),
    curves={"train.steps": 200, "train.batch_size": 8},
)
_SMALL = {"model.flavor": "flux-tiny", "text.max_length": 16, "compile.enabled": False}
TINY = Sizes(
    steps={
        "256": {**_SMALL, "data.image_size": 32, "train.batch_size": 4},
        "1024": {**_SMALL, "data.image_size": 64, "train.batch_size": 4},
    },
    peer=("--flavor=flux-tiny", "--depth=1", "--batch=1", "--image_size=32", "--tokens=16", "--nocompile"),
    curves={**_SMALL, "train.steps": 4, "train.batch_size": 2, "data.image_size": 32},
)
