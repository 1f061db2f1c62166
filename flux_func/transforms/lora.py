"""Low-rank adaptation: a model's linears, each with a trained update of low rank beside its frozen weight.

    adapter = lora.init(params, ["*_blocks.*_attn.*"], rank=16, alpha=16)
    grads = torch.func.grad(lora.apply(ff.loss), argnums=1)(params, adapter, cfg, batch)
    latents = lora.apply(ff.sample)(params, [(style, 0.8), (subject, 1.0)], cfg, noise=noise, txt=txt, y=y, steps=28)
    merged = lora.merge(params, adapter)

After Hu et al. 2021, arXiv:2106.09685: y = x W^T + b + (alpha / rank) (x A^T) B^T. A LoRA is a tree shaped as the
parameters, with a `LowRank` where an adapted linear's weight and bias are and nothing in the others' place; so a stage
selects its part of it as of the parameters. Where several are meant, they are given in a list: each as a LoRA, or as a
pair (LoRA, weight).
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
import torch
import torch.nn.functional as F
from optree.registry import __GLOBAL_NAMESPACE as EVERYWHERE
from torch import Tensor
from torch.utils import _pytree

from flux_func import random, tree
from flux_func.models import layers
from flux_func.models.layers import Ops, Params, at_least_float32
from flux_func.models.stages import Stage
from flux_func.transforms import checks

# A linear's updates beside its weight and bias, in trees that `combine` makes and no one else sees.
KEY = "lora"
Linear = Callable[[Params, Tensor, str], Tensor]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The update (alpha / rank) B A of one linear's weight [out, in].

    Attributes:
      A: [rank, in].
      B: [out, rank].
      alpha: a number, no leaf of the tree: neither trained nor decayed.
      bias: [out], that of some LoRAs' B, scaled as B is; None: they have none, as those of `init`.
    """

    A: Tensor
    B: Tensor
    alpha: float
    bias: Tensor | None = None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.A.shape[-2]

    def weight(self) -> Tensor:
        """Returns what is added to the weight, [out, in]."""
        return self.scale * (self.B @ self.A)


def _leaves(update: LowRank) -> dict[str, Tensor]:
    found = {"A": update.A, "B": update.B, "bias": update.bias}
    return {name: leaf for name, leaf in found.items() if leaf is not None}


def _from_leaves(alpha: float, leaves: Sequence[Any]) -> LowRank:
    return LowRank(*leaves[:2], alpha, *leaves[2:])


optree.register_pytree_node(
    LowRank,
    lambda update: (tuple(_leaves(update).values()), update.alpha, tuple(_leaves(update))),
    _from_leaves,
    namespace=EVERYWHERE,
)
_pytree.register_pytree_node(
    LowRank,
    lambda update: (list(_leaves(update).values()), update.alpha),
    lambda leaves, alpha: _from_leaves(alpha, list(leaves)),
    serialized_type_name="flux_func.transforms.lora.LowRank",
)

Lora = tree.Tree
# A LoRA with its weight: a number, or a scalar tensor, which may be differentiated.
Weighted = tuple[Lora, float | Tensor]
# One, or several.
Loras = Lora | Weighted | Sequence[Lora | Weighted]


def linears(params: Params) -> dict[str, Tensor]:
    """Returns {path: weight [out, in]} of every linear of a tree: what patterns are matched with."""
    flat = tree.flatten(params)
    return {path.removesuffix(".weight"): x for path, x in flat.items() if path.endswith(".weight") and x.ndim == 2}


