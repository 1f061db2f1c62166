"""The frozen encoders of a run: images to latents and back, captions to embeddings."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_collections
import numpy as np
import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.launch import processes
from flux_func.models import autoencoder, text, text_files
from flux_func.models.flux import FluxConfig
from flux_func.parallel import placements, sharding
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import Sharding
from flux_func.train.state import DTYPES, find_weights
from flux_func.train.transfer import to_device

Tokens = Mapping[str, np.ndarray]
LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Encoders:
    """What turns data into the model's inputs, weights included.

    Attributes:
      tokenize: captions to {"t5": int64 [B, L], "clip": int64 [B, K]}; picklable, for data workers.
      encode_text: those tokens to (txt [B, L, 4096], y [B, 768]).
      encode_image: (images [B, 3, H, W] in [-1, 1], standard normal noise like the latents or None), both on the
        host, to latents [B, 16, H/8, W/8] on the device.
      decode: latents to images.
      posterior_noise: whether `encode_image` is to be given noise in training.
    """

    tokenize: Callable[[list[str]], Tokens]
    encode_text: Callable[[Tokens], tuple[Tensor, Tensor]]
    encode_image: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    posterior_noise: bool


def build(config: ml_collections.ConfigDict, cfg: FluxConfig, device: torch.device, mesh: Mesh = ONE) -> Encoders:
    """Returns the encoders that a config names, loaded to `device`; what has weights computes in numerics.compute.

    T5 is split over the processes of the mesh as parallel.text_encoder says, and gathered block by block: then every
    process makes the same calls of `encode_text` in the same order. The others are whole in each process.

    Raises:
      UserError: files that are missing or do not serve, or whose widths are not those of the model `cfg`; a table that
        cannot be honoured.
    """
    text_cfg = text_config(config, cfg)
    dtype = DTYPES[config.numerics.compute]
    image_params, image_cfg = _autoencoder(config, dtype, device)
    try:
        _check_widths(text_cfg, cfg)
        tokenize = text.tokenizer(text_cfg)
        split = t5_sharding(config, text_cfg, dtype, device, mesh)
        text_params = text.load(text_cfg, config.train.seed, dtype, device, _reading(split))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    wrap_stage = _gathering(split, text_cfg, text_params)

    # What has no weights is computed on the host, while the device is at the step before.
    reader, viewer = (device if params else torch.device("cpu") for params in (text_params, image_params))

    @torch.no_grad()
    def encode_text(tokens: Tokens) -> tuple[Tensor, Tensor]:
        there = {part: to_device(torch.as_tensor(ids), reader) for part, ids in tokens.items()}
        txt, y = text.encode(text_params, text_cfg, there, wrap_stage=wrap_stage)
        return to_device(txt, device), to_device(y, device)

    @torch.no_grad()
    def encode_image(images: Tensor, noise: Tensor | None) -> Tensor:
        images = to_device(images, viewer).to(dtype if image_params else images.dtype)
        noise = None if noise is None else to_device(noise, viewer)
        return to_device(autoencoder.encode(image_params, image_cfg, images, noise).float(), device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        latents = latents.to(dtype) if image_params else latents
        return autoencoder.decode(image_params, image_cfg, latents).float()

    sampled = config.autoencoder.kind == "kl" and config.autoencoder.sample
    return Encoders(tokenize, encode_text, encode_image, decode, sampled)


def text_config(config: ml_collections.ConfigDict, cfg: FluxConfig) -> text.TextConfig:
    """Returns the text encoders that a config names, for the model `cfg`."""
    t = config.text
    return text.TextConfig(
        kind=t.kind,
        path=t.path,
        t5=t.t5,
        clip=t.clip,
        max_length=t.max_length,
        random_init=t.random_init,
        context_dim=cfg.context_in_dim,
        vec_dim=cfg.vec_in_dim,
    )


def t5_sharding(
    config: ml_collections.ConfigDict, text_cfg: text.TextConfig, dtype: torch.dtype, device: torch.device, mesh: Mesh
) -> Sharding:
    """Returns where T5's parameters are over a mesh; UserError for a table that cannot be honoured."""
    shapes = tree.flatten(text.abstract(text_cfg, dtype).get("t5", {}))
    places = placements.resolve(config.parallel.text_encoder, shapes, mesh, "parallel.text_encoder")
    return Sharding(mesh, tree.unflatten(places), prefetch=config.parallel.prefetch, device=device)


