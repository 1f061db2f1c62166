"""Our side of a measurement: the training step of `train_main` from the model's batch on, its loss, and `ff.sample`.

python -m flux_func.bench.ours REQUEST.json
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import ml_collections
import torch
from torch import Tensor

from flux_func import config as configs
from flux_func import tree
from flux_func.bench import serve
from flux_func.bench.serve import Work
from flux_func.flow import path as flow
from flux_func.flow import sampler
from flux_func.launch import memory
from flux_func.models import flux
from flux_func.parallel.mesh import ONE
from flux_func.parallel.sharding import gathering
from flux_func.train import layout, optimizer
from flux_func.train import step as steps


def work(request: dict, weights: serve.Tensors, inputs: serve.Tensors) -> Work:
    """Returns ours at work."""
    config, params, device = settings(request), tree.unflatten(weights), torch.device(request["device"])
    cfg = flux.FluxConfig(**{**request["model"], "axes_dim": tuple(request["model"]["axes_dim"])})
    if request["work"] not in ("forward", "sample"):
        here = {"params": params, "opt": optimizer.from_config(config).init(params)}
        return Work(training(config, cfg, here, inputs, device), lambda: tree.leaves(here))
    sharding = layout.of_weights(config, cfg, ONE, device)
    ops = dataclasses.replace(layout.ops(config, cfg, sharding), linear=layout.evaluation(device).linear)
    ops = gathering(sharding, params, flux.chain(cfg), ops)

    @torch.no_grad()
    def forward() -> Tensor:
        return flow.loss(params, cfg, inputs, ops)

    @torch.no_grad()
    def sample() -> Tensor:
        given = {name: inputs[name] for name in ("noise", "txt", "y")}
        given |= {name: request["sampler"][name] for name in ("steps", "guidance", "shift")}
        return sampler.sample(params, cfg, **given, ops=ops).square().mean()

    return Work(forward if request["work"] == "forward" else sample, lambda: tree.leaves(params))


def settings(request: dict) -> ml_collections.ConfigDict:
    """Returns the config of a run that takes such steps."""
    config = configs.default()
    config.train.batch_size = request["batch"]
    config.optimizer.update(request["optimizer"])
    config.remat.policy = request["remat"]
    config.compile.enabled = request["compile"]
    config.numerics.compute = request["dtype"]
    configs.validate(config)
    return config


def training(
    config: ml_collections.ConfigDict, cfg: flux.FluxConfig, here: dict, batch: dict[str, Tensor], device: torch.device
) -> Callable[[], Tensor]:
    """Returns a training step of `train_main` without encoders: the fold over micro-batches, clipping, the update.

    Args:
      config: of the run.
      cfg: the model.
      here: {"params", "opt"}, which every step updates.
      batch: of `ff.loss`, train.batch_size samples; the same in every step.
      device: where they are.
    """
    chosen, count = optimizer.from_config(config), config.train.accumulate
    sharding = layout.build(config, cfg, chosen, ONE, device)
    chunks = {name: value.chunk(count) for name, value in batch.items()}
    micro = [{name: parts[i] for name, parts in chunks.items()} for i in range(count)]
    given = {"cfg": cfg, "config": config, "optimizer": chosen, "sharding": sharding}
    given["ops"] = layout.ops(config, cfg, sharding)
    return lambda: steps.advance(here, micro, 0, **given)["loss"]


if __name__ == "__main__":
    memory.keep_freed(json.loads(Path(sys.argv[1]).read_text())["device"])  # as train_main does
    serve.serve(work, "flux-func", Path(sys.argv[1]), serve.claim_stdout())
