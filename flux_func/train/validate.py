"""Validation loss: the mean squared error of the velocity at eight fixed timesteps."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np
import torch
from torch import Tensor

from flux_func.flow import path
from flux_func.launch import processes
from flux_func.models import flux
from flux_func.models.layers import Ops, Params, at_least_float32
from flux_func.models.stages import fold
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import ONE_PROCESS, Sharding, gathering
from flux_func.train import step as steps
from flux_func.train.encoders import LATENT_CHANNELS, PIXELS_PER_LATENT, Encoders

TIMESTEPS = 8


def timestep(index: Tensor, convention: str) -> Tensor:
    """Returns t of the timesteps 0..7: i/8 ("start", as MLPerf counts) or (i + 1/2)/8 ("middle", as torchtitan)."""
    return (index + (0.5 if convention == "middle" else 0.0)) / TIMESTEPS


def per_sample_loss(params: Params, cfg: flux.FluxConfig, batch: Mapping[str, Tensor], ops: flux.Ops) -> Tensor:
    """Returns each sample's mean squared error, float32 or wider [B]; `batch` as for `ff.loss`."""
    carry, const = path.inputs(cfg, batch)
    velocity = fold(flux.chain(cfg), params, carry, const, ops)["img"]
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


def samples_per_pass(samples: int, batch_size: int, mesh: Mesh = ONE) -> int:
    """Returns how many samples each process has in a forward pass: validate.batch_size, or fewer where all get some.

    A validation's batches are then `pipeline.batches(batch_size=this * mesh.size(), rank=mesh.rank, world=mesh.size(),
    limit=samples)`.
    """
    return min(batch_size, -(-samples // mesh.size()))


@torch.no_grad()
def run(
    params: Params,
    cfg: flux.FluxConfig,
    batches: Iterable[Mapping[str, Any]],
    *,
    config: ml_collections.ConfigDict,
    encoders: Encoders,
    device: torch.device,
    sharding: Sharding = ONE_PROCESS,
    ops: Ops = Ops(),
) -> dict[str, Any]:
    """Returns `average` over the batches of a validation split, of all processes; the same in each of them.

    Each sample is taken at timestep (position mod 8), or at all eight with its one noise, by validate.all_timesteps.
    Its loss does not depend on how the samples are divided, but for rounding: whole samples go to processes, whatever
    the mesh's axes, and a process that has fewer than another computes along with it, to no effect.

    Args:
      params: the parameters, or what this process has of them.
      cfg: the model.
      batches: this process's part; see `samples_per_pass`.
      config: of the run.
      encoders: of the run.
      device: to compute on.
      sharding: the processes, where the parameters are, and what is computed in.
      ops: how linears and attention are done.
    """
    ops, found = gathering(sharding, params, flux.chain(cfg), ops), []
    for batch in _along(batches, sharding.mesh):
        counts = batch is not None
        batch = batch if counts else _nothing(config, encoders)
        inputs = steps.encode(batch, encoders, device)
        turns = range(TIMESTEPS) if config.validate.all_timesteps else [0]
        for turn in turns:
            index = (torch.from_numpy(batch["position"]) + turn) % TIMESTEPS
            inputs["timesteps"] = timestep(index, config.validate.convention).to(device, torch.float32)
            if cfg.guidance_embed:
                inputs["guidance"] = torch.full_like(inputs["timesteps"], config.train.guidance)
            losses = per_sample_loss(params, cfg, inputs, ops)
            if counts:
                found.append((batch["position"], index.numpy(), losses.double().cpu().numpy()))
    return average(*_in_order(found, sharding.mesh))


def _along(batches: Iterable[Mapping[str, Any]], mesh: Mesh) -> Iterator[Mapping[str, Any] | None]:
    """Yields this process's batches, and then None as often as another process has one more."""
    if mesh.size() == 1:
        yield from batches
        return
    remaining = iter(batches)
    while True:
        with processes.together():
            batch = next(remaining, None)
        if not any(processes.gather(batch is not None)):
            return
        yield batch


def _nothing(config: ml_collections.ConfigDict, encoders: Encoders) -> dict[str, Any]:
    """Returns a batch of one sample that is none."""
    size, tokens = config.data.image_size, encoders.tokenize([""])
    side = size // PIXELS_PER_LATENT
    noise = np.zeros((1, LATENT_CHANNELS, side, side), dtype=np.float32)
    return {
        "image": np.zeros((1, 3, size, size), dtype=np.float32),
        "noise": noise,
        "latent_noise": noise,
        "t5_tokens": tokens["t5"],
        "clip_tokens": tokens["clip"],
        "position": np.zeros(1, dtype=np.int64),
    }


def _in_order(found: list[tuple[np.ndarray, ...]], mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Returns (losses, timesteps) of all processes' samples by position, so that they add up to the same anywhere."""
    everyone = found if mesh.size() == 1 else [part for parts in processes.gather(found) for part in parts]
    position, index, losses = (np.concatenate(column) for column in zip(*everyone, strict=True))
    order = np.lexsort((index, position))
    return torch.from_numpy(losses[order]), torch.from_numpy(index[order])
