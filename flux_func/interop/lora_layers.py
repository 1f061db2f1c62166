"""The names that LoRA files have for our linears: of each form, and of diffusers' parts of them."""

import dataclasses
import functools
import re
from collections.abc import Iterable

from flux_func import tree
from flux_func.interop import diffusers
from flux_func.models import flux

_PREFIX = re.compile(r"((base_model\.model|model|diffusion_model|transformer|unet)\.)*(lora_(unet|transformer)_)?")


def bare(name: str) -> str:
    """Returns a name without what programs put before it."""
    return name[_PREFIX.match(name).end() :]


def blocks(names: Iterable[str]) -> int:
    """Returns how many blocks, of either kind, there are at least where layers have such names."""
    return max((int(n) for name in names for n in re.findall(r"blocks[._](\d{1,3})[._]", name)), default=0) + 1


@functools.lru_cache(maxsize=4)
def norms(blocks: int) -> dict[str, str]:
    """Returns {name of the scale of a norm in any form: our path} for a number of blocks of each kind."""
    cfg = dataclasses.replace(flux.flavor("flux-dev"), depth=blocks, depth_single_blocks=blocks)
    ours = [path for path in tree.flatten(flux.declare(cfg)) if path.endswith(".scale")]
    return {name: path for path in ours for name in (path, *diffusers.names(path))}


@functools.lru_cache(maxsize=4)
def layers(blocks: int) -> dict[str, tuple[str, int]]:
    """Returns {name of a layer in any form: (our path, place)} for a number of blocks of each kind.

    The place is that among diffusers' parts of our linear; -1: it is ours as a whole, its rows in our order.
    """
    cfg = dataclasses.replace(flux.flavor("flux-dev"), depth=blocks, depth_single_blocks=blocks)
    table: dict[str, tuple[str, int]] = {}
    for name in tree.flatten(flux.declare(cfg)):
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            table |= {their: (path, place) for place, their in enumerate(names(path))}
            table[path] = (path, -1)
    return {**{name.replace(".", "_"): of for name, of in table.items()}, **table}


def names(path: str) -> list[str]:
    """Returns diffusers' names of one of our linears, in the order of their rows."""
    return [name.removesuffix(".weight") for name in diffusers.names(f"{path}.weight")]


def rows(path: str, fan_in: int, out: int | None = None) -> list[int]:
    """Returns how many of a linear's rows each of diffusers' parts has; out None: as FLUX.1 has it."""
    parts = len(names(path))
    if parts == 1:
        return [out]
    # Query, key and value are as wide as what they are computed from.
    mlp = int(diffusers.FIXED["mlp_ratio"] * fan_in) if out is None else out - 3 * fan_in
    return [fan_in] * 3 + [mlp] * (parts - 3)
