"""What a device can do: its memory, how fast it computes, and how fast it talks to others.

Peaks, bandwidths and links are those of NVIDIA's datasheets (SXM modules in boards of 8, dense products, links in one
direction); memory is what the driver reports. How much of a peak is reached is measured, by others and on other
programs, so predicted times are estimates, better at ordering meshes than at seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flux_func.parallel.mesh import AXES

# NCCL's own cost model of a ring (its file of tuning constants, protocol "Simple"): seconds to begin with, for a hop
# between neighbours in a node, and for one between nodes.
START, HOP_INSIDE, HOP_BETWEEN = 8.4e-6, 3.4e-6, 14e-6
# Of the memory, what a process needs beside tensors: CUDA's context, NCCL's buffers, workspaces, fragments.
RESERVED = 0.08
# How often a ring is gone round, in hops for each other process.
ROUNDS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1, "permute": 0}


@dataclass(frozen=True)
class Device:
    """An accelerator, and its share of the network.

    Attributes:
      name: what --device says.
      memory: bytes.
      peak: {bytes of a number: dense operations per second}: of bfloat16, and of float32 outside of the tensor cores,
        which is torch's default.
      products: share of the peak that large matrix products reach.
      attention: share of the peak that the flash attention kernels reach.
      bandwidth: of its memory, bytes per second.
      link: to the others in its node, bytes per second in one direction, as collectives reach it.
      network: to other nodes, likewise.
    """

    name: str
    memory: int
    peak: Mapping[int, float]
    products: float
    attention: float
    bandwidth: float
    link: float
    network: float

    @property
    def room(self) -> int:
        """Returns the bytes that tensors may take."""
        return int(self.memory * (1 - RESERVED))

    def seconds(self, operations: float, moved: float, dtype: torch.dtype, attention: bool = False) -> float:
        """Returns how long a kernel takes: its arithmetic or its memory traffic, whichever is slower."""
        reached = self.attention if attention else self.products
        peak = self.peak[2 if dtype.itemsize <= 2 else 4]
        return max(operations / (peak * reached), moved / self.bandwidth)


MIB = 2**20
# Products: the fastest matrix product that the ML Engineering book's search found (A100 267.9 of 312, H100 and H200
# 794.5 of 989, B200 1745 of 2250 TFLOP/s). Attention: of FlashAttention-2, 50 to 73% on A100 (arXiv:2307.08691) and 35%
# on H100 (arXiv:2407.08608); nothing is published of it on B200, taken as on H100. Links: NVLink 3, 4 and 5 have 300,
# 450 and 900 GB/s, of which NCCL's models count on 360 and 720 for the latter two; A100's by the same share. Network:
# an adapter of 200 (A100) or 400 Gb/s for each device, as in DGX systems.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 81920 * MIB, {2: 312e12, 4: 19.5e12}, 0.86, 0.6, 2.04e12, 240e9, 25e9),
        Device("h100", 81559 * MIB, {2: 989e12, 4: 67e12}, 0.80, 0.35, 3.35e12, 360e9, 50e9),
        Device("h200", 143771 * MIB, {2: 989e12, 4: 67e12}, 0.80, 0.35, 4.8e12, 360e9, 50e9),
        Device("b200", 183359 * MIB, {2: 2250e12, 4: 75e12}, 0.78, 0.35, 7.7e12, 720e9, 50e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes, and a mesh laid over them.

    Attributes:
      device: every one of them.
      sizes: of the mesh's axes, in the order of `AXES`.
      node: devices in a node.
    """

    device: Device
    sizes: Mapping[str, int]
    node: int = 8

    def crossing(self, kind: str, axes: tuple[str, ...]) -> float:
        """Returns the share of what a process sends along some axes that goes to another node.

        A ring through all nodes, as NCCL lays it, enters and leaves each once, and there are as many rings as adapters.
        """
        size, inside = self._size(axes), self._inside(axes)
        if inside == size:
            return 0.0
        return (size - inside) / (size - 1) if kind == "all_to_all" else 1 / inside

    def seconds(self, kind: str, axes: tuple[str, ...], sent: float) -> float:
        """Returns how long a collective takes in which each process sends `sent` bytes."""
        size, inside = self._size(axes), self._inside(axes)
        nodes = size // inside
        hops = ROUNDS[kind] * (size - 1) or 1
        between = min(hops, max(1, ROUNDS[kind]) * (nodes - 1))
        delay = START + (hops - between) * HOP_INSIDE + between * HOP_BETWEEN
        # Of a shift it is the process at a node's edge that the others wait for.
        crossing = float(nodes > 1) if kind == "permute" else self.crossing(kind, axes)
        return delay + max(sent / self.device.link, sent * crossing / self.device.network)

    def _size(self, axes: tuple[str, ...]) -> int:
        count = 1
        for axis in axes:
            count *= self.sizes[axis]
        return count

    def _inside(self, axes: tuple[str, ...]) -> int:
        """Returns how many of a group along some axes share a node."""
        inside = stride = 1
        for axis in reversed(AXES):
            if axis in axes:
                inside *= min(self.sizes[axis], max(1, self.node // stride))
            stride *= self.sizes[axis]
        return inside
