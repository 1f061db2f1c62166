"""Exponential moving average of the weights, as a function of two trees."""

import torch

from flux_func import tree


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of one step, counted from 0: at most (1 + step) / (10 + step), so that the average does not
    hang on to the initial weights (the warm-up of TensorFlow's ExponentialMovingAverage)."""
    return min(decay, (1 + step) / (10 + step))


def update(average: tree.Tree, params: tree.Tree, decay: float) -> tree.Tree:
    """Returns decay * average + (1 - decay) * params, in the average's type; `average` is donated."""
    old = tree.leaves(average)
    new = [leaf.to(mean.dtype) for leaf, mean in zip(tree.leaves(params), old, strict=True)]
    torch._foreach_lerp_(old, new, 1 - decay)
    return average
