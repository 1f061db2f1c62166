"""The groups that each process of a mesh is in."""

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
