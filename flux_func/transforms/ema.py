"""Exponential moving average of the weights, as a function of two trees."""

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
      decay: in [0, 1]; that of a scalar tensor is not looked at, which could mean to wait for a device.

    Returns:
      `average`, its tensors updated.

    Raises:
      ValueError: a decay out of range or no scalar, or trees that differ in structure or shapes.
    """
    checks.weight("decay", decay)
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay!r}: should be a number in [0, 1]")
    new, old = checks.alike(params, average, "params is not like the average")
    for mean, leaf in zip(old, new, strict=True):
        # One after the other: of parameters in another type no second tree is made.
        weight = (1 - decay).to(mean) if isinstance(decay, Tensor) else 1 - decay
        mean.lerp_(leaf.to(mean.dtype), weight)
    return average
