"""Prompts to images: the encoders and the sampler put together, for sample_main and for the trainer's grids."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flux_func import random, tree
from flux_func.flow import sampler
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import ONE_PROCESS, Sharding, gathering
from flux_func.train.encoders import LATENT_CHANNELS, PIXELS_PER_LATENT, Encoders


def generate(*args, sharding: Sharding = ONE_PROCESS, **kwargs) -> Tensor | None:
    """Returns images [N, 3, H, W] of N prompts, float32 in [-1, 1] on the CPU, to the first process; None to others.

    Every process calls it alike; arguments are as for `batches`.
    """
    prompts = kwargs["prompts"] if "prompts" in kwargs else args[3]
    mine = [image for images in batches(*args, sharding=sharding, **kwargs) for image in images]
    return to_first(mine, len(prompts), sharding.mesh)


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
    sharding: Sharding = ONE_PROCESS,
) -> Iterator[Tensor]:
    """Yields the images of this process's prompts, those of `share`, [b, 3, H, W], float32 in [-1, 1] on the CPU.

    The noise of prompt i is the counted draw (seed, "sample", i): the same in any batch, process and device. Every
    process makes the same passes through the model: one that has fewer prompts than another draws one again, which
    is not yielded.

    Args:
      params: the model's parameters, on the device that is to compute, or what this process has of them.
      cfg: the model.
      encoders: of the run that trained it.
      prompts: one for each image, of all processes.
      seed: of the noise.
      height, width: of the images in pixels, multiples of 16.
      steps: Euler steps.
      guidance: distilled guidance; read, and needed, where the model has a guidance embedding.
      cfg_scale: classifier-free guidance; 1: none.
      negative_prompt: what it guides away from.
      shift: whether the timesteps are shifted by resolution.
      batch_size: prompts that a process samples at once.
      ops: how linears, attention and stages are done.
      progress: called after each Euler step of each batch: `batch_count(...) * steps` times in all.
      sharding: the processes, where the parameters are, and what is computed in.
    """
    mesh, device = sharding.mesh, sharding.device or tree.leaves(params)[0].device
    ops = gathering(sharding, params, flux.chain(cfg), ops)
    ops = ops if progress is None else _ticking(ops, progress)
    uncond = {}
    if cfg_scale != 1:
        encoded = encoders.encode_text(encoders.tokenize([negative_prompt]))
        uncond = dict(zip(("uncond_txt", "uncond_y"), encoded, strict=True))
    shape = (LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    mine = share(len(prompts), mesh)
    for turn in range(batch_count(len(prompts), batch_size, mesh)):
        part = mine[turn * batch_size : (turn + 1) * batch_size]
        drawn = part or stand_in(len(prompts), mesh)
        noise = np.stack([random.normal(seed, "sample", i, shape) for i in drawn])
        with torch.no_grad():
            txt, y = encoders.encode_text(encoders.tokenize([prompts[i] for i in drawn]))
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
            images = encoders.decode(latents).float().clamp(-1, 1).cpu() if part else None
        if images is not None:
            yield images


def share(prompts: int, mesh: Mesh = ONE) -> range:
    """Returns which of a number of prompts this process draws: they are dealt out in turn."""
    return range(mesh.rank, prompts, mesh.size())


def stand_in(prompts: int, mesh: Mesh = ONE) -> range:
    """Returns the prompt that this process draws, to no effect, while others draw theirs: its first, or the first."""
    return share(prompts, mesh)[:1] or range(1)


def most(prompts: int, mesh: Mesh = ONE) -> int:
    """Returns the size of the largest process's share."""
    return -(-prompts // mesh.size())


def batch_count(prompts: int, batch_size: int, mesh: Mesh = ONE) -> int:
    """Returns how many batches of a number of prompts each process samples in `batches`."""
    return -(-most(prompts, mesh) // batch_size)


def to_first(images: Sequence[Tensor], prompts: int, mesh: Mesh = ONE) -> Tensor | None:
    """Returns all images [N, 3, H, W] in the order of the prompts to the first process, None to the others.

    Args:
      images: float32 [3, H, W] on the CPU, those of this process's `share`.
      prompts: of all processes, at least one.
      mesh: the processes, all of which call this.
    """
    if mesh.rank:
        if images:
            dist.send(torch.stack(list(images)), 0)
        return None
    every = torch.empty(prompts, *images[0].shape)
    every[:: mesh.size()] = torch.stack(list(images))
    for rank in range(1, min(mesh.size(), prompts)):
        part = torch.empty_like(every[rank :: mesh.size()])
        dist.recv(part, rank)
        every[rank :: mesh.size()] = part
    return every


def _ticking(ops: Ops, tick: Callable[[], object]) -> Ops:
    """Returns `ops` that call `tick` whenever the model's last stage is done."""

    def wrap_stage(fn: Callable, stage: Stage) -> Callable:
        wrapped = ops.wrap_stage(fn, stage)
        if stage.kind != "head":
            return wrapped

        def last(params, carry, const):
            out = wrapped(params, carry, const)
            tick()
            return out

        return last

    return dataclasses.replace(ops, wrap_stage=wrap_stage)
