"""The rectified-flow path between data and noise, and the training loss.

x_t = (1 - t) x_0 + t eps, so t = 1 is noise; the model predicts the velocity eps - x_0 (Liu et al. 2022,
arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206).
"""

import numbers
from collections.abc import Mapping

from torch import Tensor

from flux_func.models import flux
from flux_func.models.layers import Ops, Params, at_least_float32
from flux_func.models.stages import Stage, fold


def interpolate(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns x_t = (1 - t) x_0 + t eps; latents and noise [B, ...], timesteps [B] (ValueError: of another length)."""
    t = column(timesteps, latents, "timesteps")
    return (1 - t) * latents + t * noise


def column(value: Tensor | float, like: Tensor, name: str = "value") -> Tensor | float:
    """Returns one number a sample [B] as [B, 1, ...], to multiply `like` [B, ...] by; a single number as it is.

    Raises:
      ValueError: it is neither; the message has `name`.
    """
    found = tuple(value.shape) if isinstance(value, Tensor) else value
    if isinstance(found, numbers.Real) or found == ():
        return value
    if found != (len(like),):
        shown = f"has shape {found}" if isinstance(value, Tensor) else f"is {value!r}"
        raise ValueError(f"{name} {shown}, it should be a number or a tensor ({len(like)},), one for each sample")
    return value.reshape(-1, *[1] * (like.ndim - 1))


def target(latents: Tensor, noise: Tensor) -> Tensor:
    """Returns the velocity dx_t/dt = eps - x_0, [B, ...]."""
    return noise - latents


def squared_error(params: Params, carry: dict, const: dict, ops: Ops) -> dict:
    """The stage after the head: sum((v - target)^2) / denominator, in float32 or the input's type if wider."""
    del params, ops
    wide = at_least_float32(carry["img"].dtype)
    return {"loss": (carry["img"].to(wide) - const["target"].to(wide)).square().sum() / const["denominator"]}


def chain(cfg: flux.FluxConfig) -> tuple[Stage, ...]:
    """Returns the model's stages and, after them, the loss."""
    return (*flux.chain(cfg), Stage("loss", "loss", (), None, squared_error))


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a batch lacks what `loss` reads."""
    if missing := [name for name in ("latents", "noise", "timesteps", "txt", "y") if name not in batch]:
        raise ValueError(f"batch lacks {', '.join(missing)}: it has {', '.join(batch) or 'nothing'}")


def check_ends(cfg: flux.FluxConfig) -> None:
    """Raises ValueError where a model reads other channels than it writes, as FLUX Fill does: a flow has one space."""
    if cfg.in_channels != cfg.out_channels:
        found = f"in_channels {cfg.in_channels} and out_channels {cfg.out_channels}"
        raise ValueError(f"{found} should be equal for a flow")


def inputs(cfg: flux.FluxConfig, batch: Mapping[str, Tensor], denominator: float | None = None) -> tuple[dict, dict]:
    """Returns the first carry and the const of `chain` for a batch; see `loss`."""
    check_batch(batch)
    check_ends(cfg)
    latents, noise, txt = batch["latents"], batch["noise"], batch["txt"]
    if latents.ndim != 4 or latents.shape != noise.shape or any(side % 2 for side in latents.shape[2:]):
        raise ValueError(
            f"latents and noise should be one shape [B, c, h, w] with even h and w, "
            f"they are {tuple(latents.shape)} and {tuple(noise.shape)}"
        )
    carry, const = flux.inputs(
        cfg,
        img=flux.patchify(interpolate(latents, noise, batch["timesteps"])),
        img_ids=flux.image_ids(*latents.shape[2:], device=latents.device),
        txt=txt,
        txt_ids=flux.text_ids(txt.shape[1], device=txt.device),
        timesteps=batch["timesteps"],
        y=batch["y"],
        guidance=batch.get("guidance"),
    )
    velocity = flux.patchify(target(latents, noise))
    return carry, {**const, "target": velocity, "denominator": latents.numel() if denominator is None else denominator}


def loss(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Mapping[str, Tensor],
    ops: Ops = Ops(),
    denominator: float | None = None,
) -> Tensor:
    """Returns the flow-matching loss, a scalar of float32 or wider: the mean squared error of the velocity.

    Args:
      params: the model's parameters.
      cfg: the model.
      batch: latents [B, 16, h, w], noise [B, 16, h, w], timesteps [B], txt [B, L, 4096], y [B, 768] and, for a model
        with a guidance embedding, guidance [B].
      ops: how linears and attention are done.
      denominator: what the sum of squares is divided by; None: the number of latent elements. Micro-batches and
        ranks give the whole batch's, so that their losses add up to its loss.

    Raises:
      ValueError: parameters of another model, a batch that lacks something, or shapes that do not fit the model or
        each other.
    """
    flux.check_params(params, cfg, ops)
    carry, const = inputs(cfg, batch, denominator)
    return fold(chain(cfg), params, carry, const, ops)["loss"]
