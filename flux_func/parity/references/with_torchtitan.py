"""pytorch/torchtitan's FLUX, 0.3.0."""

import dataclasses
from typing import Any

from bfl_modules import (  # noqa: F401 (what answer.py asks each reference for)
    IMAGE,
    TIME,
    blocks,
    double_in,
    double_out,
    single_in,
    single_out,
    velocity,
)
from torch import Tensor, nn
from torchtitan.models import flux as titan
from torchtitan.models.flux import utils
from torchtitan.models.flux.inference import sampling
from torchtitan.models.flux.model import layers
from torchtitan.models.flux.model.autoencoder import AutoEncoder

DISTRIBUTION = "torchtitan"


def transformer(cfg: dict) -> nn.Module:
    """Returns the model, its weights yet to come; its flavor for debugging, resized."""
    size, axes = cfg["hidden_size"], tuple(cfg["axes_dim"])
    double = titan._make_double_block_config(size, cfg["num_heads"], cfg["mlp_ratio"], cfg["qkv_bias"])
    single = titan._make_single_block_config(size, cfg["num_heads"], cfg["mlp_ratio"])
    like = titan.flux_configs["flux-debug"]()
    config = dataclasses.replace(
        like,
        img_in=_linear(like.img_in, cfg["in_channels"], size),
        txt_in=_linear(like.txt_in, cfg["context_in_dim"], size),
        pe_config=dataclasses.replace(like.pe_config, dim=sum(axes), theta=cfg["theta"], axes_dim=axes),
        time_in_config=_embedder(like.time_in_config, 256, size),
        vector_in_config=_embedder(like.vector_in_config, cfg["vec_in_dim"], size),
        double_blocks=[double] * cfg["depth"],
        single_blocks=[single] * cfg["depth_single_blocks"],
        final_layer_config=dataclasses.replace(
            like.final_layer_config,
            hidden_size=size,
            out_channels=cfg["out_channels"],
            linear=_linear(like.final_layer_config.linear, size, cfg["out_channels"]),
            adaln_linear=_linear(like.final_layer_config.adaln_linear, size, 2 * size),
        ),
        **{name: cfg[name] for name in {field.name for field in dataclasses.fields(like)} & cfg.keys() - {"axes_dim"}},
        axes_dim=axes,
    )
    return config.build()


def _linear(like: Any, fan_in: int, fan_out: int) -> Any:
    return dataclasses.replace(like, in_features=fan_in, out_features=fan_out)


def _embedder(like: Any, fan_in: int, size: int) -> Any:
    layers_of = {"in_layer": _linear(like.in_layer, fan_in, size), "out_layer": _linear(like.out_layer, size, size)}
    return dataclasses.replace(like, in_dim=fan_in, hidden_dim=size, **layers_of)


def pack(latents: Tensor) -> Tensor:
    """Returns patches of latents [B, c, h, w]."""
    return utils.pack_latents(latents)


def prepare(latents: Tensor, txt: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns patches and positions, txt and y as the model takes them."""
    batch, _, height, width = latents.shape
    ids = utils.create_position_encoding_for_latents(batch, height, width).to(latents)
    return {"img": pack(latents), "img_ids": ids, "txt": txt, "txt_ids": txt.new_zeros(*txt.shape[:2], 3), "y": y}


def embedding(model: nn.Module, values: Tensor) -> Tensor:
    """Returns the sinusoidal features of timesteps or guidance."""
    del model
    return layers.timestep_embedding(values, 256)


def rope(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns cosines and sines [L, D/2] of the rotary table that goes into a double block."""
    table = kwargs["pe"][0].squeeze(1)
    return {"cos": table[..., 0, 0], "sin": table[..., 1, 0]}


def schedule(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """Returns timesteps [steps + 1]; the shift goes by latent pixels, four times the image's tokens."""
    return sampling.get_schedule(steps, 4 * image_tokens, shift=shift)


def sample(model: nn.Module, inputs: dict[str, Tensor], settings: dict) -> Tensor:
    """Returns the latents at the end of the reference's own sampling loop, which shifts always."""
    noise = inputs["noise"]
    drawn, sampling.generate_noise_latent = sampling.generate_noise_latent, lambda *_: noise
    try:
        return sampling.denoise(
            device=noise.device,
            dtype=noise.dtype,
            model=model,
            img_width=8 * noise.shape[3],
            img_height=8 * noise.shape[2],
            denoising_steps=settings["steps"],
            clip_encodings=inputs["y"],
            t5_encodings=inputs["txt"],
            enable_classifier_free_guidance=settings["cfg_scale"] is not None,
            empty_t5_encodings=inputs.get("uncond_txt"),
            empty_clip_encodings=inputs.get("uncond_y"),
            classifier_free_guidance_scale=settings["cfg_scale"],
        )
    finally:
        sampling.generate_noise_latent = drawn


def autoencoder(cfg: dict) -> nn.Module:
    """Returns the autoencoder, its weights yet to come."""
    return AutoEncoder.Config(**{name: value for name, value in cfg.items() if name != "kind"}).build()


def encode(model: nn.Module, images: Tensor, draw: bool) -> Tensor:
    """Returns latents: a draw from the posterior, or its mean."""
    model.reg.sample = draw
    return model.encode(images)


def decode(model: nn.Module, latents: Tensor) -> Tensor:
    """Returns images."""
    return model.decode(latents)
