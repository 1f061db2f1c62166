"""Weights with LoRAs added, a few rows at a time as they are read: a model like any other, to convert or to load."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_func.errors import UserError
from flux_func.interop import formats
from flux_func.interop.spans import widest
from flux_func.interop.stored import Stored, cast
from flux_func.models import flux
from flux_func.transforms import lora
from flux_func.transforms.lora import LowRank

# Added up at a time, so that memory does not grow with a leaf in float32.
_NUMBERS = 1 << 22
_INPUT = "img_in"


@dataclass(frozen=True)
class Adapter:
    """What is added to weights.

    Attributes:
      name: of its file, for errors.
      updates: {path of our linear: update}.
      weight: how much of the updates.
      scales: {our path: scale} of norms that it replaces, whatever its weight.
    """

    name: str
    updates: Mapping[str, LowRank]
    weight: float = 1.0
    scales: Mapping[str, Tensor] = field(default_factory=dict)


def merged(stored: Stored, adapters: Sequence[Adapter], dtype: torch.dtype | None = None) -> Stored:
    """Returns a transformer's weights with adapters added, unread: `lora.merge`, leaf by leaf and in rows.

    A LoRA for twice the input channels (FLUX.1 Canny's and Depth's: noise and an image) makes a model of these, whose
    new columns begin at zero; one for half of them leaves the others as they are. So does diffusers.

    Args:
      stored: the base.
      adapters: what is added.
      dtype: of the leaves that change; None: as stored. The sum is taken in float32 at least.

    Raises:
      UserError: an adapter of another model, whose shapes are named; or two that replace the same norms.
    """
    cfg, adapters = _fitted(stored, adapters)
    layout = formats.layout(cfg, "bfl")
    scales = {path: scale for each in adapters for path, scale in each.scales.items()}
    updates: dict[str, list[LowRank]] = {}
    for each in adapters:
        for path, update in each.updates.items():
            updates.setdefault(path, []).append(replace(update, alpha=each.weight * update.alpha))

    def changes(path: str) -> list[LowRank]:
        linear, _, name = path.rpartition(".")
        return [update for update in updates.get(linear, ()) if name == "weight" or update.bias is not None]

    def base(path: str, first: int, last: int) -> Tensor:
        if path in scales:
            return scales[path][first:last].to(stored.types[path])
        leaf = stored.rows(path, first, last)
        return F.pad(leaf, (0, cfg.in_channels - leaf.shape[1])) if path == f"{_INPUT}.weight" else leaf

    types = {path: dtype or kind if changes(path) else kind for path, kind in stored.types.items()}

    def read(path: str, first: int, last: int) -> Tensor:
        found = changes(path)
        if not found:
            return base(path, first, last)
        out = torch.empty(last - first, *layout.ours[path][1:], dtype=types[path])
        step = max(1, _NUMBERS // math.prod(layout.ours[path][1:]))
        for start in range(first, last, step):
            stop = min(start + step, last)
            leaf = base(path, start, stop)
            wide = leaf.to(widest((leaf.dtype, torch.float32)))
            total = lora.merge_leaf(path.rpartition(".")[2], wide, [_rows(update, start, stop) for update in found])
            out[start - first : stop - first] = cast(total, types[path], path)
        return out

    return replace(stored, cfg=cfg, layout=layout, dtypes=types, read=read)


def _rows(update: LowRank, first: int, last: int) -> LowRank:
    bias = None if update.bias is None else update.bias[first:last]
    return replace(update, B=update.B[first:last], bias=bias)


def _fitted(stored: Stored, adapters: Sequence[Adapter]) -> tuple[flux.FluxConfig, list[Adapter]]:
    """Returns the model that comes of it, and adapters that all have its input channels."""
    given = stored.cfg.in_channels
    widths = [each.updates[_INPUT].A.shape[1] for each in adapters if _INPUT in each.updates]
    cfg = replace(stored.cfg, in_channels=2 * given) if 2 * given in widths else stored.cfg
    shapes, fitted, replaced = flux.abstract(cfg), [], dict[str, str]()
    leaves = formats.layout(cfg, "bfl").ours
    for each in adapters:
        try:
            lora.place(_widened(each.updates, cfg.in_channels), shapes)
        except ValueError as error:
            raise UserError(f"{each.name}: {error}") from error
        for path, scale in each.scales.items():
            if leaves.get(path) != tuple(scale.shape):
                there = list(leaves[path]) if path in leaves else "none"
                raise UserError(f"{each.name}: replaces {path}, {list(scale.shape)}, and the base has {there}")
            if path in replaced:
                raise UserError(f"{each.name}: replaces {path}, as {replaced[path]} does; give one of them")
            replaced[path] = each.name
        fitted.append(replace(each, updates=_widened(each.updates, cfg.in_channels)))
    return cfg, fitted


def _widened(updates: Mapping[str, LowRank], channels: int) -> dict[str, LowRank]:
    """Returns updates whose input layer's is for so many channels, if it was for half of them."""
    first = updates.get(_INPUT)
    if first is None or 2 * first.A.shape[1] != channels:
        return dict(updates)
    return {**updates, _INPUT: replace(first, A=F.pad(first.A, (0, channels - first.A.shape[1])))}
