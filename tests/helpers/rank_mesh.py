"""The groups that each process of a mesh is in."""

import datetime

import torch
import torch.distributed as dist

from flux_func.parallel import mesh

ALONG = ("replicate", "shard", "shard context", "replicate shard context")


def groups(rank: int, sizes: dict[str, int]) -> dict:
    """Returns {axes: ranks of this process's group along them, None where it is alone}, and its place in each."""
    made = mesh.build(sizes)
    assert made.rank == rank
    found = {axes: made.group(axes.split()) for axes in ALONG}
    members = {axes: group and dist.get_process_group_ranks(group) for axes, group in found.items()}
    return {**members, "places": {axes: made.index(axes.split()) for axes in ALONG}}


def waits(rank: int, seconds: float) -> str:
    """Returns what rank 0 says of a sum along "shard" that rank 1 stays away from until then; "" of the others."""
    made = mesh.build({"replicate": 2, "shard": 2, "context": 1}, limit=datetime.timedelta(seconds=seconds))
    group, store = made.group(["shard"]), dist.distributed_c10d._get_default_store()
    if rank:
        store.wait(["given up"])
        return ""
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as failure:
        return str(failure)
    finally:
        store.set("given up", "")
    return ""
