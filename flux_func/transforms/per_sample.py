"""Losses and gradients of each sample of a batch, and what is made of them.

    loss = per_sample.one(ff.loss, cfg)
    norms, losses = per_sample.norms(loss, params, batch, chunk=4)
    norms, losses = per_sample.ghost_norms(loss, params, batch, chunk=16)

A loss is `loss(params, sample) -> scalar`; a batch is a tree of tensors of which each has the batch, B, as its first
dimension, and a sample is the same tree without it. Samples are taken `chunk` at a time, None: all; that, and not B, is
what the memory grows with. Params are any tree.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from flux_func import random, tree
from flux_func.models.layers import Ops, at_least_float32
from flux_func.transforms import checks, lora
from flux_func.transforms.norms import square_of_product, squared_norms
from flux_func.transforms.weights import is_hole
from flux_func.tree import Tree

Loss = Callable[..., Tensor]
FOR_ONE = " for one sample"


def one(loss: Loss, *static: Any) -> Loss:
    """Returns `loss(params, *static, batch, **kwargs)`, such as ff.loss with its cfg, as a loss of one sample.

    The sample gets its batch dimension back: it is a batch of one.
    """

    def of_sample(params: Tree, sample: Tree, **kwargs: Any) -> Tensor:
        return loss(params, *static, tree.map(lambda x: x[None], sample), **kwargs)

    of_sample.__name__ = checks.name(loss)
    return of_sample


def losses(loss: Loss, params: Tree, batch: Tree, chunk: int | None = None) -> Tensor:
    """Returns the loss of each sample, [B].

    Raises:
      ValueError: a chunk below 1, tensors that differ in B, or a loss that is no scalar. So do all below; and for a
        params without leaves those that differentiate.
    """
    each = torch.func.vmap(checks.scalar(loss, FOR_ONE), in_dims=(None, 0))
    return torch.cat([each(params, part) for part in checks.chunks(batch, chunk)])


def gradients(loss: Loss, params: Tree, batch: Tree, chunk: int | None = None) -> Tree:
    """Returns the gradient of each sample's loss: a tree like params, each leaf with the batch before its shape."""
    parts = each(loss, params, batch, chunk, lambda grads, values: grads)
    return tree.map(lambda *leaves: torch.cat(leaves), *parts)


