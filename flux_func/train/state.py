"""The train state: one tree of parameters, optimizer state and, where it is kept, their moving average.

Where lora.rank is above 0, its parameters are the LoRA's; `adapt.py` has the weights under it.
"""

import dataclasses
import functools
from collections.abc import Callable

import ml_collections
import torch
from torch import Tensor
from tqdm import tqdm

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import recognize
from flux_func.interop.stored import Stored, cast, warn_of_left_out
from flux_func.models import flux
from flux_func.models.layers import Params, at_least_float32
from flux_func.parallel import placements
from flux_func.parallel.placements import Placement
from flux_func.parallel.sharding import ONE_PROCESS, Sharding
from flux_func.train.optimizer import Optimizer
from flux_func.transforms import lora

# (dotted path, first, last) to those rows of the leaf.
Rows = Callable[[str, int, int], Tensor]
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
    sharding: Sharding = ONE_PROCESS,
) -> dict:
    """Returns the state before the first step: {"params": ..., "opt": ..., "ema": ... where ema.decay is not 0}.

    The parameters are those of `weights`, or else drawn, or a LoRA's; the average starts at them either way. A process
    draws or reads no more of them than it is to have.
    """
    if config.lora.rank:
        params = _fresh_lora(config, cfg, device, sharding)
    else:
        params = initial(config, cfg, DTYPES[config.numerics.param], device, weights, sharding)
    parts = _around(params, config, optimizer, sharding)
    places = placement(abstract(config, cfg, optimizer), sharding)
    leaves = (placements.distribute(leaf, places[path], sharding.mesh) for path, leaf in tree.flatten(parts).items())
    return tree.map(lambda _: next(leaves), parts)


def initial(
    config: ml_collections.ConfigDict,
    cfg: flux.FluxConfig,
    dtype: torch.dtype,
    device: torch.device,
    weights: Stored | None,
    sharding: Sharding,
) -> Params:
    """Returns what this process is to have of the model's weights before training, read or drawn."""
    if weights is not None:
        return read_weights(weights, dtype, device, sharding)
    draw = flux.drawing(cfg, config.train.seed, config.model.init)
    return _read(draw, flux.abstract(cfg, dtype), device, sharding, "drawing weights")


def trained(config: ml_collections.ConfigDict, cfg: flux.FluxConfig) -> Params:
    """Returns what a run trains, on the meta device: the parameters, or a LoRA of them.

    Raises:
      UserError: lora.patterns that fit nothing.
    """
    dtype = DTYPES[config.numerics.param]
    return _lora(config, cfg, "meta") if config.lora.rank else flux.abstract(cfg, dtype)


def _lora(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, device: str) -> lora.Lora:
    c, dtype = config.lora, DTYPES[config.numerics.param]
    try:
        return lora.init(flux.abstract(cfg), c.patterns, c.rank, c.alpha, config.train.seed, dtype=dtype, device=device)
    except ValueError as error:
        raise UserError(f"lora.patterns is {tuple(c.patterns)}: {error}") from error


def _fresh_lora(
    config: ml_collections.ConfigDict, cfg: flux.FluxConfig, device: torch.device, sharding: Sharding
) -> lora.Lora:
    whole, mesh = _lora(config, cfg, "cpu"), sharding.mesh
    if sharding.params is None:
        return tree.map(lambda leaf: leaf.to(device), whole)
    return tree.map(lambda leaf, at: leaf[at.local(mesh)].contiguous().to(device), whole, sharding.params)


def read_weights(weights: Stored, dtype: torch.dtype, device: torch.device, sharding: Sharding = ONE_PROCESS) -> Params:
    """Returns what this process is to have of the parameters, no more of which it reads."""

    def rows(path: str, first: int, last: int) -> Tensor:
        return cast(weights.rows(path, first, last), dtype, path)

    shapes = {path: torch.empty(shape, dtype=dtype, device="meta") for path, shape in weights.layout.ours.items()}
    return _read(rows, tree.unflatten(shapes), device, sharding, "reading weights")


def _read(rows: Rows, shapes: Params, device: torch.device, sharding: Sharding, doing: str) -> Params:
    """Returns what this process is to have of each leaf, under a progress bar that counts bytes."""
    flat, params = tree.flatten(shapes), {}
    places = placements.whole(flat) if sharding.params is None else tree.flatten(sharding.params)
    total = sum(place.local_bytes(sharding.mesh) for place in places.values())
    with tqdm(total=total, desc=doing, unit="B", unit_scale=True, delay=1) as bar:
        for path, place in places.items():
            params[path] = placements.read(place, sharding.mesh, functools.partial(rows, path), device)
            bar.update(params[path].nbytes)
    return tree.unflatten(params)


def abstract(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, optimizer: Optimizer) -> dict:
    """Returns the whole state on the meta device: shapes and types without memory."""
    return _around(trained(config, cfg), config, optimizer)


def placement(state: dict, sharding: Sharding) -> dict[str, Placement]:
    """Returns where every leaf of a whole state, meta tensors too, is to be, by its dotted path."""
    flat = tree.flatten(state)
    if sharding.params is None:
        return placements.whole(flat)
    return placements.of_state(flat, tree.flatten(sharding.params), tree.flatten(sharding.grads))


def _around(
    params: Params, config: ml_collections.ConfigDict, optimizer: Optimizer, sharding: Sharding = ONE_PROCESS
) -> dict:
    state = {"params": params, "opt": optimizer.init(sharding.owned(params))}
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
