"""AdamW's update of leaves, by torch's fused kernel or where they are kept in fewer bits than they are updated in.

Of the latter a part at a time is widened to float32, updated, and rounded to what it is kept in. In 8 bits that is
{"codes": uint8, as the parameter; "scale": float32, [..., blocks]}: codes of numbers from -1 to 1, closer together near
zero, and for each block of the last dimension what they are times (Dettmers et al. 2022, arXiv:2110.02861; by torchao's
functions). A leaf that is split along another dimension has its blocks whole.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flux_func import random
from flux_func.models.layers import at_least_float32
from flux_func.parallel.placements import Span
from flux_func.transforms import precision

KINDS = ("", "float32", "bfloat16", "8bit")
ROUNDINGS = ("nearest", "stochastic")
# Numbers that share a scale: the largest divisor of the first and of the last dimension. Below the second none do.
BLOCK, LEAST_BLOCK = 256, 32
# Numbers updated at a time: what a CPU's cache holds, and what is little of a GPU's memory.
PART_CPU, PART = 1 << 16, 1 << 24

# A tensor like the parameter, or {"codes", "scale"}.
Kept = Any
# A leaf, its gradient, and what is kept of its two moments.
Row = tuple[Tensor, Tensor, Kept, Kept]


def check(kind: str, rounding: str) -> None:
    """Checks that there are such moments and such rounding; ValueError for neither, ImportError without torchao."""
    if kind not in KINDS:
        raise ValueError(f"moments is {kind!r}: should be one of {', '.join(map(repr, KINDS))}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}: should be one of {', '.join(map(repr, ROUNDINGS))}")
    if kind == "8bit":
        _map(torch.device("cpu"), True)


def block(shape: Sequence[int]) -> int:
    """Returns how many numbers of a leaf share a scale; 0 for vectors and narrow matrices, which float32 is kept of."""
    size = math.gcd(BLOCK, shape[-1]) if len(shape) > 1 else 0
    return size if size >= LEAST_BLOCK else 0


def zeros(kind: str, leaf: Tensor) -> Kept:
    """Returns what is kept of a moment before the first update, in one of `KINDS`; "": in the leaf's type."""
    size = block(leaf.shape) if kind == "8bit" else 0
    if size:
        scale = torch.zeros(*leaf.shape[:-1], leaf.shape[-1] // size, device=leaf.device)
        return {"codes": torch.zeros_like(leaf, dtype=torch.uint8), "scale": scale}
    dtypes = {"": leaf.dtype, "bfloat16": torch.bfloat16}
    return torch.zeros_like(leaf, dtype=dtypes.get(kind, at_least_float32(leaf.dtype)))


def updater(
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding: str,
    seed: int,
    compiled: Mapping[str, Any] | None,
) -> Callable[..., None]:
    """Returns the function that updates leaves and their moments in place; see `optimizer.adamw`.

    Its arguments: {path: (leaf, gradient, two moments)}, contiguous; the updates made, a scalar tensor; the learning
    rate; what gradients are multiplied by, or None; and {path: `Span`} of those that are parts of leaves.
    """
    advance = functools.partial(_advance, betas=betas, eps=eps, weight_decay=weight_decay)
    if compiled is not None:
        advance = torch.compile(advance, fullgraph=True, dynamic=True, **compiled)

    def update(
        rows: Mapping[str, Row],
        step: Tensor,
        rate: float | Tensor,
        scale: Tensor | None,
        spans: Mapping[str, Span],
    ) -> None:
        plain = {path: row for path, row in rows.items() if _is_plain(rounding, row)}
        hyper = dict(lr=rate, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        for columns in _by_type(plain.values()):
            steps, divisor = [step + 1] * len(columns[0]), _divisor(columns[1], scale)
            torch._fused_adamw_(*columns, [], steps, **hyper, amsgrad=False, maximize=False, grad_scale=divisor)
        for path, row in rows.items():
            if path not in plain:
                device, drawn = row[0].device, range(2 if rounding == "stochastic" else 0)
                keys = [_key(seed, f"rounding/{path}/{i}", device) for i in drawn]
                for first, part in _parts(row):
                    advance(*part, step, rate, scale, _maps(row), keys, first, spans.get(path))

    return update


def _is_plain(rounding: str, row: Row) -> bool:
    """Returns whether a leaf and its moments are of one type and rounded to the nearest, as torch's kernels have it."""
    param, _, *moments = row
    same = all(isinstance(kept, Tensor) and kept.dtype == param.dtype for kept in moments)
    return same and not (rounding == "stochastic" and param.dtype == torch.bfloat16)


def _by_type(rows: Iterable[Row]) -> list[list[list[Tensor]]]:
    """Returns the rows' columns, in groups of rows of one device and type each, which is what a fused kernel takes."""
    groups: dict[Any, list] = {}
    for row in rows:
        groups.setdefault((row[0].device, row[0].dtype), []).append(row)
    return [[list(column) for column in zip(*rows, strict=True)] for rows in groups.values()]


def _divisor(grads: list[Tensor], scale: Tensor | None) -> Tensor | None:
    """Returns what torch's fused kernels are to divide gradients by: a pass through memory less than to scale them."""
    if scale is None:
        return None
    if grads[0].dtype == torch.float64:  # the divisor is of float32
        torch._foreach_mul_(grads, scale)
        return None
    return scale.reciprocal().to(grads[0].device, torch.float32)


@functools.cache
def _key(seed: int, purpose: str, device: torch.device) -> Tensor:
    # A tensor: a number that is compiled as a variable may become one of 32 bits with a sign.
    return torch.tensor(int(random.generator(seed, purpose).integers(1 << 32)), device=device)


def _maps(row: Row) -> tuple[Tensor | None, Tensor | None]:
    """Returns what the codes of the moments stand for: of the first from -1 to 1, of the second from 0 to 1."""
    if isinstance(row[2], Tensor):
        return None, None
    return _map(row[0].device, True), _map(row[0].device, False)


@functools.cache
def _map(device: torch.device, signed: bool) -> Tensor:
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), device=device)


