"""Sampling: Euler's method from noise (t = 1) to latents (t = 0), with distilled or classifier-free guidance."""

import numbers
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flux_func.flow import path, timesteps
from flux_func.models import flux
from flux_func.models.layers import Ops, Params, at_least_float32

# (x [B, ...], t, a scalar) to dx/dt, shaped as x.
Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(velocity: Velocity, x: Tensor, schedule: Tensor) -> Tensor:
    """Returns the solution of dx/dt = velocity(x, t) at the schedule's end, one Euler step between neighbours.

    Args:
      velocity: `(x, t) -> dx/dt`, t a scalar tensor and dx/dt shaped as x.
      x: the state at schedule[0].
      schedule: times [steps + 1].
    """
    for t, after in pairwise(schedule):
        x = x + (after - t) * velocity(x, t)
    return x


def sample(
    params: Params,
    cfg: flux.FluxConfig,
    *,
    noise: Tensor,
    txt: Tensor,
    y: Tensor,
    steps: int,
    guidance: Tensor | float | None = None,
    cfg_scale: Tensor | float | None = None,
    uncond_txt: Tensor | None = None,
    uncond_y: Tensor | None = None,
    shift: bool = True,
    image_seq_len: int | None = None,
    ops: Ops = Ops(),
) -> Tensor:
    """Returns latents [B, 16, h, w] drawn from the model, in the noise's type. Pure and differentiable.

    Args:
      params: the model's parameters.
      cfg: the model.
      noise: standard normal [B, 16, h, w], h and w even. Steps are added up in float32 at least.
      txt: T5's last hidden state [B or 1, L, context_in_dim].
      y: CLIP's pooled output [B or 1, vec_in_dim].
      steps: Euler steps.
      guidance: distilled guidance, one number or [B], where the model has a guidance embedding.
      cfg_scale: classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): the velocity is
        v_u + cfg_scale (v_c - v_u), both from one forward pass of twice the batch; one number or [B]. None, or the
        number 1: v_c alone.
      uncond_txt, uncond_y: the encodings of no prompt, [B or 1, L, context_in_dim] and [B or 1, vec_in_dim].
      shift: whether the timesteps are shifted by resolution; schnell is sampled without.
      image_seq_len: length that the shift goes by; None: the image's tokens, h * w / 4. (torchtitan's sampler passes
        the latent pixels, four times as many.)
      ops: how linears and attention are done.

    Raises:
      ValueError: parameters of another model, shapes that do not fit, guidance missing or for a model without it, or
        cfg_scale without both of uncond_txt and uncond_y, or they without it.
    """
    check_latents(noise, "noise")
    flow = velocity(
        params,
        cfg,
        txt=txt,
        y=y,
        guidance=guidance,
        cfg_scale=cfg_scale,
        uncond_txt=uncond_txt,
        uncond_y=uncond_y,
        ops=ops,
    )
    length = noise.shape[2] * noise.shape[3] // 4 if image_seq_len is None else image_seq_len
    schedule = timesteps.schedule(steps, length if shift else None)
    return euler(flow, noise.to(at_least_float32(noise.dtype)), schedule).to(noise.dtype)


def velocity(
    params: Params,
    cfg: flux.FluxConfig,
    *,
    txt: Tensor,
    y: Tensor,
    guidance: Tensor | float | None = None,
    cfg_scale: Tensor | float | None = None,
    uncond_txt: Tensor | None = None,
    uncond_y: Tensor | None = None,
    ops: Ops = Ops(),
) -> Velocity:
    """Returns the model as dx/dt of latents: `(x [B, 16, h, w], t) -> v [B, 16, h, w]`, in float32 or wider.

    What `sample` follows, and what `likelihood` integrates.

    Args:
      params, cfg, txt, y, guidance, cfg_scale, uncond_txt, uncond_y, ops: as for `sample`.

    Raises:
      ValueError: as `sample`; of what its arguments have to do with x when the velocity is called.
    """
    path.check_ends(cfg)
    scale = None if not isinstance(cfg_scale, Tensor) and cfg_scale == 1 else cfg_scale
    if cfg_scale is None and not (uncond_txt is None and uncond_y is None):
        raise ValueError("cfg_scale is None: uncond_txt and uncond_y are read only where it is given")
    if scale is not None and (uncond_txt is None or uncond_y is None):
        raise ValueError(f"cfg_scale is {scale}: uncond_txt and uncond_y, the encodings of no prompt, are needed")
    if scale is not None and uncond_txt.shape[1] != txt.shape[1]:
        raise ValueError(f"uncond_txt has {uncond_txt.shape[1]} tokens, it should have txt's {txt.shape[1]}")

    def dx_dt(x: Tensor, t: Tensor) -> Tensor:
        check_latents(x, "x")
        batch, _, height, width = x.shape
        inputs = {"img": flux.patchify(x), **_conditioning(cfg, batch, txt, y, guidance)}
        if scale is not None:
            uncond = {**inputs, **_conditioning(cfg, batch, uncond_txt, uncond_y, guidance)}
            inputs = {name: torch.cat([uncond[name], value]) for name, value in inputs.items()}
        wide = at_least_float32(x.dtype)
        v = flux.apply(
            params,
            cfg,
            **inputs,
            timesteps=t.to(x.device, wide).expand(len(inputs["img"])),
            img_ids=flux.image_ids(height, width, device=x.device),
            txt_ids=flux.text_ids(txt.shape[1], device=x.device),
            ops=ops,
        )
        v = flux.unpatchify(v.to(wide), height, width)
        if scale is None:
            return v
        v_uncond, v_cond = v.chunk(2)
        return v_uncond + path.column(scale, v_cond, "cfg_scale") * (v_cond - v_uncond)

    return dx_dt


def check_latents(x: Tensor, name: str) -> None:
    """Raises ValueError where x is not of shape [B, c, h, w] with even h and w, or not of floating numbers."""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, it should be of a floating type")
    if x.ndim != 4 or any(side % 2 for side in x.shape[2:]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, it should be [B, c, h, w] with even h and w")


def _conditioning(
    cfg: flux.FluxConfig, batch: int, txt: Tensor, y: Tensor, guidance: Tensor | float | None
) -> dict[str, Tensor]:
    """Returns txt, y and, for a model with a guidance embedding, guidance, each for `batch` samples."""
    if cfg.guidance_embed != (guidance is not None):
        has = "has a guidance embedding: it should be a number or [B]" if cfg.guidance_embed else "takes no guidance"
        raise ValueError(f"guidance is {guidance}, but this model {has}")
    length = txt.shape[1] if txt.ndim == 3 else "L"
    out = {"txt": (txt, (length, cfg.context_in_dim)), "y": (y, (cfg.vec_in_dim,))}
    if guidance is not None:
        if not isinstance(guidance, (Tensor, numbers.Real)):
            raise ValueError(f"guidance is {guidance!r}, it should be a number or a tensor ({batch},)")
        if not isinstance(guidance, Tensor):
            guidance = torch.full((batch,), guidance, dtype=at_least_float32(y.dtype), device=y.device)
        out["guidance"] = (guidance.reshape(1) if guidance.ndim == 0 else guidance, ())
    for name, (value, shape) in out.items():
        if tuple(value.shape) not in ((batch, *shape), (1, *shape)):
            should = str((batch, *shape)).replace("'", "")
            raise ValueError(f"{name} has shape {tuple(value.shape)}, it should be {should}")
    return {name: value.expand(batch, *shape) for name, (value, shape) in out.items()}
