"""The probability-flow ODE of a rectified flow: log densities, and maps from data to noise and back.

A velocity is any function `(x, t) -> dx/dt`, x [B, ...], t a scalar tensor and dx/dt shaped as x, that treats the
samples of a batch apart; `flow.sampler.velocity` is FLUX's, whose densities are of latents (with guidance, of what the
guided flow samples). Along x_t = (1 - t) x_0 + t eps (Albergo & Vanden-Eijnden 2022, arXiv:2209.15571; Lipman et
al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003) the mean of eps - x_0 given x_t, which FLUX learns, moves
the density p_0 of the data at t = 0 to the standard normal p_1 at t = 1. So the ODE gives every x a density, by

  log p_0(x_0) = log p_1(x_1) + integral over t from 0 to 1 of div v(x_t, t)

(Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2018, arXiv:1810.01367; Song et al. 2020, arXiv:2011.13456).

A schedule is times [steps + 1] from noise to data, as `flow.timesteps.schedule` gives them and `flow.sampler.euler`
takes them; what goes from data to noise goes along it backwards. What to know of its ends:

- The density is that of the ODE as it is solved. A model never sees t = 0 exactly in training. Where the data have no
  density (they are discrete, or on a manifold) the true velocity's divergence grows there as 1 / t for each dimension
  lacking, log p has no bound as the model gets better, and what a solver says depends on its last steps. Give such data
  noise first (uniform, of the width of a level), or let the schedule end at a small t: the density is then that of x_t,
  noisy data, and x is to be such.
- At t = 1 the flow has no singularity, and the density is the standard normal's: there the schedule must start.
- `decode` undoes `encode` up to the solver's error, not to the bit.

All is differentiable in x and in what the velocity depends on, through the solver's own steps, whose graphs are kept.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flux_func import random
from flux_func.flow.sampler import Velocity
from flux_func.models.layers import at_least_float32
from flux_func.transforms import checks

# (x, t) to the derivatives of all parts of the state, of which x is the first.
Field = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

# Explicit Runge-Kutta methods: of each stage after the first what it takes of the stages before, per step; and the
# weights of all stages in the step. A stage's time is the sum of what it takes.
METHODS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": ((), (1,)),
    "midpoint": (((1 / 2,),), (0, 1)),
    "heun": (((1,),), (1 / 2, 1 / 2)),
    "rk4": (((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
# Of the basis that an exact divergence takes derivatives along at a time.
DIRECTIONS_AT_ONCE = 64


def encode(velocity: Velocity, x: Tensor, schedule: Tensor, method: str = "rk4") -> Tensor:
    """Returns the noise that x comes from: the state at schedule[0], given x at schedule[-1].

    Decoded with another prompt's velocity, the noise becomes an edit of the image (as DDIM inversion does: Song et al.
    2020, arXiv:2010.02502), the closer to it the less of the schedule both go along: `schedule[5:]` in place of all.

    Args:
      velocity: see the module.
      x: data [B, ...].
      schedule: times [steps + 1] from noise to data.
      method: "rk4" (4 evaluations of the velocity a step, errors of the order of step^4), "heun" or "midpoint"
        (2 and step^2), or "euler" (1 and step). On a smooth velocity the first is the most exact for the same number
        of evaluations.

    Returns:
      Shaped as x and in its type; the steps are added up in float32 at least.

    Raises:
      ValueError: no such method, a schedule that does not descend, or a velocity of another shape than x.
    """
    return _map(velocity, x, _checked(schedule).flip(0), method)


def decode(velocity: Velocity, noise: Tensor, schedule: Tensor, method: str = "rk4") -> Tensor:
    """Returns the data that noise becomes: the state at schedule[-1], given noise at schedule[0]; see `encode`.

    With "euler" it is the sampler.
    """
    return _map(velocity, noise, _checked(schedule), method)


def log_prob(velocity: Velocity, x: Tensor, schedule: Tensor, *, probes: Tensor | None, method: str = "rk4") -> Tensor:
    """Returns log p(x) [B] in nats, of x as it is: the density of the whole sample in the units of x.

    Args:
      velocity: see the module. It must have forward mode and vmap.
      x: data [B, ...], at schedule[-1].
      schedule: times [steps + 1] from 1 to 0, or to the t > 0 of x.
      probes: random directions z [K, B, ...] of mean zero and unit covariance, such as `signs`: the divergence is then
        the mean of z . (dv/dx) z (Hutchinson 1990), for the same z at all times, so that log p is unbiased up to the
        solver's error. None: it is exact, by as many derivatives as x has dimensions.
      method: as for `encode`.

    Returns:
      In float32, or the type of x if wider.

    Raises:
      ValueError: as `encode`, a schedule that does not start at 1, or probes of another shape.
    """
    if _checked(schedule)[0] != 1:
        raise ValueError(f"schedule starts at {schedule[0].item():g}, it should start at 1, the standard normal's time")
    if probes is not None and not isinstance(probes, Tensor):
        raise ValueError(f"probes are {probes!r}: should be a tensor, such as likelihood.signs gives, or None")
    if probes is not None and (probes.shape[1:] != x.shape or not len(probes)):
        raise ValueError(f"probes have shape {tuple(probes.shape)}, they should be {('K', *x.shape)}")
    x = x.to(at_least_float32(x.dtype))
    field = _with_divergence(_same_shape(velocity), None if probes is None else probes.to(x))
    noise, gained = _solve(field, (x, x.new_zeros(len(x))), schedule.flip(0), method)
    dimensions = x[0].numel()
    return gained - (_sums(noise.square()) + dimensions * math.log(2 * math.pi)) / 2


def signs(seed: int, count: int, like: Tensor, position: int = 0) -> Tensor:
    """Returns probes for `log_prob`, +1 and -1 alike, [count, *like.shape] in the type of `like` [B, ...].

    Those of sample b are a pure function of (seed, position + b), so a data set's likelihoods do not depend on how it
    is cut into batches.
    """

    def draw(probe: int, sample: int) -> np.ndarray:
        rng = random.generator(seed, "hutchinson", position + sample, probe)
        return rng.integers(0, 2, tuple(like.shape[1:]), np.int8)

    drawn = np.array([[draw(probe, sample) for sample in range(len(like))] for probe in range(count)])
    return torch.from_numpy(2 * drawn - 1).to(like)


def bits_per_dimension(log_p: Tensor, dimensions: int, bin_width: float = 1.0) -> Tensor:
    """Returns -log2(p(x) bin_width^dimensions) / dimensions, shaped as log_p.

    With a bin width of 1 it is the density's own figure, in the units of x: that of data c times as large is log2(c)
    more. For what the literature states of 8-bit images, bits per channel of a pixel with levels 0 to 255, x must be
    dequantized (uniform noise in [0, 1) added to the level) and bin_width be one level in the units of x: 1 / 127.5 for
    x = level / 127.5 - 1, as images are here, 1 / 256 for x = level / 256, 1 for x = level. It is then, in the mean, an
    upper bound of the bits that a lossless code of the levels takes by this model (Theis et al. 2015,
    arXiv:1511.01844). Latents have no levels: of them the figure compares models of one autoencoder, and is not the
    bits of an image.

    Args:
      log_p: log densities in nats, [B] as `log_prob` gives them.
      dimensions: of one sample, `x[0].numel()`.
      bin_width: in the units of x.
    """
    return -(log_p / dimensions + math.log(bin_width)) / math.log(2)


# The solver.


def _map(velocity: Velocity, x: Tensor, times: Tensor, method: str) -> Tensor:
    velocity = _same_shape(velocity)
    (out,) = _solve(lambda x, t: (velocity(x, t),), (x.to(at_least_float32(x.dtype)),), times, method)
    return out.to(x.dtype)


def _solve(field: Field, state: tuple[Tensor, ...], times: Tensor, method: str) -> tuple[Tensor, ...]:
    """Returns the state at times[-1], given that at times[0]: one step of the method between neighbours."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} should be one of {', '.join(map(repr, METHODS))}")
    stages, weights = METHODS[method]
    for t, after in pairwise(times):
        step = after - t
        slopes = [field(state[0], t)]
        for taken in stages:
            (x, *_) = _advanced(state[:1], step, taken, slopes)
            slopes.append(field(x, t + sum(taken) * step))
        state = _advanced(state, step, weights, slopes)
    return state


