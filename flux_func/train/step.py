"""One training step: a data batch to the model's batch, the fold over micro-batches, clipping, the update."""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import torch
from torch import Tensor

from flux_func.flow import timesteps
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.parallel import fold
from flux_func.train import optimizer as optimizers
from flux_func.train.encoders import Encoders
from flux_func.train.state import DTYPES
from flux_func.transforms import ema, precision


def make_ops(config: ml_collections.ConfigDict) -> Ops:
    """Returns the Ops of a run: stages computed in numerics.compute, whatever type their parameters are kept in."""
    return Ops(wrap_stage=precision.compute_in(DTYPES[config.numerics.compute]))


def micro_batches(batch: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yields a batch in `count` equal parts."""
    size = len(batch["position"]) // count
    for start in range(0, size * count, size):
        yield {key: batch[key][start : start + size] for key in batch if key != "skipped"}


def encode(batch: Mapping[str, Any], encoders: Encoders, device: torch.device) -> dict[str, Tensor]:
    """Returns latents, noise, txt and y of a data batch: what every loss of the model needs."""
    txt, y = encoders.encode_text({"t5": batch["t5_tokens"], "clip": batch["clip_tokens"]})
    posterior = torch.from_numpy(batch["latent_noise"]).to(device) if encoders.posterior_noise else None
    latents = encoders.encode_image(torch.from_numpy(batch["image"]).to(device), posterior)
    return {"latents": latents, "noise": torch.from_numpy(batch["noise"]).to(device), "txt": txt, "y": y}


def train_batch(
    batch: Mapping[str, Any],
    encoders: Encoders,
    config: ml_collections.ConfigDict,
    cfg: flux.FluxConfig,
    device: torch.device,
) -> dict[str, Tensor]:
    """Returns the batch of `ff.loss`: the encoded data with each sample's timestep and, if asked for, guidance."""
    size = config.train.batch_size
    draws, index = torch.from_numpy(batch["uniform"]), torch.from_numpy(batch["position"] % size)
    t = timesteps.sample(config.train.timesteps, draws, index, size)
    if config.train.shift:
        t = timesteps.shift(t, timesteps.shift_mu((config.data.image_size // 16) ** 2))
    out = {**encode(batch, encoders, device), "timesteps": t.to(device, torch.float32)}
    if cfg.guidance_embed:
        out["guidance"] = torch.full_like(out["timesteps"], config.train.guidance)
    return out


def train_step(
    state: dict,
    batch: Mapping[str, Any],
    step: int,
    *,
    cfg: flux.FluxConfig,
    config: ml_collections.ConfigDict,
    encoders: Encoders,
    optimizer: optimizers.Optimizer,
    device: torch.device,
) -> tuple[dict, dict[str, Tensor]]:
    """Returns the state after one step, and {"loss", "grad_norm"} as scalars on the device; `state` is donated.

    Args:
      state: as `state.create` makes it.
      batch: from data.pipeline, of train.batch_size samples.
      step: counted from 0.
      cfg, config, encoders, optimizer, device: what stays the same through a run.
    """
    grads, loss, ops = None, 0.0, make_ops(config)
    elements = batch["noise"].size
    for micro in micro_batches(batch, config.train.accumulate):
        inputs = train_batch(micro, encoders, config, cfg, device)
        grads, part = fold.grad_and_value(
            state["params"], cfg, inputs, ops, config.remat.policy, denominator=elements, into=grads
        )
        loss = loss + part
    grads, norm = optimizers.clip(grads, config.optimizer.clip_norm)
    state["params"], state["opt"] = optimizer.update(grads, state["opt"], state["params"])
    if "ema" in state:
        state["ema"] = ema.update(state["ema"], state["params"], ema.decay_at(step, config.ema.decay))
    return state, {"loss": loss, "grad_norm": norm}
