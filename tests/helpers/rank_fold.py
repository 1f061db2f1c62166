"""What each process of a mesh computes, to be held against one process alone."""

import dataclasses
from typing import Any

import numpy as np
import torch

from flux_func import tree
from flux_func.models import flux
from flux_func.parallel import fold, mesh, placements
from flux_func.parallel.sharding import Sharding

TINY = flux.flavor("flux-tiny")
TABLE = (("*", {"shard": 0, "context": 0}),)
SPLITS = {"img": (("context",), 1), "txt": (("context",), 1), "rope": (("context",), 2), "target": (("context",), 1)}


def batch(size: int = 8, height: int = 8, width: int = 8, text: int = 4) -> dict[str, torch.Tensor]:
    """Returns a batch of `ff.loss`, float32, the same in every process."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    return dict(
        latents=normal(size, 16, height, width),
        noise=normal(size, 16, height, width),
        timesteps=torch.from_numpy(rng.random(size, dtype=np.float32)),
        txt=normal(size, text, 4096),
        y=normal(size, 768),
    )


def gradients(rank: int, sizes: dict[str, int], options: dict[str, Any]) -> tuple[dict, float]:
    """Returns ({path: this process's part of the gradient, and where it lies}, the loss over all processes)."""
    from flux_func.models.layers import Ops
    from flux_func.parallel import collectives

    del rank
    cfg = dataclasses.replace(TINY, **options.get("cfg", {}))
    m = mesh.build(sizes)
    params = flux.init(cfg, scheme="nonzero")
    table = options.get("table", TABLE)
    where = placements.resolve(table, tree.flatten(params), m, "parallel.params")
    grads_where = placements.resolve(options.get("moments", table), tree.flatten(params), m, "parallel.moments")
    shards = tree.unflatten(
        {
            p: placements.distribute(leaf[where[p].local(m)].clone(), where[p], m)
            for p, leaf in tree.flatten(params).items()
        }
    )
    s = Sharding(
        m,
        tree.unflatten(where),
        tree.unflatten(grads_where),
        ("replicate", "shard"),
        SPLITS if m.sizes["context"] > 1 else {},
        prefetch=options.get("prefetch", 1),
        compute=torch.float32,
        reduce=torch.float32,
    )
    ops = Ops()
    if m.sizes["context"] > 1:
        from flux_func.parallel import attention

        ops = Ops(
            attention=attention.context_attention(
                options.get("attention", "all_gather"), m, cfg.num_heads, options.get("ulysses", -1)
            )
        )
    whole = batch(8)
    world, index = m.size(s.batch_axes), m.index(s.batch_axes)
    share = 8 // world
    mine = {k: v[index * share : (index + 1) * share] for k, v in whole.items()}
    accumulate = options.get("accumulate", 1)
    grads, loss, step = None, 0.0, share // accumulate
    for i in range(accumulate):
        micro = {k: v[i * step : (i + 1) * step] for k, v in mine.items()}
        grads, part = fold.grad_and_value(
            shards,
            cfg,
            micro,
            ops,
            options.get("remat", "none"),
            denominator=whole["latents"].numel() * s.repeats,
            into=grads,
            sharding=s,
            last=i == accumulate - 1,
        )
        loss = loss + part
    group = m.group()
    loss = loss if group is None else collectives.wait(collectives.start_all_reduce(loss, group))
    return {p: (g.numpy(), grads_where[p].local(m)) for p, g in tree.flatten(grads).items()}, float(loss)
