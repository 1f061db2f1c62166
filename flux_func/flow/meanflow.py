"""MeanFlow: a model of mean velocities, which samples in one step or a few (Geng et al. 2025, arXiv:2505.13447).

u(x_t, r, t) = 1 / (t - r) times the integral of dx/ds from r to t, so x_r = x_t - (t - r) u in one step, and

    u = dx_t/dt - (t - r) du/dt,  du/dt = u_x dx_t/dt + u_t, along the path

The right side, one jvp of the model in the direction (dx_t/dt, 0, 1) of (x, r, t), is what the left is trained towards.
The second time goes in as t - r through `guidance_in`: cfg.guidance_embed is True, and no key is added to the tree.

    grads = torch.func.grad(lambda params: meanflow.loss(params, cfg, batch, r).mean())(params)
    latents = meanflow.sample(params, cfg, noise=noise, txt=txt, y=y, steps=1)

batch is that of `path.loss`, without guidance. `from_flow_matching` and `slow` are where training begins, `times` draws
t and r; docs/meanflow.py has it all together.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flux_func import tree
from flux_func.flow import losses, path, sampler, timesteps
from flux_func.flow.losses import Batch
from flux_func.models import flux, layers
from flux_func.models.layers import Ops, Params


def loss(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    r: Tensor,
    ops: Ops = Ops(),
    *,
    velocity: Tensor | None = None,
    power: float = 1.0,
    floor: float = 1e-3,
) -> Tensor:
    """Returns each sample's loss, [B]. Where r is t it is flow matching, as the paper has it for three samples of four.

    Args:
      params, cfg, ops: as for `path.loss`, with cfg.guidance_embed.
      batch: as for `path.loss`, without guidance.
      r: the earlier times [B], in [0, t].
      velocity: dx_t/dt [B, 16, h, w], such as `guided` for guidance, or a teacher's; None: eps - x_0.
      power, floor: p and c of the weight 1 / (|error|^2 + c)^p, a constant; |.|^2 is the mean over the sample, and a
        power of 0 leaves the squared error.

    Raises:
      ValueError: a model without the embedding, guidance in the batch, or shapes that do not fit.
    """
    wanted = target(params, cfg, batch, r, ops, velocity=velocity)
    error = losses.flow_matching(params, cfg, _told(cfg, batch, r), ops, target=wanted)
    return error / (error.detach() + floor) ** power


def target(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    r: Tensor,
    ops: Ops = Ops(),
    *,
    velocity: Tensor | None = None,
) -> Tensor:
    """Returns dx_t/dt - (t - r) du/dt, [B, 16, h, w], a constant; arguments as for `loss`.

    A trainer that takes gradients otherwise than by torch.func computes it first, only for the samples whose r is not
    t if it likes (the others' is dx_t/dt), and gives it to `losses.flow_matching` with t - r as the guidance.
    """
    carry, const, moving = losses.inputs(cfg, _told(cfg, batch, r), velocity, "velocity")
    still = losses.constant(params)

    def model(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return losses.run(still, cfg, {**carry, "img": x, "timesteps": t, "guidance": t - r}, const, ops)

    return losses.latents(target_of(model, carry["img"], r, carry["timesteps"], moving), batch)


def target_of(
    u: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, r: Tensor, t: Tensor, velocity: Tensor
) -> Tensor:
    """Returns the MeanFlow target of any u(x, r, t), shaped as x, a constant; x [B, ...], r and t [B]."""
    primals = (x, r.to(t.dtype), t)
    _, rate = torch.func.jvp(u, primals, (velocity.to(x.dtype), torch.zeros_like(primals[1]), torch.ones_like(t)))
    return (velocity - path.column(t - r, rate) * rate).detach()


def guided(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    omega: Tensor | float,
    kappa: Tensor | float = 0.0,
    ops: Ops = Ops(),
    *,
    uncond_txt: Tensor,
    uncond_y: Tensor,
) -> Tensor:
    """Returns a guided velocity for `loss` to learn the mean of, [B, 16, h, w], a constant.

    omega (eps - x_0) + kappa u_c + (1 - omega - kappa) u_u, u being the model's own velocity (r = t) with the prompt
    and without. The model then draws, in one pass a step, as if guided by a scale of omega / (1 - kappa).

    Args:
      params, cfg, ops: as for `loss`.
      batch: as for `path.loss`, without guidance.
      omega, kappa: a number or [B]. Samples whose prompt was dropped need 1 and 0.
      uncond_txt, uncond_y: as for `losses.guided_velocity`.

    Raises:
      ValueError: as `loss`.
    """
    path.check_batch(batch)
    told = _told(cfg, batch, batch["timesteps"])
    uncond, cond = losses.with_and_without(losses.constant(params), cfg, told, uncond_txt, uncond_y, ops).chunk(2)
    true = flux.patchify(path.target(batch["latents"], batch["noise"]))
    omega, kappa = path.column(omega, true, "omega"), path.column(kappa, true, "kappa")
    return losses.latents(omega * true + kappa * cond + (1 - omega - kappa) * uncond, batch).detach()


def sample(
    params: Params,
    cfg: flux.FluxConfig,
    *,
    noise: Tensor,
    txt: Tensor,
    y: Tensor,
    steps: int = 1,
    ops: Ops = Ops(),
) -> Tensor:
    """Returns latents [B, 16, h, w] drawn by a model of mean velocities in a few steps, in the noise's type.

    It is `sampler.sample` without shift and with a guidance of 1 / steps, which is t - r: any sampler of FLUX does it.

    Args:
      params, cfg, ops: as for `loss`.
      noise: standard normal [B, 16, h, w], h and w even.
      txt: [B or 1, L, context_in_dim].
      y: [B or 1, vec_in_dim].
      steps: of equal length, at least 1.

    Raises:
      ValueError: a model without guidance embedding, steps below 1, or shapes that do not fit.
    """
    _check_told(cfg)
    given = {"noise": noise, "txt": txt, "y": y, "steps": steps, "ops": ops}
    return sampler.sample(params, cfg, guidance=1 / max(steps, 1), shift=False, **given)


def from_flow_matching(params: Params, cfg: flux.FluxConfig, seed: int = 0) -> tuple[Params, flux.FluxConfig]:
    """Returns (params, cfg) of a model to train for mean velocities that begins as a flow-matching one.

    It has a fresh `guidance_in` whose last layer is zero, so whatever interval it is told of, it does what it did.

    Args:
      params, cfg: of the flow-matching model, without guidance embedding. Its leaves are the new tree's too: an
        optimizer, which is donated them, is to be given clones.
      seed: of the counted draws.

    Raises:
      ValueError: a model with the embedding, which reads a guidance there, or parameters of another model.
    """
    if cfg.guidance_embed:
        raise ValueError("guidance_embed is True, it should be False: t - r goes in where this model reads a guidance")
    flux.check_params(params, cfg)
    cfg = dataclasses.replace(cfg, guidance_embed=True)
    draw, like = flux.drawing(cfg, seed, "pretrain"), params["time_in"]["in_layer"]["weight"]
    declared = tree.flatten({"guidance_in": flux.declare(cfg)["guidance_in"]})
    fresh = {name: draw(name, 0, leaf.shape[0]).to(like) for name, leaf in declared.items()}
    fresh["guidance_in.out_layer.weight"].zero_()
    return {**params, **tree.unflatten(fresh)}, cfg


def times(
    u: Tensor, moving: int, ends: int = 0, mean: float = -0.4, std: float = 1.0, near: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Returns the times (t, r) of a batch, each [B], in the type of u: t logit-normal, r uniform in [0, t] or else t.

    The paper draws both logit-normal and takes the later one as t, for a quarter of the batch, which is `moving`.

    Args:
      u: uniform draws [2, B] in [0, 1).
      moving: samples whose r is not t. They come first, so that `target` can be computed for them alone.
      ends: of those, the first, how many are steps that `sample` takes if it takes one or two: t in (1 - near, 1] and r
        0 or 1/2. All samples begin there, and a logit-normal t seldom does.
      mean, std: of the logit of t.
      near: how close to 1 the ends' t are.

    Raises:
      ValueError: not 0 <= ends <= moving <= B, not 0 <= near < 1/2, or u of another shape.
    """
    if u.ndim != 2 or len(u) != 2:
        raise ValueError(f"u has shape {tuple(u.shape)}, it should be (2, B): a draw for t and one for r")
    if not 0 <= near < 0.5:
        raise ValueError(f"near is {near!r}, it should be in [0, 0.5), so that the ends' t are above their r of 1/2")
    if not 0 <= ends <= moving <= u.shape[1]:
        raise ValueError(f"ends {ends} and moving {moving} should be in order from 0 to the batch, {u.shape[1]}")
    t = timesteps.logit_normal(u[0], mean, std)
    t = torch.cat([1 - near * u[0, :ends], t[ends:]])
    return t, torch.cat([(u[1, :ends] < 0.5) / 2, t[ends:moving] * u[1, ends:moving], t[moving:]]).to(t.dtype)


def slow(params: Params, fastest: float = 10.0) -> Params:
    """Returns the parameters, or gradients, without what reads time features that turn by more than `fastest` rad.

    From t = 0 to 1 FLUX's features turn by up to 1000 rad. A trained model makes next to nothing of the fast ones, but
    du/dt multiplies what it does make of them by so much: it drowns (Lu and Song 2024, arXiv:2410.11081, on consistency
    models). So their weights are zeroed before training, and their gradients in each step.

    Args:
      params: a tree shaped as the parameters of a model with guidance embedding.
      fastest: in rad per unit of t.

    Returns:
      A tree alike, with zeros in columns of `time_in.in_layer.weight` and of `guidance_in.in_layer.weight`; all other
      leaves are the same tensors.

    Raises:
      ValueError: parameters without guidance embedding.
    """
    if "guidance_in" not in params:
        raise ValueError("params have no guidance_in, where MeanFlow's second time goes in: see from_flow_matching")
    out = dict(params)
    for name in ("time_in", "guidance_in"):
        layer = params[name]["in_layer"]
        # Features at 0 that change along t are sines, of slope omega; each stands beside its cosine.
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        embed = functools.partial(layers.timestep_embedding, dim=layer["weight"].shape[1])
        half = layer["weight"].shape[1] // 2
        speed = torch.func.jvp(embed, (zero,), (one,))[1][0, half:].repeat(2)
        kept = (speed <= fastest).to(layer["weight"])
        out[name] = {**params[name], "in_layer": {**layer, "weight": layer["weight"] * kept}}
    return out


def _told(cfg: flux.FluxConfig, batch: Batch, r: Tensor) -> dict[str, Tensor]:
    """Returns the batch with t - r where guidance goes in."""
    _check_told(cfg)
    path.check_batch(batch)
    if "guidance" in batch:
        raise ValueError("MeanFlow's batch has guidance, it should have none: t - r goes in there")
    losses.check_times(r, batch, "r")
    return {**batch, "guidance": batch["timesteps"] - r}


def _check_told(cfg: flux.FluxConfig) -> None:
    if not cfg.guidance_embed:
        raise ValueError(
            "guidance_embed is False, it should be True: MeanFlow's second time goes in through guidance_in"
        )
