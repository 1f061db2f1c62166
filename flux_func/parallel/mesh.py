"""The mesh of processes: its axes, what sizes they may have, and the groups that talk to each other.

Ranks are laid out with `replicate` outermost and `context` innermost, so that neighbours in a node share the most.
"""

import datetime
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flux_func.errors import UserError

AXES = ("replicate", "shard", "context")


@dataclass(frozen=True)
class Mesh:
    """The processes of a run by axis.

    Attributes:
      sizes: of every axis of `AXES`, in that order.
      rank: this process.
      devices: torch's mesh; None: no processes to talk to, as in a run of one, or a mesh that is only planned.
      limit: what a collective of the groups may take; None: as torch has it, 10 minutes for NCCL and 30 for gloo.
      groups: those that were asked for, by their axes.
    """

    sizes: Mapping[str, int]
    rank: int = 0
    devices: DeviceMesh | None = None
    limit: datetime.timedelta | None = None
    groups: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict, compare=False, repr=False)

    def size(self, axes: Sequence[str] = AXES) -> int:
        """Returns how many processes there are along some axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def index(self, axes: Sequence[str]) -> int:
        """Returns the place of this process in its group along some axes, the first of them counting most."""
        place, rest = {}, self.rank
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, self.sizes[axis])
        return functools.reduce(lambda index, axis: index * self.sizes[axis] + place[axis], axes, 0)

    def group(self, axes: Sequence[str] = AXES) -> dist.ProcessGroup | None:
        """Returns the processes along some axes, ordered as `index` counts; None where this is the only one.

        The first call for some axes is collective: every process makes it.
        """
        split = tuple(axis for axis in axes if self.sizes[axis] > 1)
        if split and split not in self.groups:
            part = self.devices[split[0]] if len(split) == 1 else self.devices[split]._flatten("_".join(split))
            self.groups[split] = part.get_group()
            if self.limit:
                # torch gives a new group a limit of its own, whatever the default group has.
                dist.distributed_c10d._set_pg_timeout(self.limit, self.groups[split])
        return self.groups[split] if split else None


ONE = Mesh(dict.fromkeys(AXES, 1))


def build(wanted: Mapping[str, int], device_type: str = "cpu", limit: datetime.timedelta | None = None) -> Mesh:
    """Returns the mesh over the processes of torch.distributed's default group, or of one process without it."""
    if not dist.is_initialized():
        return Mesh(resolve(wanted, 1))
    sizes = resolve(wanted, dist.get_world_size())
    devices = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return Mesh(sizes, dist.get_rank(), devices, limit)


def resolve(wanted: Mapping[str, int], processes: int) -> dict[str, int]:
    """Returns the size of every axis, where one may be -1: what is left of the processes.

    Raises:
      UserError: the sizes do not make up the number of processes; the line says which would.
    """
    sizes = {axis: wanted[axis] for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"parallel.{axis} is {size}: should be at least 1, or -1 for what is left")
    open_axes = [axis for axis in AXES if sizes[axis] == -1]
    if len(open_axes) > 1:
        raise UserError(f"parallel.{open_axes[1]} is -1: so is parallel.{open_axes[0]}; one of them should be a number")
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and processes % given == 0:
        sizes[open_axes[0]] = processes // given
    if math.prod(sizes.values()) != processes:
        asked = " x ".join(f"{axis}={wanted[axis]}" for axis in AXES)
        # What differs in the fewest axes comes first.
        others = sorted(meshes(processes), key=lambda mesh: sum(mesh[axis] != wanted[axis] for axis in AXES))
        could = "; ".join(",".join(f"{axis}={mesh[axis]}" for axis in AXES) for mesh in others[:4])
        raise UserError(f"parallel is {asked}: does not make up the {processes} processes there are; would: {could}")
    return sizes


def meshes(processes: int) -> list[dict[str, int]]:
    """Returns every mesh of so many processes."""
    divisors = [n for n in range(1, processes + 1) if processes % n == 0]
    pairs = itertools.product(divisors, divisors)
    return [
        {"replicate": processes // (shard * context), "shard": shard, "context": context}
        for context, shard in pairs
        if processes % (shard * context) == 0
    ]