def init(
    params: Params,
    patterns: Iterable[str],
    rank: int,
    alpha: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Lora:
    """Returns a LoRA that changes nothing yet: A uniform within 1 / sqrt(in), as PEFT draws it, and B zero.

    Args:
      params: the base, meta tensors too.
      patterns: shell wildcards of the linears to adapt, by their paths ("double_blocks.*.img_attn.qkv").
      rank, alpha: of each; its update is scaled by alpha / rank. An alpha of 0 is the rank, for a scale of 1.
      seed: of the counted draws.
      dtype: of the factors; None: the weight's, and no narrower than float32.
      device: of the factors; None: the weight's, or the CPU for a meta tensor. "meta": shapes without memory.

    Raises:
      ValueError: a rank below 1, an alpha that is no number, a type that is not floating, no pattern, or one that fits
        no linear: the nearest are listed.
    """
    checks.count("rank", rank)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: should be a floating type")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r}: should be a finite number, such as the rank, {rank}")

    def draw(path: str, weight: Tensor) -> LowRank:
        (out, fan_in), kind = weight.shape, dtype or at_least_float32(weight.dtype)
        where = torch.device(device or ("cpu" if weight.is_meta else weight.device))
        B = torch.zeros(out, rank, dtype=kind, device=where)
        if where.type == "meta":
            return LowRank(torch.empty(rank, fan_in, dtype=kind, device=where), B, float(alpha or rank))
        uniform = random.generator(seed, f"lora/{path}.A").random((rank, fan_in), dtype="float32")
        A = (2 * torch.from_numpy(uniform) - 1) / math.sqrt(fan_in)
        return LowRank(A.to(where, kind), B, float(alpha or rank))

    chosen = tree.select(linears(params), patterns, " (linears are named without .weight)")
    return place({path: draw(path, weight) for path, weight in chosen.items()}, params)


def place(found: Mapping[str, LowRank], params: Params) -> Lora:
    """Returns the LoRA with these updates, {path of a linear: update}, for a base, meta tensors too.

    Raises:
      ValueError: an update of a linear that the base has not, or of another shape.
    """
    flat = tree.flatten(params)
    for path, update in found.items():
        _check([update], {name: flat[at] for name in ("weight", "bias") if (at := f"{path}.{name}") in flat}, path)

    def shaped(node: Any, path: str) -> Any:
        if path in found:
            return found[path]
        if isinstance(node, (list, tuple)):
            return [shaped(child, _join(path, i)) for i, child in enumerate(node)]
        return {key: shaped(child, _join(path, key)) for key, child in node.items() if isinstance(child, (dict, list))}

    return shaped(params, "")


def updates(lora: Lora) -> dict[str, LowRank]:
    """Returns {path of a linear: update} of a LoRA: `place`'s inverse.

    Raises:
      ValueError: a tree with another leaf than updates.
    """
    paths, found, _ = optree.tree_flatten_with_path(lora, is_leaf=lambda node: isinstance(node, LowRank))
    named = {".".join(map(str, path)): update for path, update in zip(paths, found, strict=True)}
    for path, update in named.items():
        if not isinstance(update, LowRank):
            kind = type(update).__name__
            raise ValueError(f"the LoRA has a {kind} at {path!r}, where a LowRank should be: is it the base?")
    return named


# Using one.


def apply(fn: Callable) -> Callable:
    """Returns `fn(params, ..., ops=)` as a function of (base, LoRA, ..., ops=), without merged weights being held.

    Args:
      fn: such as ff.loss, ff.apply or ff.sample: any function that computes its linears by `ops.linear`.

    Returns:
      `(base, loras, *args, ops=Ops(), **kwargs)`; loras is a LoRA, a pair (LoRA, weight), or a list of such. It raises
      ValueError for a LoRA that does not fit the base; and where fn itself returns gradients, as ff.grad_and_value: a
      LoRA's are those of `torch.func.grad(apply(ff.loss), argnums=1)`, or of a fold with ops `over` the base.
    """

    def adapted(base: Params, loras: Loras, *args: Any, ops: Ops = Ops(), **kwargs: Any) -> Any:
        if any(isinstance(arg, Ops) for arg in args):
            raise ValueError(f"{checks.name(fn)} of a LoRA takes its ops by name: ops=...")
        out = fn(combine(base, loras), *args, ops=with_updates(ops), **kwargs)
        if any(KEY in path for path in optree.tree_paths(out, is_leaf=lambda node: isinstance(node, LowRank))):
            remedy = "differentiate lora.apply(loss), or give a fold the LoRA as params and ops=lora.over(...)"
            raise ValueError(f"{checks.name(fn)} returned gradients of the base and the LoRA in one tree: {remedy}")
        return out

    adapted.__name__ = checks.name(fn)
    return adapted


