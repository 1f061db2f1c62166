"""Weights at rest: what they are, and how to read them a few rows at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_func import tree
from flux_func.interop.spans import Layout, Rows
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params

Config = FluxConfig | AutoencoderConfig


@dataclass(frozen=True)
class Stored:
    """A transformer's or an autoencoder's weights in files, found whole; nothing is read until `read` is called.

    Attributes:
      path: of the file or folder.
      format: "bfl", "diffusers", "torchtitan" or "orbax".
      cfg: the model.
      layout: of the format for this model.
      dtypes: {the format's name: type} of its tensors.
      read: (the format's name, first row, row after the last) to those rows on the CPU, in the stored type.
      left_out: what lies in the files beside the weights and is not read, such as "optimizer (1560 tensors)".
    """

    path: str
    format: str
    cfg: Config
    layout: Layout
    dtypes: Mapping[str, torch.dtype]
    read: Rows
    left_out: tuple[str, ...] = ()

    def leaf(self, path: str) -> Tensor:
        """Returns our leaf `path`, on the CPU and in the stored type."""
        return self.layout.leaf(path, self.read)

    def rows(self, path: str, start: int, stop: int) -> Tensor:
        """Returns some rows of our leaf `path`, on the CPU and in the stored type."""
        return self.layout.rows(path, start, stop, self.read)

    def params(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int], object] = lambda count: None,
    ) -> Params:
        """Returns the parameter tree, in a type (None: as stored), read a leaf at a time.

        Args:
          dtype, device: of every leaf.
          progress: called with the bytes read after each leaf.
        """
        flat = {}
        for path in self.layout.ours:
            leaf = self.leaf(path)
            # Never the file's own memory: what becomes of the file is no affair of the parameters.
            flat[path] = leaf.to(device, dtype or leaf.dtype, copy=True)
            progress(leaf.nbytes)
        return tree.unflatten(flat)
