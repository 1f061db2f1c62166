"""Some training steps on each process of a mesh, by the trainer's own parts, to be held against one process alone."""

from typing import Any

import numpy as np
import torch

from flux_func import tree
from flux_func.data import pipeline, sources
from flux_func.models.layers import Ops
from flux_func.parallel import collectives, mesh, placements
from flux_func.train import encoders, layout, optimizer, state, step
from tests.helpers import tiny_run

# 16 image tokens and 8 of text: both divide by 4 processes.
FIELDS = {"train.batch_size": 16, "data.image_size": 64, "text.max_length": 8}


def config(sizes: dict[str, int], fields: dict[str, Any]) -> Any:
    """Returns the config of a tiny run on a mesh."""
    return tiny_run.config({**FIELDS, **{f"parallel.{axis}": size for axis, size in sizes.items()}, **fields})


def train(
    rank: int, sizes: dict[str, int], fields: dict[str, Any], steps: int = 10, fault: str = ""
) -> tuple[list[tuple[float, float]], dict[str, tuple[np.ndarray, tuple[slice, ...]]]]:
    """Returns [(loss, gradient norm) of each step], and {path: what this process has of the first gradient, where}.

    Args:
      rank: of the process.
      sizes: of the mesh.
      fields: of the config, where they are not those of `config`.
      steps: how many.
      fault: what is done wrong: "no attention", "no reduction" or "same noise".
    """
    del rank
    made, device = config(sizes, {"train.steps": steps, **fields}), torch.device("cpu")
    cfg, chosen = state.model_config(made), optimizer.from_config(made)
    sharding = layout.build(made, cfg, chosen, mesh.build(made.parallel), device)
    current, first = state.create(made, cfg, chosen, device, sharding=sharding), {}

    def update(grads: Any, *given: Any) -> Any:
        first.update({} if first else {path: grad.clone() for path, grad in tree.flatten(grads).items()})
        return chosen.update(grads, *given)

    ops = layout.ops(made, cfg, sharding)
    if fault == "no attention":
        ops = Ops(attention=lambda q, k, v: v.transpose(1, 2).flatten(2))
    if fault == "no reduction":
        collectives.start_all_reduce = _only_of(2)
    codec = encoders.build(made, cfg, device, sharding.mesh)
    alike = fault == "same noise"
    batches = pipeline.batches(
        made,
        sources.build(made, "train"),
        codec.tokenize,
        batch_size=made.train.batch_size,
        rank=0 if alike else sharding.mesh.index(sharding.batch_axes),
        world=sharding.mesh.size(sharding.batch_axes),
    )
    told = []
    for turn in range(steps):
        current, out = step.train_step(
            current,
            next(batches),
            turn,
            cfg=cfg,
            config=made,
            encoders=codec,
            optimizer=optimizer.Optimizer(chosen.init, update),
            device=device,
            sharding=sharding,
            ops=ops,
        )
        told.append((float(out["loss"]), float(out["grad_norm"])))
    batches.close()
    places = tree.flatten(sharding.grads)
    return told, {path: (grad.numpy(), places[path].local(sharding.mesh)) for path, grad in first.items()}


def _only_of(numbers: int) -> Any:
    # What is left are the sums of a loss and a norm, which are two numbers.
    everyone = collectives.start_all_reduce
    return lambda x, group: everyone(x, group) if x.numel() <= numbers else x


def bytes_per_process(rank: int, sizes: dict[str, int]) -> tuple[int, int]:
    """Returns the bytes of parameters and moments that this process has, and those of the whole state."""
    del rank
    made, device = config(sizes, {}), torch.device("cpu")
    cfg, chosen = state.model_config(made), optimizer.from_config(made)
    sharding = layout.build(made, cfg, chosen, mesh.build(made.parallel), device)
    current = state.create(made, cfg, chosen, device, sharding=sharding)
    mine = sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(placements.shards(current)))
    return mine, state.size_in_bytes(state.abstract(made, cfg, chosen))
