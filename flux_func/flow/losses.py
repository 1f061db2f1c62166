"""Losses beside `path.loss`, to weight and to distil with: pure functions to a number for each sample, [B].

    losses.flow_matching(params, cfg, batch)                    path.loss by sample
    losses.guidance_distillation(student, cfg, batch, teacher=teacher, ...)
    losses.consistency(params, cfg, batch)                      models that jump from any t to 0

`flow/meanflow.py` has the loss of models that jump from any time to any other.

batch is that of `path.loss`; x_t = (1 - t) x_0 + t eps and dx_t/dt = eps - x_0 throughout, t = 1 being noise. A loss is
the mean of squares over a sample's latent elements, so it scales with neither batch nor resolution, in float32 or in
the inputs' type if that is wider. What a model is trained towards is a constant (stop-gradient): each such target is a
function of its own, [B, 16, h, w], so that a trainer which takes gradients otherwise than by torch.func can compute it
first, and give it to `flow_matching`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops, Params, at_least_float32
from flux_func.models.stages import fold

Batch = Mapping[str, Tensor]


def flow_matching(
    params: Params, cfg: flux.FluxConfig, batch: Batch, ops: Ops = Ops(), *, target: Tensor | None = None
) -> Tensor:
    """Returns each sample's mean squared error of the velocity, [B]; their mean is `path.loss`.

    Args:
      params, cfg, batch, ops: as for `path.loss`.
      target: what the model's output should be, [B, 16, h, w]; None: eps - x_0.

    Raises:
      ValueError: shapes that do not fit the model or each other.
    """
    carry, const, wanted = inputs(cfg, batch, target, "target")
    return mean_square(run(params, cfg, carry, const, ops) - wanted)


# Weights of time.


def weighted(
    params: Params, cfg: flux.FluxConfig, batch: Batch, density: Callable[[Tensor], Tensor], ops: Ops = Ops()
) -> Tensor:
    """Returns mean(density(t) * flow_matching), a scalar.

    Under uniform t this is on average the loss of t drawn from the density. Drawing it (`timesteps.sample`), as Esser
    et al. 2024 (arXiv:2403.03206) do, spends computation where the density is, and its gradients vary less; weighting
    serves where t is drawn once for several losses, or stratified.

    Args:
      params, cfg, batch, ops: as for `path.loss`.
      density: t [B] to weights [B], such as `timesteps.logit_normal_density`.

    Raises:
      ValueError: weights of another shape, or shapes that do not fit the model or each other.
    """
    losses = flow_matching(params, cfg, batch, ops)
    weights = density(batch["timesteps"])
    if weights.shape != losses.shape:
        raise ValueError(
            f"density returned {list(weights.shape)}, it should be a weight for each: {list(losses.shape)}"
        )
    return (weights * losses).mean()


# Guidance distillation.


def guided_velocity(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    scale: Tensor | float,
    *,
    uncond_txt: Tensor,
    uncond_y: Tensor,
    ops: Ops = Ops(),
) -> Tensor:
    """Returns v_u + scale (v_c - v_u) of a model at x_t, [B, 16, h, w], from one forward pass of twice the batch.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); a scale of 1 is no guidance.

    Args:
      params, cfg, ops: of the model that is guided.
      batch: as for `path.loss`, with guidance if this model has the embedding.
      scale: one number or [B].
      uncond_txt, uncond_y: the encodings of no prompt, [B or 1, L, context_in_dim] and [B or 1, vec_in_dim].

    Raises:
      ValueError: shapes that do not fit the model or each other.
    """
    v_uncond, v_cond = with_and_without(params, cfg, batch, uncond_txt, uncond_y, ops).chunk(2)
    return latents(v_uncond + path.column(scale, v_cond, "scale") * (v_cond - v_uncond), batch)


def guidance_distillation(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    ops: Ops = Ops(),
    *,
    teacher: Params,
    teacher_cfg: flux.FluxConfig,
    uncond_txt: Tensor,
    uncond_y: Tensor,
) -> Tensor:
    """Returns each sample's loss [B] of a student that is told the scale which its teacher is guided by.

    The student's velocity at guidance w is to be the teacher's, guided by w: two passes become one, as flux-dev was
    made of a guided model (Meng et al. 2023, arXiv:2210.03142, the first stage; their w is this one less 1).

    Args:
      params, cfg: the student's, with a guidance embedding. A copy of the teacher's (updates are made in place), with a
        fresh `guidance_in` of `flux.init`, is a good start.
      batch: as for `path.loss`; guidance [B] is each sample's scale, drawn from where it will be sampled.
      ops: how the student's operations are done, and the teacher's.
      teacher, teacher_cfg: without a guidance embedding, trained with prompt dropout.
      uncond_txt, uncond_y: as for `guided_velocity`.

    Raises:
      ValueError: a student without the embedding, a teacher with it, or shapes that do not fit.
    """
    if not cfg.guidance_embed or teacher_cfg.guidance_embed:
        raise ValueError(
            f"guidance_embed is {cfg.guidance_embed} of the student and {teacher_cfg.guidance_embed} of the teacher, "
            f"it should be True and False"
        )
    path.inputs(cfg, batch)  # What does not fit the student is said before the teacher is run.
    plain = {name: value for name, value in batch.items() if name != "guidance"}
    encodings = {"uncond_txt": uncond_txt, "uncond_y": uncond_y}
    guided = guided_velocity(constant(teacher), teacher_cfg, plain, batch["guidance"], **encodings, ops=ops)
    return flow_matching(params, cfg, batch, ops, target=guided.detach())


# Consistency.


def consistency_target(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    ops: Ops = Ops(),
    *,
    velocity: Tensor | None = None,
    warmup: float = 1.0,
    normalizer: float | None = 0.1,
) -> Tensor:
    """Returns what `consistency` trains the model's output towards, [B, 16, h, w], a constant; see there.

    With F the model, f = x - t F and df/dt = dx/dt - F - t dF/dt, the derivative along the path by one jvp in (x, t).
    The gradient of mean(f . df/dt) / t is that of half the squared distance of F from F + df/dt.
    """
    carry, const, moving = inputs(cfg, batch, velocity, "velocity")
    still = constant(params)

    def model(img: Tensor, t: Tensor) -> Tensor:
        return run(still, cfg, {**carry, "img": img, "timesteps": t}, const, ops)

    t = carry["timesteps"]
    out, rate = torch.func.jvp(model, (carry["img"], t), (moving.to(carry["img"].dtype), torch.ones_like(t)))
    change = moving - out - warmup * path.column(t, out) * rate
    if normalizer is not None:
        change = change / (path.column(mean_square(change).sqrt(), change) + normalizer)
    return latents(out + change, batch).detach()


def consistency(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    ops: Ops = Ops(),
    *,
    velocity: Tensor | None = None,
    warmup: float = 1.0,
    normalizer: float | None = 0.1,
) -> Tensor:
    """Returns each sample's continuous-time consistency loss, [B].

    f(x, t) = x - t F(x, t), whose f(x, 0) is x, is to be the same all along a path (Song et al. 2023,
    arXiv:2303.01469), so that one step of `sample` (steps=1) draws. In continuous time this asks that df/dt be 0; its
    stabilized form is Lu and Song 2024 (sCM, arXiv:2410.11081), here on the straight path in place of theirs on the
    circle.

    Args:
      params, cfg, batch, ops: as for `path.loss`.
      velocity: dx_t/dt [B, 16, h, w]: a teacher's, for distillation, such as its `guided_velocity`; None: eps - x_0,
        for training without one.
      warmup: share in [0, 1] of t dF/dt; from 0, where it is flow matching, to 1 in the first steps.
      normalizer: the c of df/dt / (|df/dt| + c), |.| the root of the mean square over the sample; None leaves df/dt
        as it is.

    Raises:
      ValueError: parameters of another model, or shapes that do not fit the model or each other.
    """
    target = consistency_target(params, cfg, batch, ops, velocity=velocity, warmup=warmup, normalizer=normalizer)
    return flow_matching(params, cfg, batch, ops, target=target)


def discrete_consistency(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    earlier: Tensor,
    ops: Ops = Ops(),
    *,
    average: Params | None = None,
    velocity: Tensor | None = None,
) -> Tensor:
    """Returns each sample's mean squared distance [B] of f at t from f at an earlier time.

    Consistency training, or distillation where a teacher's velocity is given (Song et al. 2023, arXiv:2303.01469);
    `consistency` is its limit of earlier times that approach t.

    Args:
      params, cfg, batch, ops: as for `path.loss`; see `consistency` for f.
      earlier: times s [B] in [0, t], where the Euler step along the velocity from x_t arrives.
      average: of what parameters the earlier f is, such as their moving average; None: these.
      velocity: as for `consistency`.

    Raises:
      ValueError: parameters of another model, or shapes that do not fit the model or each other.
    """
    carry, const, moving = inputs(cfg, batch, velocity, "velocity")
    check_times(earlier, batch, "earlier")
    still = constant(params if average is None else average)
    x, t = carry["img"], carry["timesteps"]
    before = {**carry, "img": x + path.column(earlier - t, x) * moving, "timesteps": earlier}

    def jump(params: Params, carry: dict) -> Tensor:
        return carry["img"] - path.column(carry["timesteps"], x) * run(params, cfg, carry, const, ops)

    return mean_square(jump(params, carry) - jump(still, before).detach())


# What they share.


def inputs(cfg: flux.FluxConfig, batch: Batch, given: Tensor | None, name: str) -> tuple[dict, dict, Tensor]:
    """Returns the chain's first carry and const, and `given` [B, 16, h, w], or else eps - x_0, as patches."""
    carry, const = path.inputs(cfg, batch)
    if given is None:
        return carry, const, const["target"]
    if given.shape != batch["latents"].shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, it should be {tuple(batch['latents'].shape)}")
    return carry, const, flux.patchify(given)


