"""The layers of FLUX as functions of (params, inputs), and `Ops`, the one door through which they vary.

After black-forest-labs/flux, `modules/layers.py` and `math.py`. Shapes: B batch, L sequence, H heads, D head size,
C = H * D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from flux_func import tree
from flux_func.models.attention import attention

Params = dict[str, Any]
Rope = tuple[Tensor, Tensor]


def check_numbers(cfg: Any) -> None:
    """Checks the numbers of a configuration, a dataclass: ValueError names a field that cannot be.

    Whole numbers are counts and sizes, from 1 on (from 0 for a depth); all others are finite.
    """
    for field in fields(cfg):
        value, least = getattr(cfg, field.name), 0 if field.name.startswith("depth") else 1
        if field.type is int and (not isinstance(value, int) or value < least):
            raise ValueError(f"{field.name} {value!r} should be a whole number from {least} on")
        if field.type is float and (not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise ValueError(f"{field.name} {value!r} should be a finite number")


def linear(params: Params, x: Tensor, path: str) -> Tensor:
    """Returns x @ weight.T + bias.

    Args:
      params: weight [out, in] and, where the layer has one, bias [out].
      x: [..., in], in the type of the weight.
      path: the layer's name without its block's index (`double_blocks.img_attn.qkv`), for implementations of
        `Ops.linear` that choose by pattern; the same for every block of a kind, so that one compiled stage serves all.
    """
    del path
    return F.linear(x, params["weight"], params.get("bias"))


def _same(fn: Callable, stage: Any) -> Callable:
    del stage
    return fn


@dataclass(frozen=True)
class Ops:
    """How the model's operations are done: everything that varies without changing the model comes in here.

    Attributes:
      linear: `(params, x, path) -> y`, as `layers.linear`.
      attention: `(q, k, v) -> [B, L, H*D]`, as `layers.attention`.
      wrap_stage: `(fn, stage) -> fn` around each stage's `fn(params, carry, const) -> carry`.
    """

    linear: Callable[[Params, Tensor, str], Tensor] = linear
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention
    wrap_stage: Callable[[Callable, Any], Callable] = _same


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 or `dtype`, whichever is wider."""
    return torch.promote_types(dtype, torch.float32)


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Returns x with mean 0 and variance 1 over its last dimension, without scale or bias; [..., C].

    Statistics are of float32 or of x's type, whichever is wider.
    """
    if not is_transformed():
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    # F.layer_norm is wrong under grad(jvp) and jvp(jvp) in torch 2.13; group_norm of one group is the same, and right,
    # but slower backward on a CPU, and on a GPU its statistics are of x's type.
    wide = x.to(at_least_float32(x.dtype))
    return F.group_norm(wide.reshape(-1, x.shape[-1]), 1, eps=eps).view(x.shape).to(x.dtype)


def is_transformed() -> bool:
    """Returns whether a transform of torch.func, or forward mode, is at work here; not in what torch.compile traces."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def rms_norm(params: Params, x: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * scale over the last dimension; [..., D], scale [D]."""
    return F.rms_norm(x, x.shape[-1:], params["scale"], eps)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0, time_factor: float = 1000.0) -> Tensor:
    """Returns sinusoidal features [B, dim] of t [B], cosines first, in float32 or t's type, whichever is wider."""
    t = time_factor * t.to(at_least_float32(t.dtype))
    half = dim // 2
    omega = torch.exp(-math.log(max_period) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angle = t[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope(ids: Tensor, axes_dim: tuple[int, ...], theta: int, dtype: torch.dtype = torch.float32) -> Rope:
    """Returns the rotary table of position ids [B, L, len(axes_dim)] (Su et al. 2021, one share of D per axis).

    Returns:
      cosines and signed sines, each [B, 1, L, D], in `dtype` but never below float32. Angles are taken in float64,
      since a large position times a rounded frequency would lose digits.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[..., axis, None].to(torch.float64) * omega)
    angle = torch.cat(angles, dim=-1)[:, None, :, :, None]
    cos, sin = angle.cos().expand(*angle.shape[:-1], 2), torch.cat([-angle.sin(), angle.sin()], dim=-1)
    return tuple(part.flatten(-2).to(at_least_float32(dtype)) for part in (cos, sin))


def apply_rope(x: Tensor, table: Rope) -> Tensor:
    """Returns x [B, H, L, D] with each pair (x[2i], x[2i+1]) turned by its angle; computed in the table's type."""
    cos, sin = table
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    pairs = wide.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which has no complex numbers
        across = pairs.flip(-1)
    else:  # (a, b) as a + bi, times i, is (-b, a): the same products in half the time
        across = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * 1j)
        sin = sin[..., 1::2].repeat_interleave(2, dim=-1)
    return torch.addcmul(wide * cos, across.flatten(-2), sin).to(x.dtype)


def mlp_embedder(params: Params, x: Tensor, ops: Ops, path: str) -> Tensor:
    """Returns out_layer(silu(in_layer(x))); [B, in] to [B, C], in the type of x."""
    params = tree.map(lambda leaf: leaf.to(x.dtype), params)
    hidden = F.silu(ops.linear(params["in_layer"], x, f"{path}.in_layer"))
    return ops.linear(params["out_layer"], hidden, f"{path}.out_layer")


def modulation(params: Params, vec: Tensor, parts: int, ops: Ops, path: str) -> tuple[Tensor, ...]:
    """Returns `parts` tensors [B, 1, C] (shift, scale, gate, ...) from the conditioning vec [B, C]."""
    return ops.linear(params, F.silu(vec).to(params["weight"].dtype), path)[:, None, :].chunk(parts, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns (1 + scale) * layer_norm(x) + shift; x [B, L, C], shift and scale [B, 1, C]."""
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


def qk_norm(params: Params, q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns query and key [B, H, L, D], each RMS-normalized over D."""
    return rms_norm(params["query_norm"], q, eps), rms_norm(params["key_norm"], k, eps)


def mlp(params: Params, x: Tensor, ops: Ops, path: str) -> Tensor:
    """Returns linear(gelu(linear(x))), the tanh form of GELU; [B, L, C] to [B, L, C]."""
    hidden = F.gelu(ops.linear(params["0"], x, f"{path}.0"), approximate="tanh")
    return ops.linear(params["2"], hidden, f"{path}.2")
