"""Timesteps: from counted uniform draws in training, and as a schedule in sampling. t = 1 is noise, t = 0 the image."""

import math

import torch
from torch import Tensor

# mu of the shift at two image lengths, in tokens; linear between them and beyond (FLUX's own choice).
SHIFT_TOKENS = (256, 4096)
SHIFT_MU = (0.5, 1.15)


def uniform(u: Tensor) -> Tensor:
    """Returns t = u, as FLUX is trained by torchtitan; u [B] in [0, 1)."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Returns t whose logit is normal (Esser et al. 2024, arXiv:2403.03206), by its quantile function.

    Args:
      u: uniform draws [B] in [0, 1), float32 or float64.
      mean, std: of the logit.

    Returns:
      t [B] in the type of u, strictly between 0 and 1.

    Raises:
      ValueError: a std that is not above 0.
    """
    _check_std(std)
    info = torch.finfo(u.dtype)
    below_one = 1 - info.eps / 2
    # The quantiles of 0 and 1 are infinite: the first cell of the draws' grid is taken at its middle.
    logit = mean + std * torch.special.ndtri(u.clamp(info.eps / 4, below_one))
    return logit.sigmoid().clamp(info.tiny, below_one)


def logit_normal_density(t: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Returns the density of `logit_normal` at t in [0, 1], shaped as t (Esser et al. 2024, equation 19).

    Raises:
      ValueError: a std that is not above 0.
    """
    _check_std(std)
    eps = torch.finfo(t.dtype).eps
    t = t.clamp(eps, 1 - eps)
    normal = torch.exp(-0.5 * ((torch.logit(t) - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    return normal / (t * (1 - t))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """Returns timesteps with heavy tails from uniform draws (Esser et al. 2024, arXiv:2403.03206, equation 20).

    t = 1 - u - scale (cos(pi u / 2)^2 - 1 + u), in the type of u: with a positive scale the middle is drawn more often
    than the ends, with a negative one less.

    Args:
      u: in [0, 1], of any shape.
      scale: from -1 to 2 / (pi - 2) = 1.75, where t is monotonic in u; 0 is uniform.

    Raises:
      ValueError: another scale.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale {scale} should be from -1 to 2 / (pi - 2) = {2 / (math.pi - 2):.4f}")
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def mode_density(t: Tensor, scale: float = 1.29) -> Tensor:
    """Returns the density of `mode`'s timesteps at t in [0, 1], shaped as t: one over |dt/du| where mode(u) = t.

    Raises:
      ValueError: a scale that `mode` does not take.
    """
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(torch.finfo(t.dtype).bits):
        middle = (low + high) / 2
        above = mode(middle, scale) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    u = (low + high) / 2
    for _ in range(2):  # Newton's steps, for the derivatives in t: halving an interval has none
        u = u + (mode(u, scale) - t) / _mode_slope(u, scale).clamp_min(torch.finfo(t.dtype).tiny)
    return 1 / _mode_slope(u, scale)


def _mode_slope(u: Tensor, scale: float) -> Tensor:
    """Returns -dt/du of `mode`, which is at least 0."""
    return 1 + scale - scale * math.pi / 2 * torch.sin(math.pi * u)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std {std} should be above 0")


def stratified(u: Tensor, index: Tensor | int, batch_size: int) -> Tensor:
    """Returns t uniform in the index-th of batch_size equal strata of [0, 1], so that a batch covers them all.

    Args:
      u: uniform draws [B] in [0, 1).
      index: each sample's place in the global batch, [B] or one integer, in [0, batch_size). A tensor's numbers are
        not looked at, which could mean to wait for a device.
      batch_size: samples in the global batch.

    Raises:
      ValueError: a batch_size below 1, or an index outside of it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} should be at least 1")
    if not isinstance(index, Tensor) and not 0 <= index < batch_size:
        raise ValueError(f"index {index} should be in [0, {batch_size}), a place in the batch")
    return (index + u) / batch_size


def sample(kind: str, u: Tensor, index: Tensor | int | None = None, batch_size: int | None = None) -> Tensor:
    """Returns training timesteps [B] of a kind: "uniform", "logit_normal", "mode" or "stratified".

    Args:
      kind: the distribution.
      u: uniform draws [B] in [0, 1), one per sample, counted by its position.
      index, batch_size: of `stratified`; the others do not look at them.

    Raises:
      ValueError: no such kind, or no place in a batch where that is read.
    """
    if kind == "uniform":
        return uniform(u)
    if kind == "logit_normal":
        return logit_normal(u)
    if kind == "mode":
        return mode(u)
    if kind == "stratified":
        if index is None or batch_size is None:
            raise ValueError("timesteps 'stratified' need index and batch_size, a sample's place in its batch")
        return stratified(u, index, batch_size)
    raise ValueError(f"timesteps {kind!r} should be 'uniform', 'logit_normal', 'mode' or 'stratified'")


def shift_mu(image_tokens: float) -> float:
    """Returns the shift's mu for an image of this many tokens (2x2 latent patches): 0.5 at 256, 1.15 at 4096."""
    (tokens, last_tokens), (mu, last_mu) = SHIFT_TOKENS, SHIFT_MU
    return mu + (last_mu - mu) * (image_tokens - tokens) / (last_tokens - tokens)


def shift(t: Tensor, mu: Tensor | float) -> Tensor:
    """Returns e^mu / (e^mu + 1/t - 1): timesteps in [0, 1] moved towards noise, the more the larger mu is.

    Written so that 0 stays exactly 0 and 1 exactly 1, with finite derivatives at both.
    """
    down = torch.exp(-mu) if isinstance(mu, Tensor) else math.exp(-mu)
    return t / (t + down * (1 - t))


def schedule(steps: int, image_tokens: float | None) -> Tensor:
    """Returns the sampler's timesteps [steps + 1], float64, from exactly 1 to exactly 0.

    Args:
      steps: Euler steps, at least 1.
      image_tokens: what the resolution-dependent shift goes by; None leaves the steps equal, as schnell is sampled.

    Raises:
      ValueError: steps that are no whole number from 1 on.
    """
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps {steps} should be a whole number from 1 on")
    t = torch.linspace(1, 0, int(steps) + 1, dtype=torch.float64)
    return t if image_tokens is None else shift(t, shift_mu(image_tokens))
