"""The train state: one tree of parameters, optimizer state and, where it is kept, their moving average."""

import dataclasses
import math

import ml_collections
import torch
from tqdm import tqdm

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import recognize
from flux_func.interop.stored import Stored, warn_of_left_out
from flux_func.models import flux
from flux_func.models.layers import Params, at_least_float32
from flux_func.train.optimizer import Optimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The model's input channels where it is told of an image by its noise alone: 16 latents in 2x2 patches.
IN_CHANNELS = 64


def find_weights(path: str, part: str, field: str) -> Stored:
    """Returns the weights at a path, unread, and logs what is left out beside them.

    Raises:
      UserError: naming the field that the path was given by; see `recognize.find`.
    """
    try:
        weights = recognize.find(path, part)
    except UserError as error:
        raise UserError(f"{field} is {path!r}: {str(error).removeprefix(f'{path}: ')}") from error
    warn_of_left_out(weights)
    return weights


def read_weights(weights: Stored, dtype: torch.dtype, device: torch.device) -> Params:
    """Returns the parameters, read leaf by leaf under a progress bar that counts bytes."""
    total = sum(math.prod(shape) * weights.types[path].itemsize for path, shape in weights.layout.ours.items())
    with tqdm(total=total, desc="reading weights", unit="B", unit_scale=True) as bar:
        return weights.params(dtype, device, bar.update)


def model_config(config: ml_collections.ConfigDict, weights: Stored | None = None) -> flux.FluxConfig:
    """Returns the model that `config.model` names, whose shape is that of the weights it starts from.

    Raises:
      UserError: weights that are not of the flavor, that text-to-image training does not fit, or that have a guidance
        embedding where the config has none, or the other way round.
    """
    m = config.model
    if weights is None:
        cfg = flux.flavor(m.flavor)
        embed = cfg.guidance_embed if m.guidance_embed is None else m.guidance_embed
    else:
        check_text_to_image(weights, "model.weights", m.weights)
        _check_flavor(config, weights)
        cfg, embed = weights.cfg, weights.cfg.guidance_embed
        if m.guidance_embed not in (None, embed):
            has = "have" if embed else "lack"
            raise UserError(
                f"model.guidance_embed is {m.guidance_embed}: the weights in {m.weights} {has} a guidance embedding; "
                f"set --config.model.guidance_embed={embed}, or leave it out"
            )
    eps = cfg.qk_norm_eps if m.qk_norm_eps is None else m.qk_norm_eps
    return dataclasses.replace(cfg, guidance_embed=embed, qk_norm_eps=eps)


def check_text_to_image(weights: Stored, field: str, given: str) -> None:
    """Checks that a transformer takes noise alone; UserError for FLUX.1 Fill, Canny, Depth and the like."""
    channels = weights.cfg.in_channels
    if channels != IN_CHANNELS:
        kind = {384: " as FLUX.1 Fill, an image and a mask", 128: " as FLUX.1 Canny and Depth, an image"}
        raise UserError(
            f"{field} is {given!r}: the transformer takes {channels} channels, not {IN_CHANNELS}: it is told more than "
            f"text{kind.get(channels, '')} beside the noise; name a text-to-image model"
        )


def _check_flavor(config: ml_collections.ConfigDict, weights: Stored) -> None:
    m = config.model
    if not m.flavor:
        return
    found, named = dataclasses.asdict(weights.cfg), dataclasses.asdict(flux.flavor(m.flavor))
    fields = [name for name in found if name not in ("guidance_embed", "qk_norm_eps") and found[name] != named[name]]
    if fields:
        listed = ", ".join(f"{name} {found[name]} (not {named[name]})" for name in fields)
        raise UserError(
            f"model.flavor is {m.flavor!r}: the weights in {m.weights} have {listed}; "
            f"set --config.model.flavor= (empty) to take their shape, or name other weights"
        )


def create(
    config: ml_collections.ConfigDict,
    cfg: flux.FluxConfig,
    optimizer: Optimizer,
    device: torch.device,
    weights: Stored | None = None,
) -> dict:
    """Returns the state before the first step: {"params": ..., "opt": ..., "ema": ... where ema.decay is not 0}.

    The parameters are those of `weights`, or else drawn; the average starts at them either way.
    """
    dtype = DTYPES[config.numerics.param]
    if weights is not None:
        params = read_weights(weights, dtype, device)
    else:
        params = flux.init(cfg, seed=config.train.seed, dtype=dtype, device=device, scheme=config.model.init)
    return _around(params, config, optimizer)


def abstract(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, optimizer: Optimizer) -> dict:
    """Returns the same tree on the meta device: shapes and types without memory."""
    return _around(flux.abstract(cfg, DTYPES[config.numerics.param]), config, optimizer)


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
