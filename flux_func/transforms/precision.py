"""Mixed precision: parameters kept in one type and computed with in another, and rounding right on average."""

from collections.abc import Callable

import torch
from torch import Tensor

from flux_func import tree
from flux_func.models.stages import Stage


def compute_in(dtype: torch.dtype) -> Callable[[Callable, Stage], Callable]:
    """Returns an `Ops.wrap_stage` that casts each stage's parameters to `dtype` just before it is computed.

    Activations follow, since the stem brings its input to the parameters' type; gradients come back in the type that
    the parameters are kept in (Micikevicius et al. 2018, arXiv:1710.03740; bfloat16 needs no loss scaling).
    """

    def wrap_stage(fn: Callable, stage: Stage) -> Callable:
        if stage.kind == "loss":
            return fn
        return lambda params, carry, const: fn(tree.map(lambda leaf: leaf.to(dtype), params), carry, const)

    return wrap_stage


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Returns x rounded to bfloat16, up or down at random, to x on average (Gupta et al. 2015, arXiv:1502.02551).

    Each result is one of the two neighbours of x, the nearer one the more likely: of bits that are uniform the share
    that rounds away from zero is the distance from the other neighbour.

    Args:
      x: float32, of any shape.
      bits: int64 of that shape, in [0, 2^16), such as half of those of `counted_bits`.
    """
    # bfloat16 is the first half of float32's bits: what the second half comes to decides about a carry.
    carried = (x.view(torch.int32) + bits.to(torch.int32)) & -(1 << 16)
    return torch.where(x.isfinite(), carried.view(torch.float32), x).to(torch.bfloat16)


def counted_bits(key: int | Tensor, step: Tensor, index: Tensor) -> Tensor:
    """Returns 32 random bits for each index, int64: a function of (key, step, index), the same on every device.

    Args:
      key: of what is drawn for, an integer of 32 bits, or an int64 scalar.
      step: a whole number, a scalar of any type.
      index: int64, from 0 to 2^32.
    """
    return _mixed((index + _mixed(_mixed(step.to(torch.int64)) ^ key)) & 0xFFFFFFFF)


def _mixed(word: Tensor) -> Tensor:
    """Returns integers of 32 bits, each to another: the last steps of MurmurHash3 (Appleby 2011)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = word ^ (word >> shift)
        # Less 2^32 the factor is the same modulo that, and the product stays within 64 bits.
        word = (word * (factor - (1 << 32))) & 0xFFFFFFFF
    return word ^ (word >> 16)
