"""Between torch and Orbax, which speaks JAX and numpy: the import, and the arrays."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


@functools.cache
def orbax() -> Any:
    """Returns orbax.checkpoint, imported late (it takes seconds), over JAX on the CPU alone, and quiet."""
    import jax
    import orbax.checkpoint

    # Grain may have imported JAX before; its platforms are settled at first use.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")

    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    sys.unraisablehook = functools.partial(_quiet, sys.unraisablehook)
    return orbax.checkpoint


def _quiet(previous: Callable, unraisable: Any) -> None:
    # Tensorstore reports one of these for every write still pending when another has failed.
    if str(unraisable.exc_value) != "Event loop is closed":
        previous(unraisable)


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
