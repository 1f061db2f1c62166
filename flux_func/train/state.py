"""The train state: one tree of parameters, optimizer state and, where it is kept, their moving average."""

import dataclasses

import ml_collections
import torch

from flux_func import tree
from flux_func.models import flux
from flux_func.models.layers import Params, at_least_float32
from flux_func.train.optimizer import Optimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_config(config: ml_collections.ConfigDict) -> flux.FluxConfig:
    """Returns the model that `config.model` names."""
    cfg = flux.flavor(config.model.flavor)
    embed = config.model.guidance_embed
    return cfg if embed is None else dataclasses.replace(cfg, guidance_embed=embed)


def create(config: ml_collections.ConfigDict, optimizer: Optimizer, device: torch.device) -> dict:
    """Returns the state before the first step: {"params": ..., "opt": ..., "ema": ... where ema.decay is not 0}."""
    params = flux.init(
        model_config(config),
        seed=config.train.seed,
        dtype=DTYPES[config.numerics.param],
        device=device,
        scheme=config.model.init,
    )
    return _around(params, config, optimizer)


def abstract(config: ml_collections.ConfigDict, optimizer: Optimizer) -> dict:
    """Returns the same tree on the meta device: shapes and types without memory."""
    return _around(flux.abstract(model_config(config), DTYPES[config.numerics.param]), config, optimizer)


def _around(params: Params, config: ml_collections.ConfigDict, optimizer: Optimizer) -> dict:
    state = {"params": params, "opt": optimizer.init(params)}
    if config.ema.decay:
        # A thousandth of a bfloat16 weight's change would be rounded away.
        state["ema"] = tree.map(lambda leaf: leaf.to(at_least_float32(leaf.dtype), copy=True), params)
    return state


def averaged(state: dict) -> dict:
    """Returns the parameters to validate and to sample with: the average where it is kept."""
    return state.get("ema", state["params"])


def size_in_bytes(state: tree.Tree) -> int:
    """Returns the bytes of all tensors of a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(state))
