"""What is measured of whom, and the files that each side is asked by: weights in its own names, inputs, a request."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_func import config as configs
from flux_func import random, tree
from flux_func.errors import UserError
from flux_func.interop import formats
from flux_func.models import flops, flux
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params
from flux_func.parity import exchange

PEERS = ("ours", "bfl", "diffusers", "torchtitan")
WORK = ("forward", "train_step", "sample", "compile")
TRAINING = ("train_step", "compile")
# What a model with a guidance embedding is told.
GUIDANCE = 3.5


@dataclass(frozen=True)
class Case:
    """One comparison: a flavor with so many (double, single) blocks, and what is done with it."""

    flavor: str
    depth: tuple[int, int]
    work: str
    image_size: int
    tokens: int
    batch: int

    def __str__(self) -> str:
        double, single = self.depth
        size = f"batch {self.batch}, {self.image_size} pixels, {self.tokens} tokens"
        return f"{self.work} of {self.flavor} {double}+{single}: {size}"

    @property
    def cfg(self) -> FluxConfig:
        """The model."""
        double, single = self.depth
        return dataclasses.replace(flux.flavor(self.flavor), depth=double, depth_single_blocks=single)

    def flops(self, steps: int) -> int:
        """Returns the operations of it, a sample being of so many steps; 0 where there is more to do than those."""
        tokens = ((self.image_size // 16) ** 2, self.tokens)
        forward = flops.forward_flops(self.cfg, *tokens)
        each = {"forward": forward, "train_step": flops.training_flops(self.cfg, *tokens), "sample": steps * forward}
        return self.batch * each.get(self.work, 0)


@dataclass(frozen=True)
class Side:
    """Who takes part: a peer, the type that it computes in, and, of ours, the policy of recomputation."""

    peer: str
    dtype: str = "float32"
    remat: str = "none"

    def __str__(self) -> str:
        narrow = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"{self.peer}{narrow}" + (f", remat {self.remat}" if self.remat != "none" else "")


@dataclass(frozen=True)
class Settings:
    """How all cases are measured.

    Attributes:
      device: "cpu" or "cuda".
      compile: whether blocks are compiled; where compilation is what is measured, they are.
      steps: Euler steps of a sample.
      warmup: steps of each side before those that count.
      rounds: those.
      seed: of weights and inputs.
    """

    device: str = "cpu"
    compile: bool = False
    steps: int = 4
    warmup: int = 3
    rounds: int = 5
    seed: int = 0


def product(**values: Sequence[Any]) -> list[Case]:
    """Returns a case for each combination of the fields' values."""
    return [Case(**dict(zip(values, each, strict=True))) for each in itertools.product(*values.values())]


def sides(peers: Sequence[str], dtypes: Sequence[str], remats: Sequence[str]) -> list[Side]:
    """Returns every peer in every type, ours under every policy too."""
    return [
        Side(peer, dtype, remat)
        for dtype in dtypes
        for peer in peers
        for remat in (remats if peer == "ours" else ("none",))
    ]


def check(cases: Iterable[Case], peers: Sequence[str]) -> None:
    """Raises UserError where torchtitan cannot do what is asked of it; the others can do all."""
    for case in cases if "torchtitan" in peers else ():
        if case.cfg.guidance_embed:
            raise UserError(
                f"--flavor is {case.flavor!r}: torchtitan has no guidance embedding, and this model has one; "
                f"choose another, or leave torchtitan out of --peers"
            )
        if case.work == "sample":
            raise UserError(
                "--work is 'sample': torchtitan always shifts its sampler's schedule, by a length of its own, so that "
                "nothing equal can be compared; leave torchtitan out of --peers"
            )


def check_memory(cases: Iterable[Case], count: int, available: int) -> None:
    """Raises UserError where what `count` sides hold at once, activations left out, is more than there is."""
    for case in cases:
        # Of a parameter in float32: itself, and in training its gradient and two moments.
        need = flops.parameters(case.cfg) * (16 if case.work in TRAINING else 4)
        need *= 1 if case.work == "compile" else count
        if need > available:
            raise UserError(
                f"--peers: {case}: all at once hold {need / 2**30:.1f} GiB, without activations, and "
                f"{available / 2**30:.1f} GiB are free; name fewer, or a smaller --depth"
            )


# Files.


def write_weights(cfg: FluxConfig, peers: Iterable[str], seed: int, folder: Path) -> dict[str, Path]:
    """Writes weights of which none is zero in each peer's own names; returns the file of each.

    Raises:
      UserError: there is too little room.
    """
    kinds = {peer: "bfl" if peer == "ours" else peer for peer in peers}
    need, free = 4 * flops.parameters(cfg) * len({*kinds.values()}), shutil.disk_usage(folder).free
    if free < need + 2**28:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB are needed for weights; name a folder "
            f"with more room in the environment variable TMPDIR"
        )
    params = draw(cfg, seed)
    for kind in {*kinds.values()}:
        exchange.write_weights(folder / f"{kind}.safetensors", formats.layout(cfg, kind), params)
    return {peer: folder / f"{kind}.safetensors" for peer, kind in kinds.items()}


def draw(cfg: FluxConfig, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Params:
    """Returns weights as `ff.init` draws them, none of them zero, by as many threads as there are cores."""
    rows, shapes = flux.drawing(cfg, seed, "nonzero"), tree.flatten(flux.abstract(cfg))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        leaves = pool.map(lambda path: rows(path, 0, shapes[path].shape[0]).to(device, dtype), shapes)
        return tree.unflatten(dict(zip(shapes, leaves, strict=True)))


def inputs(case: Case, seed: int) -> dict[str, Tensor]:
    """Returns the batch of `ff.loss`, whose noise, txt and y are also what is sampled from.

    Timesteps are powers of two: a thousand times those is exact in every type that a peer may round it in.
    """
    cfg, side = case.cfg, case.image_size // 8

    def normal(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(random.normal(seed, f"bench/{name}", 0, (case.batch, *shape)))

    out = {
        "latents": normal("latents", cfg.out_channels // 4, side, side),
        "noise": normal("noise", cfg.out_channels // 4, side, side),
        "timesteps": 0.5 ** (1 + torch.arange(case.batch) % 8),
        "txt": normal("txt", case.tokens, cfg.context_in_dim),
        "y": normal("y", cfg.vec_in_dim),
    }
    return {**out, "guidance": torch.full_like(out["timesteps"], GUIDANCE)} if cfg.guidance_embed else out


def ask(case: Case, sides: Sequence[Side], settings: Settings, weights: dict[str, Path], folder: Path) -> list[Path]:
    """Writes the inputs and a request for each side; returns the requests' files. `serve.py` reads them."""
    save_file(inputs(case, settings.seed), folder / "inputs.safetensors")
    usual = configs.default().optimizer
    common = {
        "work": case.work,
        "batch": case.batch,
        "inputs": str(folder / "inputs.safetensors"),
        "device": settings.device,
        "compile": settings.compile or case.work == "compile",
        "optimizer": {name: usual[name] for name in ("lr", "betas", "eps", "weight_decay", "clip_norm")},
        "sampler": {
            "steps": settings.steps,
            "guidance": GUIDANCE if case.cfg.guidance_embed else None,
            "cfg_scale": None,
            "shift": False,
        },
    }
    requests = [folder / f"{place}.json" for place in range(len(sides))]
    for path, side in zip(requests, sides, strict=True):
        own = {"model": exchange.transformer_config(side.peer, case.cfg), "weights": str(weights[side.peer])}
        path.write_text(json.dumps({**common, **own, "dtype": side.dtype, "remat": side.remat}))
    return requests