def combine(base: Params, loras: Loras, check: bool = True) -> Params:
    """Returns the base, or a stage's part of it, with the updates beside the weights, for `with_updates` to find.

    Nothing is copied. Computed with other ops, it is the base alone.

    Args:
      base, loras: as for `merge`.
      check: False for what a process has of sharded tensors, whose shapes say nothing.

    Raises:
      ValueError: a LoRA that does not fit; the shapes are named.
    """

    def beside(params: Params, found: Sequence[LowRank], path: str) -> Params:
        if check:
            _check(found, params, path)
        return {**params, KEY: found}

    return _walk(base, _weighted(loras), beside, "")


def with_updates(ops: Ops = Ops()) -> Ops:
    """Returns `ops` whose linears add the updates that `combine` put beside the weights."""
    return dataclasses.replace(ops, linear=linear(ops.linear))


@functools.cache  # one function for one inner, or torch.compile would take it for another each time
def linear(inner: Linear = layers.linear) -> Linear:
    """Returns `inner`, an `Ops.linear`, with the updates added to its result; they are computed in their own type."""

    def run(params: Params, x: Tensor, path: str) -> Tensor:
        y = inner({name: leaf for name, leaf in params.items() if name != KEY}, x, path)
        for update in params.get(KEY, ()):
            hidden = update.scale * F.linear(x.to(update.A.dtype), update.A)
            bias = None if update.bias is None else update.scale * update.bias
            y = y + F.linear(hidden, update.B, bias).to(y.dtype)
        return y

    return run


def over(base: Callable[[Stage], Params], ops: Ops = Ops()) -> Ops:
    """Returns ops with which a model is a function of its LoRA alone, for folds that visit a stage at a time.

    `ff.apply(adapter, cfg, ..., ops=lora.over(lambda stage: stage.select(params)))` is the adapted model.

    Args:
      base: a stage to its part of the base, called when it is the stage's turn.
      ops: how the rest is done.
    """
    added = with_updates(ops)

    def wrap_stage(fn: Callable, stage: Stage) -> Callable:
        wrapped = added.wrap_stage(fn, stage)
        if not stage.keys:
            return wrapped
        return lambda part, carry, const: wrapped(combine(base(stage), part), carry, const)

    return dataclasses.replace(added, wrap_stage=wrap_stage)


def merge(base: Params, loras: Loras) -> Params:
    """Returns the base with the updates added to its weights: new tensors in the weights' type, the others shared.

    The sum is taken in float32 at least. `unmerge` is the inverse, up to rounding in the weights' type.

    Args:
      base: a model's parameters.
      loras: a LoRA, a pair (LoRA, weight), or a list of such.

    Raises:
      ValueError: a LoRA that does not fit; the shapes are named.
    """
    return _walk(base, _weighted(loras), _merged, "")


def unmerge(merged: Params, loras: Loras) -> Params:
    """Returns the base of which `merge` with these LoRAs made `merged`, up to rounding; raises as `merge`."""
    return merge(merged, [(lora, -weight) for lora, weight in _weighted(loras)])


def _merged(params: Params, found: Sequence[LowRank], path: str) -> Params:
    _check(found, params, path)
    biased = ("bias",) if any(update.bias is not None for update in found) else ()
    return {**params, **{name: merge_leaf(name, params[name], found) for name in ("weight", *biased)}}


