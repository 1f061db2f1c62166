"""Attribution: what in the prompt, the image and the training data a model's output comes from.

    marks = attribution.token_saliency(params, cfg, batch)                               # {"txt": [B, L], ...}
    velocity, change = attribution.prompt_sensitivity(params, cfg, batch, {"txt": other - batch["txt"]})
    losses = lambda params, samples: flow.losses.flow_matching(params, cfg, samples)
    shares = attribution.influence(losses, [params], [lr], samples, query)               # [B]
    maps = attribution.attention_maps(params, cfg, batch, "double_blocks.1")            # {"img": {"txt": [B, H, N, L]}}

`saliency`, `sensitivity`, `gradient_products` and `influence` are of any function; the others are FLUX's, and take the
batch of `path.loss`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops, Params, at_least_float32
from flux_func.models.stages import Stage, fold
from flux_func.transforms import checks

Batch = Mapping[str, Tensor]


# Of inputs, by reverse mode.


def saliency(
    fn: Callable[[tree.Tree], tree.Tree],
    inputs: tree.Tree,
    cotangent: tree.Tree | None = None,
    times_input: bool = False,
) -> tree.Tree:
    """Returns how much each token of the inputs moves a function's output, from one vjp.

    Args:
      fn: `inputs -> output`.
      inputs: a tree of tensors [..., C], C being what makes up one token.
      cotangent: shaped as the output: the weights of its elements, whose weighted sum is attributed; such as ones on
        some patches and zeros elsewhere. None: the output is a scalar.
      times_input: False gives the norm of each token's gradient (Simonyan et al. 2013, arXiv:1312.6034), True its
        inner product with the token, signed: to first order, what the output would lose were the token zero
        (Shrikumar et al. 2017, arXiv:1704.02685).

    Returns:
      A tree like the inputs, [...] for each [..., C].

    Raises:
      ValueError: an output that is no scalar, without a cotangent; or a cotangent shaped otherwise than the output.
    """
    out, pull = torch.func.vjp(fn, inputs)
    (grads,) = pull(_weights(fn, out, cotangent))
    if times_input:
        return tree.map(lambda grad, value: (grad * value).sum(dim=-1), grads, inputs)
    return tree.map(lambda grad: torch.linalg.vector_norm(grad, dim=-1), grads)


def token_saliency(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Batch,
    ops: Ops = Ops(),
    *,
    region: Tensor | None = None,
    times_input: bool = False,
) -> dict[str, Tensor]:
    """Returns how much each prompt token and each image patch moves the loss of its own sample, or a part of the image.

    Args:
      params, cfg, batch, ops: as for `path.loss`.
      region: weights of the velocity's elements [B, 16, h, w], whose weighted sum is attributed, such as the velocity
        itself in one half of the image and zero in the other; None: each sample's squared error is.
      times_input: as for `saliency`.

    Returns:
      {"txt": [B, L], "img": [B, N], "y": [B]}, N = h * w / 4 patches in rows.

    Raises:
      ValueError: parameters of another model, or shapes that do not fit.
    """
    flux.check_params(params, cfg, ops)
    carry, const = path.inputs(cfg, batch)
    chosen = {name: carry[name] for name in ("txt", "img", "y")}

    def velocity(chosen: dict[str, Tensor]) -> Tensor:
        out = fold(flux.chain(cfg), params, {**carry, **chosen}, const, ops)["img"]
        return out.to(at_least_float32(out.dtype))

    if region is not None:
        if region.shape != (shape := batch["latents"].shape):
            raise ValueError(f"region is {list(region.shape)}: should be {list(shape)}, as the latents")
        return saliency(velocity, chosen, flux.patchify(region), times_input)
    return saliency(lambda chosen: (velocity(chosen) - const["target"]).square().sum(), chosen, None, times_input)


# Of inputs, by forward mode.


def sensitivity(
    fn: Callable[[tree.Tree], tree.Tree], inputs: tree.Tree, direction: tree.Tree
) -> tuple[tree.Tree, tree.Tree]:
    """Returns (fn(inputs), its derivative along a direction), both shaped as the output, from one jvp.

    Args:
      fn: `inputs -> output`.
      inputs: a tree of tensors.
      direction: a tree like the inputs; it is taken in their types.

    Raises:
      ValueError: a direction that does not fit.
    """
    return torch.func.jvp(fn, (inputs,), (checks.like(direction, inputs, "direction does not fit"),))


def prompt_sensitivity(
    params: Params, cfg: flux.FluxConfig, batch: Batch, direction: Mapping[str, Tensor], ops: Ops = Ops()
) -> tuple[Tensor, Tensor]:
    """Returns (velocity, its change along a prompt direction), [B, 16, h, w] each.

    Args:
      params, cfg, batch, ops: as for `path.loss`.
      direction: of "txt" [B, L, context_in_dim], "y" [B, vec_in_dim] or both: such as another prompt's encoding less
        this one's; the change is then the first order of going there.

    Raises:
      ValueError: a direction of something else, or that does not fit; parameters of another model.
    """
    flux.check_params(params, cfg, ops)
    carry, const = path.inputs(cfg, batch)
    if not direction or set(direction) - {"txt", "y"}:
        raise ValueError(f"direction is of {sorted(direction)}, it should be of 'txt', 'y' or both")

    def velocity(prompt: dict[str, Tensor]) -> Tensor:
        out = fold(flux.chain(cfg), params, {**carry, **prompt}, const, ops)["img"]
        return flux.unpatchify(out, *batch["latents"].shape[2:])

    return sensitivity(velocity, {name: carry[name] for name in direction}, dict(direction))


# Of training samples.


def gradient_products(
    losses: Callable[[tree.Tree, Batch], Tensor],
    params: tree.Tree,
    direction: tree.Tree,
    samples: Batch,
    chunk: int | None = None,
) -> Tensor:
    """Returns the inner product of each sample's gradient with a direction in parameter space, [B].

    One forward-mode pass over the samples: no gradient of any sample is ever held, nor any activation kept.

    Args:
      losses: `(params, samples) -> [B]`, each sample's loss, such as `flow.losses.flow_matching`.
      params: where the gradients are taken.
      direction: a tree like the parameters; it is taken in their types.
      samples: {name: [B, ...]}.
      chunk: samples at a time; None: all. Memory grows with it.

    Raises:
      ValueError: a direction that does not fit, no samples or a chunk below 1, or losses that are not one for each.
    """
    direction, products = checks.like(direction, params, "direction does not fit"), []
    for part in checks.chunks(samples, chunk, "samples"):
        out, along = torch.func.jvp(lambda params, part=part: losses(params, part), (params,), (direction,))
        _check_each(losses, out, checks.samples(part))
        products.append(along)
    return torch.cat(products)


def influence(
    losses: Callable[[tree.Tree, Batch], Tensor],
    checkpoints: Sequence[tree.Tree],
    rates: Sequence[float],
    samples: Batch,
    query: Batch,
    chunk: int | None = None,
) -> Tensor:
    """Returns the influence of each training sample on the loss of a query, [B].

    The sum over checkpoints of rate * (sample's gradient . query's gradient): to first order, by how much the query's
    loss fell when the run trained on the sample (TracInCP, Pruthi et al. 2020, arXiv:2002.08484). Positive samples
    helped, negative ones harmed. For a part of the parameters, such as the last layer, give `losses` of that part
    (`weights.partition`).

    Args:
      losses: `(params, samples) -> [B]`, each sample's loss.
      checkpoints: parameters along a run.
      rates: the learning rate at each, times how often a sample was seen since the one before.
      samples: the training samples, {name: [B, ...]}.
      query: {name: [Q, ...]}; its loss is the mean of the Q.
      chunk: samples at a time; None: all.

    Raises:
      ValueError: no checkpoints, another number of rates, or as `gradient_products`, of the samples or the query.
    """
    if not checkpoints or len(rates) != len(checkpoints):
        raise ValueError(f"{len(rates)} rates for {len(checkpoints)} checkpoints, there should be one for each")
    size = checks.samples(query, "query")

    def asked(params: tree.Tree) -> Tensor:
        out = losses(params, query)
        _check_each(losses, out, size)
        return out.mean()

    parts = (
        rate * gradient_products(losses, params, torch.func.grad(asked)(params), samples, chunk)
        for params, rate in zip(checkpoints, rates, strict=True)
    )
    return sum(parts)


# Of attention.


def with_attention(stage: Stage) -> Stage:
    """Returns the stage with its attention in the carry it returns: "attention" [B, H, L, L], rows adding up to 1.

    softmax(q k^T / sqrt(D)), queries in rows, in float32 or wider; all tokens by all, so L^2 of memory. It is a value
    of the stage like any other: it can be differentiated, and comes out of whatever `Ops.wrap_stage` puts around.
    """

    def fn(params: Params, carry: dict, const: dict, ops: Ops) -> dict:
        seen = []

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            wide = at_least_float32(q.dtype)
            scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
            seen.append(scores.softmax(dim=-1))
            return ops.attention(q, k, v)

        out = stage.fn(params, carry, const, ops=dataclasses.replace(ops, attention=attention))
        return {**out, "attention": seen[0]}

    return dataclasses.replace(stage, fn=fn)


def attention_maps(
    params: Params, cfg: flux.FluxConfig, batch: Batch, stage: str, ops: Ops = Ops()
) -> dict[str, dict[str, Tensor]]:
    """Returns a block's attention as values: maps[queries][keys], both "txt" or "img".

    Args:
      params, cfg, batch, ops: as for `path.loss`. Stages after the one asked are not computed.
      stage: a block's name, such as "double_blocks.0" or "single_blocks.3".

    Returns:
      maps["txt"]["txt"] [B, H, L, L], maps["txt"]["img"] [B, H, L, N], maps["img"]["txt"] [B, H, N, L] and
      maps["img"]["img"] [B, H, N, N]: L prompt tokens, N = h * w / 4 patches in rows. A query's shares of all keys,
      text and image, add up to 1.

    Raises:
      ValueError: a stage that has no attention or does not exist, parameters of another model, or shapes that do not
        fit.
    """
    flux.check_params(params, cfg, ops)
    carry, const = path.inputs(cfg, batch)
    stages = flux.chain(cfg)
    places = {found.name: place for place, found in enumerate(stages) if found.index is not None}
    if stage not in places:
        raise ValueError(f"stage {stage!r} has no attention, it should be one of {', '.join(places)}")
    asked = places[stage]
    carry = fold((*stages[:asked], with_attention(stages[asked])), params, carry, const, ops)
    text = const["text_length"]
    rows = dict(zip(("txt", "img"), carry["attention"].tensor_split([text], dim=2), strict=True))
    return {
        queries: dict(zip(("txt", "img"), part.tensor_split([text], dim=3), strict=True))
        for queries, part in rows.items()
    }


# What they share.


def _weights(fn: Callable, out: tree.Tree, cotangent: tree.Tree | None) -> tree.Tree:
    if cotangent is not None:
        return checks.like(cotangent, out, "cotangent does not fit")
    if not isinstance(out, Tensor) or out.ndim:
        raise ValueError(f"{checks.returned(fn, out)}, it should be a scalar where no cotangent is given")
    return torch.ones_like(out)


def _check_each(losses: Callable, out: tree.Tree, size: int) -> None:
    if not isinstance(out, Tensor) or tuple(out.shape) != (size,):
        raise ValueError(f"{checks.returned(losses, out)}, it should be a loss for each sample, [{size}]")
