"""Prompts to images: the encoders and the sampler put together, for sample_main and for the trainer's grids."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flux_func import random, tree
from flux_func.flow import sampler
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.train.encoders import LATENT_CHANNELS, PIXELS_PER_LATENT, Encoders


def generate(*args, **kwargs) -> Tensor:
    """Returns images [N, 3, H, W] of N prompts, float32 in [-1, 1] on the CPU; arguments as for `batches`."""
    return torch.cat(list(batches(*args, **kwargs)))


def batches(
    params: Params,
    cfg: flux.FluxConfig,
    encoders: Encoders,
    prompts: Sequence[str],
    *,
    seed: int,
    height: int,
    width: int,
    steps: int,
    guidance: float | None = None,
    cfg_scale: float = 1.0,
    negative_prompt: str = "",
    shift: bool = True,
    batch_size: int = 8,
    ops: Ops = Ops(),
    progress: Callable[[], object] | None = None,
) -> Iterator[Tensor]:
    """Yields the images of `batch_size` prompts after another, [b, 3, H, W], float32 in [-1, 1] on the CPU.

    The noise of prompt i is the counted draw (seed, "sample", i): the same in any batch and on any device.

    Args:
      params: the model's parameters, on the device that is to compute.
      cfg: the model.
      encoders: of the run that trained it.
      prompts: one for each image.
      seed: of the noise.
      height, width: of the images in pixels, multiples of 16.
      steps: Euler steps.
      guidance: distilled guidance; read, and needed, where the model has a guidance embedding.
      cfg_scale: classifier-free guidance; 1: none.
      negative_prompt: what it guides away from.
      shift: whether the timesteps are shifted by resolution.
      batch_size: prompts sampled at once.
      ops: how linears, attention and stages are done.
      progress: called after each Euler step of each batch: `batch_count(...) * steps` times in all.
    """
    device = tree.leaves(params)[0].device
    ops = ops if progress is None else _ticking(ops, progress)
    uncond = {}
    if cfg_scale != 1:
        encoded = encoders.encode_text(encoders.tokenize([negative_prompt]))
        uncond = dict(zip(("uncond_txt", "uncond_y"), encoded, strict=True))
    shape = (LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        noise = np.stack([random.normal(seed, "sample", start + i, shape) for i in range(len(part))])
        with torch.no_grad():
            txt, y = encoders.encode_text(encoders.tokenize(list(part)))
            latents = sampler.sample(
                params,
                cfg,
                noise=torch.from_numpy(noise).to(device),
                txt=txt,
                y=y,
                steps=steps,
                guidance=guidance if cfg.guidance_embed else None,
                cfg_scale=cfg_scale,
                shift=shift,
                ops=ops,
                **uncond,
            )
            images = encoders.decode(latents).float().clamp(-1, 1).cpu()
        yield images


def batch_count(prompts: int, batch_size: int) -> int:
    """Returns how many batches `batches` yields for a number of prompts."""
    return -(-prompts // batch_size)


def _ticking(ops: Ops, tick: Callable[[], object]) -> Ops:
    """Returns `ops` that call `tick` whenever the model's last stage is done."""

    def wrap_stage(fn: Callable, stage: flux.Stage) -> Callable:
        wrapped = ops.wrap_stage(fn, stage)
        if stage.kind != "head":
            return wrapped

        def last(params, carry, const):
            out = wrapped(params, carry, const)
            tick()
            return out

        return last

    return dataclasses.replace(ops, wrap_stage=wrap_stage)
