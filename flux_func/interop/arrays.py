"""Between torch and Orbax, which speaks JAX and numpy: the import, and the arrays."""

import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

# What is repeated on several processes is written by all of them in parts, unless the parts were smaller than this.
LEAST_PART_BYTES = 1 << 20


@functools.cache
def orbax() -> Any:
    """Returns orbax.checkpoint, imported late (it takes seconds), over JAX on the CPU alone, and quiet."""
    import jax
    import orbax.checkpoint

    # Grain may have imported JAX before; its platforms are settled at first use.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")

    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    logging.getLogger("asyncio").addFilter(_is_told)
    sys.unraisablehook = functools.partial(_quiet, sys.unraisablehook)
    return orbax.checkpoint


def _is_told(record: logging.LogRecord) -> bool:
    # Of several writes that fail Orbax raises one's error; asyncio would report the others', with their traces.
    said = record.getMessage()
    return not (said.startswith("Task exception was never retrieved") and f"{os.sep}orbax{os.sep}" in said)


def _quiet(previous: Callable, unraisable: Any) -> None:
    # Tensorstore reports one of these for every write still pending when another has failed.
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)


@dataclass(frozen=True)
class Part:
    """What one process writes of a leaf.

    Attributes:
      tensor: the part, which shares the leaf's memory.
      shape: of the whole leaf.
      ranks: the mesh that the leaf is on, as DTensor has it; None: the leaf is this process's alone.
      axes: the names of the mesh's axes.
      spec: for each dimension of the leaf the axes that split it, outermost first: JAX's PartitionSpec.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    ranks: np.ndarray | None = None
    axes: tuple[str, ...] = ()
    spec: tuple[tuple[str, ...], ...] = ()


def part(leaf: torch.Tensor) -> Part:
    """Returns what this process writes of a leaf: its own shard, and of that its share among those that have the same.

    A shard that cannot be shared out (it is small, or nothing divides) is written whole by the first that has it. Under
    a process group a plain tensor is one that every process has.
    """
    if not isinstance(leaf, DTensor):
        tensor, world = leaf.detach(), dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return Part(tensor, tuple(leaf.shape))
        return _share(tensor, tuple(leaf.shape), np.arange(world), ("rank",), [None], (dist.get_rank(),))
    mesh = leaf.device_mesh
    dims = [placement.dim if placement.is_shard() else None for placement in leaf.placements]
    ranks, axes = mesh.mesh.numpy(), mesh.mesh_dim_names or tuple(str(axis) for axis in range(mesh.ndim))
    return _share(leaf.detach().to_local(), tuple(leaf.shape), ranks, axes, dims, tuple(mesh.get_coordinate()))


def _share(
    local: torch.Tensor,
    shape: tuple[int, ...],
    ranks: np.ndarray,
    axes: tuple[str, ...],
    dims: list[int | None],
    place: tuple[int, ...],
) -> Part:
    spec = [tuple(axis for axis, split in zip(axes, dims, strict=True) if split == dim) for dim in range(len(shape))]
    repeated = [axis for axis, split in enumerate(dims) if split is None]
    sizes = [ranks.shape[axis] for axis in repeated]
    copies, index = math.prod(sizes), 0
    for axis, size in zip(repeated, sizes, strict=True):
        index = index * size + place[axis]
    if copies > 1 and local.nbytes >= copies * LEAST_PART_BYTES:
        # The dimension that is split already first: its parts stay one run of memory.
        for dim in sorted(range(len(shape)), key=lambda dim: not spec[dim]):
            if local.shape[dim] % copies == 0:
                local = local.chunk(copies, dim)[index]
                spec[dim] += tuple(axes[axis] for axis in repeated)
                break
    return Part(local, shape, ranks, axes, tuple(spec))


def assemble(part: Part, tensor: torch.Tensor) -> Any:
    """Returns the jax.Array of a whole leaf, of which this process holds `tensor`, the values of its part.

    JAX's process index has to be torch's rank.
    """
    local = to_jax(tensor)
    if part.ranks is None:
        return local
    import jax

    first = {device.process_index: device for device in reversed(jax.devices("cpu"))}
    mesh = jax.sharding.Mesh(np.vectorize(first.__getitem__, otypes=[object])(part.ranks), part.axes)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*part.spec))
    with jax.enable_x64(True):
        return jax.make_array_from_single_device_arrays(part.shape, sharding, [local])


def to_jax(tensor: torch.Tensor) -> Any:
    """Returns a jax.Array of a tensor's values: over its very memory if that is the host's and aligned to 64 bytes."""
    orbax()
    import jax

    # Without it 64-bit integers and floats would become 32-bit ones, silently.
    with jax.enable_x64(True):
        return jax.dlpack.from_dlpack(tensor.cpu().contiguous())


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor over the memory of an array of any type that torch has, bfloat16 too (numpy's from JAX)."""
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(getattr(torch, array.dtype.name)).view(array.shape)


def copies(flat: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns copies of the leaves on the host, in the buffers of the same names where they fit."""
    filled = {}
    for path, leaf in flat.items():
        buffer = buffers.get(path)
        if buffer is None or buffer.shape != leaf.shape or buffer.dtype != leaf.dtype:
            # Not pinned, though a GPU's copy would be faster: JAX takes pinned memory for a GPU's.
            buffer = torch.empty(leaf.shape, dtype=leaf.dtype)
        filled[path] = buffer.copy_(leaf)
    return filled
