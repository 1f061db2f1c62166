"""What a comparison comes to: rows of measures and their bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# What a measure may at most be. "Relative" is the L2 norm of the difference over that of the reference, in float64.
# Two float32 computations of the same sums in another order differ by a few roundings (6e-8) a layer; where a bound is
# ours to choose, it is about twice what each of the two is from float64.
BOUNDS = {
    "forward": 1e-6,  # relative: the whole model in float32
    "bfloat16": 1.2,  # our error against the reference's float32, over the reference's own in bfloat16
    "bfloat16 used": 10,  # the reference's error in bfloat16 over ours: float32 alone comes to ten thousands
    "loss": 1e-6,  # relative: one number
    "gradient": 3e-6,  # relative: the worst leaf
    "stage": 1e-6,  # relative: the worst of a stage's outputs; a single sample's matrix-vector products come to 4e-7
    "join": 0.0,  # text before image, without arithmetic
    "embedding": 1e-7,  # relative: the same float32 formula, up to another library's cosine
    "rope": 2e-7,  # relative, for every 16 patches of the longer side: a float32 angle loses digits as it grows
    "patches": 0.0,  # without arithmetic
    "schedule": 3e-7,  # difference of a time: five roundings of a number up to 1
    "trajectory": 1e-6,  # relative, as the forward passes that it adds up; times what cfg_scale makes of them
    "encode": 1e-14,  # relative: float64
    "decode": 1e-14,  # relative: float64
    "image": 1 / 255,  # difference of a pixel, 1 being white: one step of an 8-bit image
    "text": 1e-6,  # relative: the same blocks of transformers, equal to the bit where both sides have one torch
}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      part: "forward", "embeddings", "stages", "gradients", "sampler", "autoencoder", "image" or "text".
      name: what is compared.
      measure: how.
      value: how far ours is from the reference's.
      bound: what the value may at most be.
      where: where it is worst, or what the bound comes from.
      stage: the stage that the row is about; "" where it is about no single one.
    """

    part: str
    name: str
    measure: str
    value: float
    bound: float
    where: str = ""
    stage: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within the bound; not a number never is."""
        return self.value <= self.bound


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Returns |ours - theirs| / |theirs|, L2 norms in float64; the difference alone where theirs is zero."""
    if ours.shape != theirs.shape:
        raise ValueError(f"ours is {tuple(ours.shape)} where the reference's is {tuple(theirs.shape)}")
    theirs = theirs.double()
    error, size = (ours.double() - theirs).norm().item(), theirs.norm().item()
    return error / size if size else error


def worst(errors: Mapping[str, float]) -> str:
    """Returns the name of the largest error; not a number is beyond any."""
    return max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))


def relative_row(part: str, name: str, ours: Tensor, theirs: Tensor, bound: str, **rest: str) -> Row:
    """Returns a row of a relative difference, bounded by `BOUNDS[bound]`."""
    return Row(part, name, "relative", relative(ours, theirs), BOUNDS[bound], **rest)
