"""Exponential moving average of the weights, as a function of two trees."""

import torch
from torch import Tensor

from flux_func import tree
from flux_func.transforms import checks


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of one step, counted from 0: at most (1 + step) / (10 + step), so that the average does not
    hang on to the initial weights (the warm-up of TensorFlow's ExponentialMovingAverage)."""
    return min(decay, (1 + step) / (10 + step))


def update(average: tree.Tree, params: tree.Tree, decay: float | Tensor) -> tree.Tree:
    """Returns decay * average + (1 - decay) * params, in the average's types.

    Args:
      average: donated: its tensors are written.
      params: a tree like the average, of any floating types.
      decay: in [0, 1]; that of a tensor is not looked at, which could mean to wait for a device.

    Returns:
      `average`, its tensors updated.

    Raises:
      ValueError: a decay out of range, or trees that differ in structure or shapes.
    """
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay!r}: should be a number in [0, 1]")
    new, old = checks.alike(params, average, "params is not like the average")
    torch._foreach_lerp_(old, [leaf.to(mean.dtype) for leaf, mean in zip(new, old, strict=True)], 1 - decay)
    return average
