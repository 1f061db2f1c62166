"""The frozen encoders of a run: images to latents and back, captions to embeddings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_collections
import numpy as np
import torch
from torch import Tensor

from flux_func.errors import UserError
from flux_func.models import autoencoder, text
from flux_func.models.flux import FluxConfig
from flux_func.train.state import DTYPES

Tokens = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Encoders:
    """What turns data into the model's inputs, weights included.

    Attributes:
      tokenize: captions to {"t5": int64 [B, L], "clip": int64 [B, K]}; picklable, for data workers.
      encode_text: those tokens to (txt [B, L, 4096], y [B, 768]).
      encode_image: (images [B, 3, H, W] in [-1, 1], standard normal noise like the latents or None) to
        latents [B, 16, H/8, W/8].
      decode: latents to images.
      posterior_noise: whether `encode_image` is to be given noise in training.
    """

    tokenize: Callable[[list[str]], Tokens]
    encode_text: Callable[[Tokens], tuple[Tensor, Tensor]]
    encode_image: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    posterior_noise: bool


def build(config: ml_collections.ConfigDict, cfg: FluxConfig, device: torch.device) -> Encoders:
    """Returns the encoders that a config names, loaded to `device`; what has weights computes in numerics.compute.

    Raises:
      UserError: files that are missing or do not serve, or whose widths are not those of the model `cfg`.
    """
    text_cfg = text.TextConfig(
        kind=config.text.kind,
        path=config.text.path,
        max_length=config.text.max_length,
        random_init=config.text.random_init,
        context_dim=cfg.context_in_dim,
        vec_dim=cfg.vec_in_dim,
    )
    dtype = DTYPES[config.numerics.compute]
    image_params, image_cfg = _autoencoder(config, dtype, device)
    try:
        widths = text.widths(text_cfg)
        if widths != (cfg.context_in_dim, cfg.vec_in_dim):
            remedy = f"{config.model.flavor} takes {cfg.context_in_dim} and {cfg.vec_in_dim}"
            raise UserError(f"text.path is {config.text.path!r}: T5 and CLIP are {widths} wide, {remedy}")
        tokenize = text.tokenizer(text_cfg)
        text_params = text.load(text_cfg, config.train.seed, dtype, device)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error

    @torch.no_grad()
    def encode_text(tokens: Tokens) -> tuple[Tensor, Tensor]:
        txt, y = text.encode(text_params, text_cfg, tokens)
        return txt.to(device), y.to(device)

    @torch.no_grad()
    def encode_image(images: Tensor, noise: Tensor | None) -> Tensor:
        images = images.to(device, dtype if image_params else images.dtype)
        return autoencoder.encode(image_params, image_cfg, images, noise).float()

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        latents = latents.to(dtype) if image_params else latents
        return autoencoder.decode(image_params, image_cfg, latents).float()

    sampled = config.autoencoder.kind == "kl" and config.autoencoder.sample
    return Encoders(tokenize, encode_text, encode_image, decode, sampled)


def _autoencoder(config: ml_collections.ConfigDict, dtype: torch.dtype, device: torch.device):
    if config.autoencoder.kind == "kl" and config.autoencoder.path:
        try:
            return autoencoder.load(config.autoencoder.path, dtype, device)
        except (ValueError, OSError) as error:
            raise UserError(f"autoencoder.path is {config.autoencoder.path!r}: {error}") from error
    cfg = autoencoder.AutoencoderConfig(kind=config.autoencoder.kind)
    return autoencoder.init(cfg, config.train.seed, dtype, device), cfg
