"""One training step: a data batch to the model's batch, the fold over micro-batches, clipping, the update."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections
import torch
from torch import Tensor

from flux_func import tree
from flux_func.flow import timesteps
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.parallel import collectives, fold, placements
from flux_func.parallel.sharding import Sharding
from flux_func.parallel.timeline import phase
from flux_func.train import adapt, layout
from flux_func.train import optimizer as optimizers
from flux_func.train.encoders import Encoders
from flux_func.train.transfer import to_device
from flux_func.transforms import ema


def micro_batches(batch: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yields a batch in `count` equal parts."""
    size = len(batch["position"]) // count
    for start in range(0, size * count, size):
        yield {key: batch[key][start : start + size] for key in batch if key != "skipped"}


def encode(batch: Mapping[str, Any], encoders: Encoders, device: torch.device) -> dict[str, Tensor]:
    """Returns latents, noise, txt and y of a data batch: what every loss of the model needs."""
    txt, y = encoders.encode_text({"t5": batch["t5_tokens"], "clip": batch["clip_tokens"]})
    posterior = torch.from_numpy(batch["latent_noise"]) if encoders.posterior_noise else None
    latents = encoders.encode_image(torch.from_numpy(batch["image"]), posterior)
    return {"latents": latents, "noise": to_device(torch.from_numpy(batch["noise"]), device), "txt": txt, "y": y}


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
    out = {**encode(batch, encoders, device), "timesteps": to_device(t.to(torch.float32), device)}
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
    sharding: Sharding,
    ops: Ops = Ops(),
    base: adapt.Base | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Returns the state after one step, and {"loss", "grad_norm"} as scalars on the device; `state` is donated.

    Args:
      state: as `state.create` makes it.
      batch: from data.pipeline: this process's share of train.batch_size samples.
      step: counted from 0.
      cfg, config, encoders, optimizer, device, sharding, ops: what stays the same through a run.
      base: the weights under the LoRA that is trained; None: the weights are.
    """

    def inputs() -> Iterator[dict[str, Tensor]]:
        for micro in micro_batches(batch, config.train.accumulate):
            with phase("encode"):
                encoded = train_batch(micro, encoders, config, cfg, device)
            yield encoded

    given = {"cfg": cfg, "config": config, "optimizer": optimizer, "sharding": sharding, "ops": ops, "base": base}
    return state, advance(placements.shards(state), inputs(), step, **given)


def advance(
    here: dict,
    inputs: Iterable[dict[str, Tensor]],
    step: int,
    *,
    cfg: flux.FluxConfig,
    config: ml_collections.ConfigDict,
    optimizer: optimizers.Optimizer,
    sharding: Sharding,
    ops: Ops = Ops(),
    base: adapt.Base | None = None,
) -> dict[str, Tensor]:
    """Takes a step on train.accumulate micro-batches of `ff.loss`; returns {"loss", "grad_norm"}; see `train_step`.

    Args:
      here: what this process has of the state, which is updated.
      inputs: its samples.
      step, cfg, config, optimizer, sharding, ops, base: as for `train_step`.
    """
    if config.compile.enabled:
        torch.compiler.cudagraph_mark_step_begin()  # what CUDA graphs hold of the step before can go
    grads, loss = None, 0.0
    for count, micro in enumerate(inputs, 1):
        turn, vjp = (ops, fold.autograd_vjp) if base is None else base.training(ops)
        with phase("compute"):
            grads, part = fold.grad_and_value(
                here["params"],
                cfg,
                micro,
                turn,
                layout.remat(config),
                denominator=config.train.batch_size * micro["noise"][0].numel() * sharding.repeats,
                into=grads,
                vjp=vjp,
                sharding=sharding,
                last=count == config.train.accumulate,
            )
        loss = loss + part
    with phase("optimizer"):
        return apply(here, grads, loss, step, config=config, optimizer=optimizer, sharding=sharding)


def apply(
    here: dict,
    grads: Params,
    loss: Tensor,
    step: int,
    *,
    config: ml_collections.ConfigDict,
    optimizer: optimizers.Optimizer,
    sharding: Sharding,
) -> dict[str, Tensor]:
    """Updates this process's part of a state by its part of the gradients; returns {"loss", "grad_norm"} over all."""
    loss, norm = totals(loss, grads, sharding)
    mine = sharding.owned(here["params"])
    scale = optimizers.clip_scale(norm, config.optimizer.clip_norm)
    optimizer.update(grads, here["opt"], mine, scale, placements.spans(sharding.grads, sharding.mesh))
    sharding.publish(mine, here["params"])
    if "ema" in here:
        ema.update(here["ema"], here["params"], ema.decay_at(step, config.ema.decay))
    return {"loss": loss, "grad_norm": norm}


def totals(loss: Tensor, grads: Params, sharding: Sharding) -> tuple[Tensor, Tensor]:
    """Returns the loss and the gradients' global norm over all processes, the same bits in each.

    Args:
      loss: this process's part.
      grads: this process's part of the gradients, summed already.
      sharding: which parts of them others have too.
    """
    mesh = sharding.mesh
    if mesh.size() == 1:
        return loss, optimizers.global_norm(grads)
    by_axes: dict[tuple[str, ...], list[Tensor]] = {}
    for grad, place in zip(tree.leaves(grads), tree.leaves(sharding.grads), strict=True):
        by_axes.setdefault(place.axes, []).append(grad)
    # What several processes have counts once.
    shares = {axes: mesh.size(axes) / mesh.size() for axes in by_axes}
    square = sum(optimizers.global_norm(same).double() ** 2 * shares[axes] for axes, same in by_axes.items())
    both = torch.stack([loss.double().to(square.device), square])
    with phase("reduce"):
        both = collectives.wait(collectives.start_all_reduce(both, mesh.group()))
    return both[0].to(loss.dtype), both[1].sqrt().to(loss.dtype)