def run(params: Params, cfg: flux.FluxConfig, carry: dict, const: dict, ops: Ops) -> Tensor:
    """Returns the model's output as patches [B, N, C], in float32 or wider."""
    flux.check_params(params, cfg, ops)
    out = fold(flux.chain(cfg), params, carry, const, ops)["img"]
    return out.to(at_least_float32(out.dtype))


def with_and_without(
    params: Params, cfg: flux.FluxConfig, batch: Batch, uncond_txt: Tensor, uncond_y: Tensor, ops: Ops
) -> Tensor:
    """Returns the velocities without and with the prompt, as patches [2 B, N, C]."""
    path.check_batch(batch)
    twice = {name: torch.cat([value, value]) for name, value in batch.items() if name not in ("txt", "y")}
    for name, uncond in (("txt", uncond_txt), ("y", uncond_y)):
        size, *rest = batch[name].shape
        if tuple(uncond.shape) not in ((1, *rest), (size, *rest)):
            should = str((f"1 or {size}", *rest)).replace("'", "")
            raise ValueError(f"uncond_{name} has shape {tuple(uncond.shape)}, it should be {should}")
        twice[name] = torch.cat([uncond.expand(batch[name].shape), batch[name]])
    return run(params, cfg, *path.inputs(cfg, twice), ops)


def check_times(times: Tensor, batch: Batch, name: str) -> None:
    """Raises ValueError where times are not shaped as the batch's timesteps."""
    if (found := getattr(times, "shape", None)) != batch["timesteps"].shape:
        shown = f"is a {type(times).__name__}" if found is None else f"has shape {tuple(found)}"
        raise ValueError(f"{name} {shown}, it should be {tuple(batch['timesteps'].shape)}")


def constant(params: Params) -> Params:
    """Returns the parameters as constants: a target made with them keeps no graph, and so no activations."""
    return tree.map(Tensor.detach, params)


def latents(patches: Tensor, batch: Batch) -> Tensor:
    """Returns patches as latents shaped as the batch's."""
    return flux.unpatchify(patches, *batch["latents"].shape[2:])


def mean_square(error: Tensor) -> Tensor:
    """Returns each sample's mean of squares, [B]."""
    return error.square().flatten(1).mean(dim=1)
