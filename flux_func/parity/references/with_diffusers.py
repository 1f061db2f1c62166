"""Hugging Face's diffusers: FluxTransformer2DModel, FluxPipeline with its scheduler, AutoencoderKL."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

DISTRIBUTION = "diffusers"
# What the model's forward calls its patches and their time.
IMAGE, TIME = "hidden_states", "timestep"


def transformer(cfg: dict) -> nn.Module:
    """Returns the model, its weights yet to come; the configuration is that of its own config.json."""
    return FluxTransformer2DModel(**_public(cfg))


def pack(latents: Tensor) -> Tensor:
    """Returns patches of latents [B, c, h, w]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def prepare(latents: Tensor, txt: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns patches and positions, txt and y as the model takes them."""
    height, width = latents.shape[2:]
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, latents.device, latents.dtype)
    return {"img": pack(latents), "img_ids": ids, "txt": txt, "txt_ids": txt.new_zeros(txt.shape[1], 3), "y": y}


def velocity(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Returns the model's output."""
    return model(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["y"],
        timestep=given["timesteps"],
        guidance=given.get("guidance"),
        img_ids=given["img_ids"],
        txt_ids=given["txt_ids"],
        return_dict=False,
    )[0]


def embedding(model: nn.Module, values: Tensor) -> Tensor:
    """Returns the sinusoidal features of timesteps or guidance."""
    return model.time_text_embed.time_proj(values * 1000)


def blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Returns the double and the single blocks."""
    return model.transformer_blocks, model.single_transformer_blocks


def double_in(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns what goes into a double block, by our names."""
    return {"img": kwargs["hidden_states"], "txt": kwargs["encoder_hidden_states"], "vec": kwargs["temb"]}


def double_out(out: tuple) -> dict[str, Tensor]:
    """Returns what comes out of a double block."""
    return dict(zip(("txt", "img"), out, strict=True))


def single_in(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns what goes into a single block, which joins text and image by itself."""
    return single_out((kwargs["encoder_hidden_states"], kwargs["hidden_states"]))


def single_out(out: tuple) -> dict[str, Tensor]:
    """Returns what comes out of a single block."""
    return {"stream": torch.cat(out, dim=1)}


def rope(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns cosines and sines [L, D/2] of the rotary table that goes into a double block."""
    cos, sin = kwargs["image_rotary_emb"]
    return {"cos": cos[:, ::2], "sin": sin[:, ::2]}


def _scheduler(shift: bool) -> FlowMatchEulerDiscreteScheduler:
    # As scheduler_config.json of dev (shifted) and of schnell.
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift, shift=3.0 if shift else 1.0)


def schedule(steps: int, image_tokens: int, shift: bool) -> Tensor:
    """Returns timesteps [steps + 1]."""
    scheduler = _scheduler(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(image_tokens))
    return scheduler.sigmas


def sample(model: nn.Module, inputs: dict[str, Tensor], settings: dict) -> Tensor:
    """Returns the latents at the end of the pipeline's own sampling loop."""
    height, width = (8 * side for side in inputs["noise"].shape[2:])
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = FluxPipeline(_scheduler(settings["shift"]), transformer=model, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    guidance = {} if settings["guidance"] is None else {"guidance_scale": settings["guidance"]}
    if settings["cfg_scale"] is not None:
        guidance |= {"true_cfg_scale": settings["cfg_scale"], "negative_prompt_embeds": inputs["uncond_txt"]}
        guidance |= {"negative_pooled_prompt_embeds": inputs["uncond_y"]}
    (end,) = pipeline(
        prompt_embeds=inputs["txt"],
        pooled_prompt_embeds=inputs["y"],
        latents=pack(inputs["noise"]),
        height=height,
        width=width,
        num_inference_steps=settings["steps"],
        output_type="latent",
        return_dict=False,
        **guidance,
    )
    return FluxPipeline._unpack_latents(end, height, width, 8)


def autoencoder(cfg: dict) -> nn.Module:
    """Returns the autoencoder, its weights yet to come; the configuration is that of its own config.json."""
    return AutoencoderKL(**_public(cfg))


def _public(cfg: dict) -> dict:
    return {name: value for name, value in cfg.items() if not name.startswith("_")}


def encode(model: nn.Module, images: Tensor, draw: bool) -> Tensor:
    """Returns latents, scaled as FLUX's pipelines scale them: a draw from the posterior, or its mean."""
    posterior = model.encode(images).latent_dist
    return (
        (posterior.sample() if draw else posterior.mode()) - model.config.shift_factor
    ) * model.config.scaling_factor


def decode(model: nn.Module, latents: Tensor) -> Tensor:
    """Returns images."""
    latents = latents / model.config.scaling_factor + model.config.shift_factor
    return model.decode(latents, return_dict=False)[0]
