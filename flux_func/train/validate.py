"""Validation loss: the mean squared error of the velocity at eight fixed timesteps."""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
import torch
from torch import Tensor

from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Params, at_least_float32
from flux_func.train import step as steps
from flux_func.train.encoders import Encoders

TIMESTEPS = 8


def timestep(index: Tensor, convention: str) -> Tensor:
    """Returns t of the timesteps 0..7: i/8 ("start", as MLPerf counts) or (i + 1/2)/8 ("middle", as torchtitan)."""
    return (index + (0.5 if convention == "middle" else 0.0)) / TIMESTEPS


def per_sample_loss(params: Params, cfg: flux.FluxConfig, batch: Mapping[str, Tensor], ops: flux.Ops) -> Tensor:
    """Returns each sample's mean squared error, float32 or wider [B]; `batch` as for `ff.loss`."""
    carry, const = path.inputs(cfg, batch)
    velocity = flux.fold(flux.chain(cfg), params, carry, const, ops)["img"]
    wide = at_least_float32(velocity.dtype)
    return (velocity.to(wide) - const["target"].to(wide)).square().mean(dim=(1, 2))


def average(losses: Tensor, index: Tensor) -> dict[str, Any]:
    """Returns the mean at each timestep (None where no sample had it), and the mean of those means.

    Args:
      losses: [N], one for each sample and timestep.
      index: int64 [N], which of the 8 timesteps it was.
    """
    total = torch.zeros(TIMESTEPS, dtype=torch.float64).index_add_(0, index.cpu(), losses.double().cpu())
    count = torch.bincount(index.cpu(), minlength=TIMESTEPS)
    means = [float(s / n) if n else None for s, n in zip(total, count, strict=True)]
    seen = [mean for mean in means if mean is not None]
    return {"validation_loss": sum(seen) / len(seen), "validation_loss_by_timestep": means}


@torch.no_grad()
def run(
    params: Params,
    cfg: flux.FluxConfig,
    batches: Iterable[Mapping[str, Any]],
    *,
    config: ml_collections.ConfigDict,
    encoders: Encoders,
    device: torch.device,
) -> dict[str, Any]:
    """Returns `average` over the batches of a validation split.

    Each sample is taken at timestep (position mod 8), or at all eight with its one noise, by validate.all_timesteps.
    """
    ops, losses, indices = steps.make_ops(config), [], []
    for batch in batches:
        inputs = steps.encode(batch, encoders, device)
        turns = range(TIMESTEPS) if config.validate.all_timesteps else [0]
        for turn in turns:
            index = (torch.from_numpy(batch["position"]) + turn) % TIMESTEPS
            inputs["timesteps"] = timestep(index, config.validate.convention).to(device, torch.float32)
            if cfg.guidance_embed:
                inputs["guidance"] = torch.full_like(inputs["timesteps"], config.train.guidance)
            losses.append(per_sample_loss(params, cfg, inputs, ops))
            indices.append(index)
    return average(torch.cat(losses), torch.cat(indices))
