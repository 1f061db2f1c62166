"""Weights at rest: what they are, and how to read them a few rows at a time."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop.spans import Layout, Rows
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params

Config = FluxConfig | AutoencoderConfig
# The narrowest first, by what they reach.
_WIDE = (torch.bfloat16, torch.float32, torch.float64)
_MODELS = {"transformer": FluxConfig, "autoencoder": AutoencoderConfig}


def part_of(cfg: Config) -> str:
    """Returns which part of a pipeline this configures: "transformer" or "autoencoder"."""
    return next(part for part, kind in _MODELS.items() if isinstance(cfg, kind))


def to_json(cfg: Config) -> dict[str, Any]:
    """Returns what our files say of their model: its part, and every field."""
    return {"model": part_of(cfg), **dataclasses.asdict(cfg)}


def from_json(saved: Mapping[str, Any]) -> Config:
    """Returns the configuration that `to_json` gave; raises ValueError where it did not."""
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return _MODELS[fields.pop("model")](**fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no configuration of ours: {error}") from error


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

    @cached_property
    def types(self) -> dict[str, torch.dtype]:
        """{our path: type}, as stored."""
        return self.layout.leaf_types(self.dtypes)

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
            flat[path] = cast(leaf, dtype or leaf.dtype, path).to(device)
            progress(leaf.nbytes)
        return tree.unflatten(flat)


def cast(tensor: Tensor, dtype: torch.dtype, name: str, field: str = "dtype") -> Tensor:
    """Returns a tensor in another type; UserError, of the field, where a value lies beyond what that type reaches."""
    most = torch.finfo(dtype).max
    if most < torch.finfo(tensor.dtype).max and tensor.numel():
        low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
        largest = max(-low.item(), high.item())
        # What is infinite or no number already stays so in any type.
        if most < largest < math.inf:
            wider = next(kind for kind in _WIDE if torch.finfo(kind).max >= largest)
            raise UserError(
                f"{field} is {_name(dtype)}: {name} reaches {largest:.3g}, beyond {most:.3g}; use {_name(wider)}"
            )
    return tensor.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def warn_of_left_out(weights: Stored) -> None:
    """Logs what lies beside the weights and is not read, where there is any."""
    if weights.left_out:
        logging.getLogger(__name__).warning("%s: left out: %s", weights.path, ", ".join(weights.left_out))