def _reading(split: Sharding) -> text.Read:
    """Returns what `text.load` is to read of T5: this process's part of each leaf."""
    places = tree.flatten(split.params)
    return lambda path, rows: placements.read(places[path], split.mesh, rows, split.device)


def _gathering(split: Sharding, text_cfg: text.TextConfig, params: text.Params) -> text.WrapStage | None:
    """Returns what makes T5's stages compute with their whole parameters; None where this process has them."""
    if split.mesh.size() == 1 or not params:
        return None
    visits = {path: functools.partial(text.select, path=path) for path, _ in text.t5_chain(text_cfg)}
    take = sharding.taker(split, params["t5"], visits)
    return lambda stage, path: lambda part, carry, const: stage(take(path), carry, const)


def ahead(
    encoders: Encoders,
    captions: Sequence[str],
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda count: None,
) -> Encoders:
    """Returns encoders that know these captions alone, encoded here and now: the models of text can be let go.

    Every process calls it, each with captions of its own; one with fewer encodes along with the others.

    Args:
      encoders: the encoders.
      captions: every caption to come. Of each the encoding is kept, on the CPU (4 MB for FLUX's 512 tokens in
        bfloat16); a token of it is its place among them.
      batch_size: captions encoded at once.
      progress: called with the number of captions after each batch.
    """
    places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    rows: list[tuple[Tensor, Tensor]] = []
    for start in range(0, max(processes.gather(len(places))), batch_size):
        part = list(places)[start : start + batch_size]
        txt, y = encoders.encode_text(encoders.tokenize(part or [""]))
        device = txt.device
        rows += list(zip(txt.cpu(), y.cpu(), strict=True))[: len(part)]
        progress(len(part))

    def tokenize(captions: list[str]) -> Tokens:
        return {"place": np.array([places[caption] for caption in captions])}

    def encode_text(tokens: Tokens) -> tuple[Tensor, Tensor]:
        txt, y = zip(*(rows[place] for place in tokens["place"]), strict=True)
        return to_device(torch.stack(txt), device), to_device(torch.stack(y), device)

    return dataclasses.replace(encoders, tokenize=tokenize, encode_text=encode_text)


def _check_widths(text_cfg: text.TextConfig, cfg: FluxConfig) -> None:
    needed = (cfg.context_in_dim, cfg.vec_in_dim)
    for part, found, width in zip(("t5", "clip"), text.widths(text_cfg), needed, strict=True):
        if found != width:
            field, path = text_files.given(text_cfg, part)
            raise UserError(f"{field} is {path!r}: its {part.upper()} is {found} wide, and the model takes {width}")


def _autoencoder(config: ml_collections.ConfigDict, dtype: torch.dtype, device: torch.device):
    path = config.autoencoder.path
    if config.autoencoder.kind == "kl" and path:
        found = find_weights(path, "autoencoder", "autoencoder.path")
        form = (found.cfg.z_channels, found.cfg.downsampling)
        if form != (LATENT_CHANNELS, PIXELS_PER_LATENT):
            says = "its latents have {} channels, and one stands for {} pixels along a side".format(*form)
            wanted = f"FLUX.1's have {LATENT_CHANNELS}, and one stands for {PIXELS_PER_LATENT}"
            raise UserError(f"autoencoder.path is {path!r}: {says}; {wanted}")
        return found.params(dtype, device), found.cfg
    cfg = autoencoder.AutoencoderConfig(kind=config.autoencoder.kind)
    return autoencoder.init(cfg, config.train.seed, dtype, device), cfg