def merge_leaf(name: str, leaf: Tensor, found: Sequence[LowRank]) -> Tensor:
    """Returns a linear's "weight" or "bias" with updates that fit it added, in its type; see `merge`."""
    wide = at_least_float32(leaf.dtype)
    total = leaf.to(wide)
    for update in found:
        update = tree.map(lambda factor: factor.to(wide), update)
        if name == "weight":
            total = total + update.weight()
        elif update.bias is not None:
            total = total + update.scale * update.bias
    return total.to(leaf.dtype)


def _weighted(loras: Loras) -> list[Weighted]:
    """Returns LoRAs as pairs with their weights, however they were given; ValueError for what is none."""

    def is_pair(given: Any) -> bool:
        return isinstance(given, (list, tuple)) and len(given) == 2 and isinstance(given[1], (numbers.Real, Tensor))

    several = loras if isinstance(loras, (list, tuple)) and not is_pair(loras) else [loras]
    pairs = [tuple(one) if is_pair(one) else (one, 1.0) for one in several]
    for lora, weight in pairs:
        checks.weight("the weight of a LoRA", weight)
        for path in updates(lora):
            if isinstance(lora, dict) and "." in path and path in lora:
                raise ValueError(f"the LoRA is of paths, such as {path!r}: lora.place makes a tree for the base of it")
    return pairs


def _walk(node: Any, loras: list[Weighted], adapt: Callable, path: str) -> Any:
    """Returns the tree `node` with `adapt(linear's params, its updates)` wherever some LoRA has an update."""
    found = tuple(_times(part, weight) for part, weight in loras if isinstance(part, LowRank))
    if found:
        return adapt(node if isinstance(node, dict) else {}, found, path)
    items = dict(enumerate(node)) if isinstance(node, (list, tuple)) else node if isinstance(node, dict) else {}
    parts: dict[Any, list] = {}
    for part, weight in loras:
        for key, child in dict(enumerate(part)).items() if isinstance(part, (list, tuple)) else part.items():
            if key not in items and tree.leaves(child):
                first, update = next(iter(updates(child).items()))
                _check([update], {}, _join(_join(path, key), first))
            parts.setdefault(key, []).append((child, weight))
    out = {
        key: _walk(child, parts[key], adapt, _join(path, key)) if key in parts else child
        for key, child in items.items()
    }
    return list(out.values()) if isinstance(node, (list, tuple)) else out


def _times(update: LowRank, weight: float | Tensor) -> LowRank:
    if isinstance(weight, Tensor):
        bias = None if update.bias is None else weight * update.bias
        return dataclasses.replace(update, B=weight * update.B, bias=bias)
    return dataclasses.replace(update, alpha=weight * update.alpha)


def _check(found: Sequence[LowRank], params: Params, path: str) -> None:
    """Checks that updates fit a linear's parameters, or what stands for them and has a shape."""
    weight = params.get("weight")
    for update in found:
        out, fan_in = update.B.shape[0], update.A.shape[-1]
        if weight is None:
            raise ValueError(
                f"the LoRA adapts {path}, a linear [{out}, {fan_in}] that the base has not: it is of another model"
            )
        if (out, fan_in) != tuple(weight.shape) or update.A.shape[0] != update.B.shape[-1]:
            raise ValueError(
                f"the LoRA has A {list(update.A.shape)} and B {list(update.B.shape)} for {path}, whose weight is "
                f"{list(weight.shape)} in the base: A should be [rank, {weight.shape[1]}] and B "
                f"[{weight.shape[0]}, rank]"
            )
        if update.bias is not None and ("bias" not in params or tuple(update.bias.shape) != (out,)):
            there = f"{list(params['bias'].shape)}" if "bias" in params else "none"
            raise ValueError(
                f"the LoRA has a bias {list(update.bias.shape)} for {path}, and the base has {there}: it is of "
                f"another model"
            )


def _join(path: str, key: Any) -> str:
    return ".".join(str(part) for part in (path, key) if part != "")