def _advanced(
    state: tuple[Tensor, ...], step: Tensor, weights: tuple[float, ...], slopes: list[tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    used = [(weight, slope) for weight, slope in zip(weights, slopes, strict=True) if weight]
    return tuple(part + step * sum(weight * slope[i] for weight, slope in used) for i, part in enumerate(state))


def _with_divergence(velocity: Velocity, probes: Tensor | None) -> Field:
    """Returns the field of x and of the divergence's integral: (v [B, ...], div v [B])."""

    def field(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            v, moved = torch.func.jvp(lambda x: velocity(x, t), (x,), (direction,))
            return v, _sums(direction * moved)

        parts = _basis(x) if probes is None else probes.split(DIRECTIONS_AT_ONCE)
        # The velocity does not depend on the direction: vmap computes it once, and repeats it without memory.
        found = [torch.func.vmap(along)(part) for part in parts]
        total = sum(each.sum(0) for _, each in found)
        return found[0][0][0], total if probes is None else total / len(probes)

    return field


def _basis(x: Tensor) -> Iterator[Tensor]:
    """Yields the unit vectors of a sample's space, for all samples alike, [at most DIRECTIONS_AT_ONCE, B, ...]."""
    dimensions = x[0].numel()
    for part in torch.arange(dimensions, device=x.device).split(DIRECTIONS_AT_ONCE):
        units = torch.nn.functional.one_hot(part, dimensions).to(x)
        yield units.reshape(len(part), 1, *x.shape[1:]).expand(len(part), *x.shape)


def _sums(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).sum(1)


def _checked(schedule: Tensor) -> Tensor:
    if not isinstance(schedule, Tensor):
        raise ValueError(f"schedule is {schedule!r}: should be a tensor, such as timesteps.schedule gives")
    if schedule.ndim != 1 or len(schedule) < 2 or not (schedule.diff() < 0).all():
        raise ValueError(f"schedule {schedule.tolist()} should be times [steps + 1] that descend, from noise to data")
    return schedule


def _same_shape(velocity: Velocity) -> Velocity:
    def checked(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            raise ValueError(f"{checks.returned(velocity, v)}, it should be shaped as x, {list(x.shape)}")
        return v

    return checked