def _parts(row: Row) -> Iterator[tuple[int, list[Kept]]]:
    """Yields (first number, what is kept from it on) of the parts in which a leaf is updated."""
    size, most = row[0].numel(), PART_CPU if row[0].device.type == "cpu" else PART
    for first in range(0, size, most):
        yield first, [_part(kept, slice(first, min(first + most, size))) for kept in row]


def _part(kept: Kept, part: slice) -> Kept:
    """Returns what is kept of some of a leaf's numbers, whole blocks."""
    if isinstance(kept, Tensor):
        return kept.view(-1)[part]
    size = kept["codes"].shape[-1] // kept["scale"].shape[-1]
    blocks = slice(part.start // size, part.stop // size)
    return {"codes": kept["codes"].view(-1)[part], "scale": kept["scale"].view(-1)[blocks]}


# On some of a leaf's numbers: all tensors have one dimension.


def _advance(
    param: Tensor,
    grad: Tensor,
    exp_avg: Kept,
    exp_avg_sq: Kept,
    step: Tensor,
    rate: float | Tensor,
    scale: Tensor | None,
    maps: Sequence[Tensor | None],
    keys: Sequence[Tensor],
    first: int,
    span: Span | None,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Updates numbers of a leaf, those from its `first` on."""
    wide = at_least_float32(param.dtype)
    x, g, count = param.to(wide), grad.to(wide), step.to(wide) + 1
    g = g if scale is None else g * scale.to(wide)
    m = _read(exp_avg, maps[0]).to(wide).lerp(g, 1 - betas[0])
    v = _read(exp_avg_sq, maps[1]).to(wide).lerp(g * g, 1 - betas[1])
    x = x - rate * weight_decay * x
    x = x - rate / (1 - betas[0] ** count) * m / ((v / (1 - betas[1] ** count)).sqrt() + eps)
    draws = _draws(keys, step, _places(x, first, span)) if keys else None
    for kept, new, values in ((param, x, None), (exp_avg, m, maps[0]), (exp_avg_sq, v, maps[1])):
        if not isinstance(kept, Tensor):
            _write_codes(kept, new, values)
        elif draws and kept.dtype == torch.bfloat16:
            kept.copy_(precision.round_to_bfloat16(new.to(torch.float32), next(draws)))
        else:
            kept.copy_(new)


def _draws(keys: Sequence[Tensor], step: Tensor, places: Tensor) -> Iterator[Tensor]:
    """Yields 16 random bits for each place, twice for each key."""
    for key in keys:
        bits = precision.counted_bits(key, step, places)
        yield bits & 0xFFFF
        yield bits >> 16


def _places(x: Tensor, first: int, span: Span | None) -> Tensor:
    """Returns each number's place in the whole leaf."""
    at = first + torch.arange(x.numel(), device=x.device)
    if span is None:
        return at
    start, run, gap = span
    return start + at + (at // run * gap if gap else 0)


def _read(kept: Kept, values: Tensor | None) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(kept["codes"], values, kept["scale"])


def _write_codes(kept: Kept, value: Tensor, values: Tensor) -> None:
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    scaled, scale = scale_tensor(value, value.numel() // kept["scale"].numel())
    kept["codes"].copy_(quantize_8bit_with_qmap(scaled, values))
    kept["scale"].copy_(scale)