def norms(loss: Loss, params: Tree, batch: Tree, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the norm of each sample's gradient as one vector, and each sample's loss: both [B], float32 or wider.

    Never more than `chunk` gradients are held.
    """
    found = each(loss, params, batch, chunk, lambda grads, values: (squared_norms(grads).sqrt(), values))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def each(loss: Loss, params: Tree, batch: Tree, chunk: int | None, take: Callable[[Tree, Tensor], Any]) -> Iterator:
    """Yields `take(gradients, losses)` of one chunk after the other, and holds on to none: statistics of one's own.

    Args:
      loss, params, batch, chunk: as for `losses`.
      take: of a tree like params, each leaf with the chunk's samples before its shape, and their losses [samples].
    """
    gradients = torch.func.vmap(torch.func.grad_and_value(checks.scalar(loss, FOR_ONE)), in_dims=(None, 0))
    for part in checks.chunks(batch, chunk):
        yield take(*gradients(checks.filled(params), part))


# Norms without gradients.

# Where a linear's probe is put beside its weight, in trees that no one else sees.
KEY = "ghost"


def ghost_norms(
    loss: Loss, params: Tree, batch: Tree, chunk: int | None = None, ops: Ops = Ops()
) -> tuple[Tensor, Tensor]:
    """Returns what `norms` returns, without the gradients of linears' weights ever being computed or held.

    A linear's weight has the gradient g^T x, x [L, in] and g [L, out] being its input and its output's gradient. Of
    one row its norm is |g| |x| (Goodfellow 2015, arXiv:1510.01799); of several it is sqrt(<x x^T, g g^T>) or that of
    the product, whichever takes less arithmetic (Li et al. 2022, arXiv:2110.05679). The gradients of all other
    parameters, such as the norms' scales or a LoRA's factors, are computed for each sample as they are.

    Args:
      loss: `loss(params, sample, ops=)`, computing its linears, params' nodes with a two-dimensional "weight", each
        once, by `ops.linear`: `one(ff.loss, cfg)` for example. Other linears may be computed by it too.
      params, batch, chunk: as for `norms`.
      ops: how the rest is done; its `linear` may add to the product what does not depend on the weight.

    Raises:
      ValueError: as for `losses`; a linear that was not computed by ops.linear, or more than once; a weight on which
        the first sample's loss depends outside of it too, as by a penalty; or params with `weights.partition`'s holes.
    """
    if any(map(is_hole, optree.tree_leaves(params, is_leaf=is_hole))):
        raise ValueError("params has holes, as weights.partition leaves them: norms should be used, which takes them")
    flat, linears = tree.flatten(checks.filled(params)), lora.linears(params)
    weights = {name: flat[name] for path in linears for name in (f"{path}.weight", f"{path}.bias") if name in flat}
    others = {path: leaf for path, leaf in flat.items() if path not in weights}
    # Zeros, in whose gradient a linear's backward puts (the squared norm of its own, 1).
    probes = {path: leaf.new_zeros(2, dtype=at_least_float32(leaf.dtype)) for path, leaf in linears.items()}
    ghost = dataclasses.replace(ops, linear=_ghost_linear(ops.linear))
    parts, loss = checks.chunks(batch, chunk), checks.scalar(loss, FOR_ONE)
    if weights:
        _check_inside(loss, params, weights, tree.map(lambda x: x[0], batch), ops)

    def probed(probes: Mapping[str, Tensor], others: Mapping[str, Tensor], sample: Tree) -> Tensor:
        return loss(_with_probes(tree.replace(params, others), probes), sample, ops=ghost)

    each = torch.func.vmap(torch.func.grad_and_value(probed, argnums=(0, 1)), in_dims=(None, None, 0))
    found = []
    for part in parts:
        (of_linears, of_others), values = each(probes, others, part)
        _check_counts(of_linears)
        squares = sum(pair[:, 0] for pair in of_linears.values()) + (squared_norms(of_others) if others else 0)
        found.append((squares.sqrt(), values))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _check_inside(loss: Loss, params: Tree, weights: Mapping[str, Tensor], sample: Tree, ops: Ops) -> None:
    """Checks that a loss does not depend on linears' weights where all that ops.linear is given is constant."""

    def linear(params: Tree, x: Tensor, path: str) -> Tensor:
        return ops.linear(tree.map(torch.Tensor.detach, params), x, path)

    leaves = {path: leaf.detach().requires_grad_() for path, leaf in weights.items()}
    with torch.enable_grad():
        value = loss(tree.replace(params, leaves), sample, ops=dataclasses.replace(ops, linear=linear))
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if value.requires_grad else ()
    for path, grad in zip(leaves, found, strict=False):
        # A rematerialized stage gives a gradient of zero to what it does not use.
        if grad is not None and grad.any():
            raise ValueError(f"the loss depends on {path} outside ops.linear: norms should be used, which allows it")


def _check_counts(found: Mapping[str, Tensor]) -> None:
    counts = torch.stack([pair[0, 1] for pair in found.values()]).tolist() if found else []
    for path, count in zip(found, counts, strict=True):
        if count != 1:
            raise ValueError(f"{path} was computed {count:.0f} times by ops.linear: should be once, or norms be used")


def _with_probes(params: Tree, probes: Mapping[str, Tensor]) -> Tree:
    def beside(path: tuple, node: Any) -> Any:
        probe = probes.get(".".join(map(str, path)))
        return node if probe is None else {**node, KEY: probe}

    return optree.tree_map_with_path(beside, params, is_leaf=lambda node: isinstance(node, dict) and "weight" in node)


def _ghost_linear(inner: Callable) -> Callable:
    def linear(params: Tree, x: Tensor, path: str) -> Tensor:
        if KEY not in params:
            return inner(params, x, path)
        layer = {name: leaf for name, leaf in params.items() if name != KEY}
        return _Ghost.apply(inner(layer, x, path), x, params[KEY], "bias" in layer)

    return linear


class _Ghost(torch.autograd.Function):
    """y, a linear's output, as it is; the probe's gradient is (the squared norm of that of weight and bias, 1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, probe: Tensor, bias: bool) -> Tensor:
        del x, probe, bias
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, probe, ctx.bias = inputs
        ctx.save_for_backward(x, probe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, probe = ctx.saved_tensors
        square = square_of_product(*(part.to(probe.dtype).reshape(-1, part.shape[-1]) for part in (grad, x)))
        if ctx.bias:
            square = square + grad.to(probe.dtype).reshape(-1, grad.shape[-1]).sum(0).square().sum()
        return grad, None, torch.stack([square, torch.ones_like(square)]), None


# The gradient noise scale.


class NoiseScale(NamedTuple):
    """Unbiased estimates, scalar tensors; the scale is their quotient and has a bias that shrinks with the batch.

    Attributes:
      grad_square: |G|^2 of the true gradient G; may come out negative where noise drowns it.
      trace: tr(Sigma), the variance of one sample's gradient, summed over the parameters.
      scale: tr(Sigma) / |G|^2, in samples: the batch size beyond which more samples bring little.
    """

    grad_square: Tensor
    trace: Tensor
    scale: Tensor


def noise_scale(loss: Loss, params: Tree, batch: Tree, chunk: int | None = None) -> NoiseScale:
    """Returns the simple noise scale (McCandlish et al. 2018, arXiv:1812.06162), from batches of 1 and of B >= 2.

    A batch much smaller than the scale leaves |G|^2 in noise, of either sign, and the scale without meaning: then more
    samples are needed, or the mean of grad_square and of trace over many batches before they are divided.
    """

    def take(grads: Tree, values: Tensor) -> tuple[Tree, Tensor]:
        return tree.map(lambda leaf: leaf.sum(0, dtype=at_least_float32(leaf.dtype)), grads), squared_norms(grads)

    total, squares = _sum(each(loss, params, batch, chunk, take))
    mean = tree.map(lambda leaf: leaf[None] / len(squares), total)
    return noise_scale_from(1, squares.mean(), len(squares), squared_norms(mean)[0])


def noise_scale_from(small: int, small_square: Tensor, big: int, big_square: Tensor) -> NoiseScale:
    """Returns the noise scale from the squared norms of gradients averaged over two sizes of batch.

    Args:
      small, big: samples in a small batch (a micro-batch, or a rank's) and in a big one.
      small_square, big_square: |g|^2 of them, each averaged over as many batches as there are.

    Raises:
      ValueError: sizes that do not differ.
    """
    if not 1 <= small < big:
        raise ValueError(f"batches of {small} and {big} samples: the second should have more than the first")
    grad_square = (big * big_square - small * small_square) / (big - small)
    trace = (small_square - big_square) / (1 / small - 1 / big)
    return NoiseScale(grad_square, trace, trace / grad_square)


# Statistics over the timestep.


def by_timestep(timesteps: Tensor, values: Mapping[str, Tensor], bins: int = 10) -> dict[str, Any]:
    """Returns how per-sample values are distributed over the timestep, in bins of equal width in [0, 1].

        norms, losses = per_sample.norms(loss, params, batch, chunk=4)
        per_sample.by_timestep(batch["timesteps"], {"loss": losses, "grad_norm": norms})

    Args:
      timesteps: [B], in [0, 1].
      values: {name: [B]}.
      bins: their number, from 1 on.

    Returns:
      "edges" [bins + 1], "centres" [bins], "count" [bins] and, for each name, {"mean", "std": [bins]}: NaN where a bin
      is empty. The standard deviation is that of the samples there are (dividing by the count).

    Raises:
      ValueError: timesteps outside [0, 1], values of another length, or no bins.
    """
    checks.count("bins", bins)
    if timesteps.ndim != 1 or not bool(((timesteps >= 0) & (timesteps <= 1)).all()):
        raise ValueError(f"timesteps {list(timesteps.shape)} should be [B] in [0, 1]")
    place = (timesteps * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    edges = torch.linspace(0, 1, bins + 1).to(timesteps)
    found: dict[str, Any] = {"edges": edges, "centres": (edges[1:] + edges[:-1]) / 2, "count": count}
    for name, value in values.items():
        if value.shape != timesteps.shape:
            raise ValueError(f"{name} is {list(value.shape)}: should be {list(timesteps.shape)}, as the timesteps")

        def mean(x: Tensor) -> Tensor:
            return x.new_zeros(bins).index_add(0, place, x) / count

        centre = mean(value)
        found[name] = {"mean": centre, "std": mean((value - centre[place]).square()).sqrt()}
    return found


# Differential privacy.


def clipped_sum(
    loss: Loss, params: Tree, batch: Tree, clip_norm: float, chunk: int | None = None, norms: Tensor | None = None
) -> tuple[Tree, Tensor]:
    """Returns the sum of the samples' gradients, each scaled down to norm clip_norm at most, and the norms [B].

    It is added up in float32 or wider, and of params' types at the end. One sample changes it by clip_norm at most: the
    sensitivity that `private` adds noise for (Abadi et al. 2016, arXiv:1607.00133).

    Args:
      loss, params, batch, chunk: as for `norms`.
      clip_norm: above 0.
      norms: [B], where they are known, from `ghost_norms` say: then no sample's gradient is held, and the sum is the
        gradient of the losses' weighted sum (Li et al. 2022, arXiv:2110.05679).

    Raises:
      ValueError: as for `losses`; a clip_norm that is not above 0, or norms that are not one for each sample.
    """
    checks.positive("clip_norm", clip_norm)

    def weights(norms: Tensor) -> Tensor:
        return clip_norm / norms.clamp(min=clip_norm)

    def take(grads: Tree, values: Tensor) -> tuple[Tree, Tensor]:
        scale = weights(norms := squared_norms(grads).sqrt())
        return tree.map(lambda leaf: torch.tensordot(scale, leaf.to(scale.dtype), 1), grads), norms

    def weighted(params: Tree, part: Tree, norms: Tensor) -> Tensor:
        return (torch.func.vmap(checks.scalar(loss, FOR_ONE), in_dims=(None, 0))(params, part) * weights(norms)).sum()

    def rounded(total: Tree, norms: Tensor) -> tuple[Tree, Tensor]:
        return tree.map(lambda leaf, like: leaf.to(like.dtype), total, params), norms

    if norms is None:
        return rounded(*_sum(each(loss, params, batch, chunk, take)))
    if list(norms.shape) != (expected := [checks.samples(batch)]):
        raise ValueError(f"norms is {list(norms.shape)}: should be {expected}, one for each sample of the batch")
    pairs = checks.chunks((batch, norms.detach()), chunk)
    parts = ((torch.func.grad(weighted)(checks.filled(params), part, known), known) for part, known in pairs)
    return rounded(*_sum(parts))


def _sum(parts: Iterator[tuple[Tree, Tensor]]) -> tuple[Tree, Tensor]:
    """Returns the sum of the trees in float32 or wider, and the tensors one after the other."""

    def own(leaf: Tensor) -> Tensor:
        # To be added to in place: the gradients of two leaves may be one tensor, or one number expanded.
        return leaf.to(at_least_float32(leaf.dtype), copy=True)

    total, found = None, []
    for part, values in parts:
        total = tree.map(own, part) if total is None else tree.map(Tensor.add_, total, part)
        found.append(values)
        # Not to be there while the next is computed.
        del part
    return total, torch.cat(found)


def private(optimizer: Any, clip_norm: float, noise_multiplier: float, batch_size: int, seed: int) -> Any:
    """Returns an optimizer that takes `clipped_sum`s for gradients: DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

        opt = per_sample.private(ff.optimizer.adamw(lr=1e-4), 1.0, noise_multiplier=1.1, batch_size=64, seed=0)
        state = opt.init(params)
        total, _ = per_sample.clipped_sum(loss, params, batch, clip_norm=1.0, chunk=8)
        params, state = opt.update(total, state, params)

    Noise of standard deviation noise_multiplier * clip_norm is added to each number of the sum, which is then divided
    by batch_size and handed on. Draws are counted, by (seed, path, update); they are not of a cryptographic generator.
    What privacy this buys, an accountant computes from the multiplier, the share of the data in a batch and the steps.

    Args:
      optimizer: a named tuple with the functions `init(params) -> state` and `update(grads, state, params) -> (params,
        state)`, as of ff.optimizer; its own kind is returned. What else the returned update is given, such as a scale
        of the gradients, it hands on.
      clip_norm: that of clipped_sum.
      noise_multiplier: in units of clip_norm; 0: none, and no privacy.
      batch_size: the samples in a batch, or their expected number where each is drawn by chance.
      seed: of the noise. It has to be kept secret.

    Returns:
      The pair; its state is {"inner": the optimizer's, "step": int64 scalar, the updates made}.

    Raises:
      ValueError: numbers out of range.
    """
    checks.positive("clip_norm", clip_norm)
    checks.positive("batch_size", batch_size)
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier is {noise_multiplier!r}: should be a number from 0 on")

    def init(params: Tree) -> Tree:
        return {"inner": optimizer.init(params), "step": torch.zeros((), dtype=torch.int64)}

    def update(total: Tree, state: Tree, params: Tree, *more: Any, **named: Any) -> tuple[Tree, Tree]:
        noise = _noise(total, seed, int(state["step"]))
        grads = tree.map(lambda leaf: (leaf + noise_multiplier * clip_norm * next(noise)) / batch_size, total)
        params, inner = optimizer.update(grads, state["inner"], params, *more, **named)
        state["step"] += 1
        return params, {**state, "inner": inner}

    return optimizer._replace(init=init, update=update)


def _noise(like: Tree, seed: int, step: int) -> Iterator[Tensor]:
    """Yields standard normal draws for each leaf in turn, in its type."""
    for path, leaf in tree.flatten(like).items():
        draw = random.normal(seed, f"privacy/{path}", step, tuple(leaf.shape))
        yield torch.as_tensor(draw).to(leaf.device, leaf.dtype)
