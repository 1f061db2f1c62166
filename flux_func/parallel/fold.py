"""The training fold: the chain of stages forward, and its vjp folded backward.

The same numbers as differentiating `ff.loss`, in less memory and time: gradients appear stage by stage, and what a
stage kept for its backward pass is freed as soon as that has run. `remat="full"` keeps each stage's input alone and
runs the stage again on the way back (Griewank & Walther 2000; Chen et al. 2016, arXiv:1604.06174).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops, Params

Pull = Callable[[Any], tuple]
Vjp = Callable[..., tuple[Any, Pull]]


def autograd_vjp(fn: Callable, *primals: tree.Tree) -> tuple[Any, Pull]:
    """Returns (fn(*primals), pull): torch.func.vjp's contract, on torch.autograd.grad over detached leaves.

    `pull` may be called once, and its results carry no graph: under half the memory of torch.func.vjp, which keeps
    the backward pass differentiable.
    """
    detached = tree.map(lambda leaf: leaf.detach().requires_grad_(), primals)
    with torch.enable_grad():
        out = fn(*detached)
    # An edge into the graph does not keep the output alive, which nothing else may need.
    edges = [get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in tree.leaves(out)]

    def pull(cotangent: tree.Tree) -> tuple:
        pairs = [(edge, grad) for edge, grad in zip(edges, tree.leaves(cotangent), strict=True) if edge]
        outs, grads = zip(*pairs, strict=True)
        wanted = iter(torch.autograd.grad(outs, tree.leaves(detached), grads, materialize_grads=True))
        return tree.map(lambda leaf: next(wanted), detached)

    return tree.map(torch.Tensor.detach, out), pull


def remat(vjp: Vjp) -> Vjp:
    """Returns a vjp that keeps the primals alone, and runs the function again when pulled."""

    def recomputing(fn: Callable, *primals: tree.Tree) -> tuple[Any, Pull]:
        with torch.no_grad():
            out = fn(*primals)
        return out, lambda cotangent: vjp(fn, *primals)[1](cotangent)

    return recomputing


REMAT = {"none": lambda vjp: vjp, "full": remat}


def grad_and_value(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Mapping[str, Tensor],
    ops: Ops = Ops(),
    remat: str = "none",
    *,
    denominator: float | None = None,
    into: Params | None = None,
    vjp: Vjp = autograd_vjp,
) -> tuple[Params, Tensor]:
    """Returns (gradients, loss) of `ff.loss`, as torch.func.grad_and_value(ff.loss) would.

    Args:
      params, cfg, batch, ops, denominator: as for `ff.loss`.
      remat: "none", or "full": each stage is run again in the backward pass.
      into: gradients so far, to which these are added in place: accumulation over micro-batches.
      vjp: how a stage is differentiated; torch.func.vjp to differentiate through the step.

    Raises:
      ValueError: a policy that does not exist, or shapes that do not fit.
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} should be one of {', '.join(map(repr, REMAT))}")
    vjp, pulls = REMAT[remat](vjp), []
    carry, const = path.inputs(cfg, batch, denominator)
    for unit in _units(path.chain(cfg)):
        run, part = functools.partial(_run, unit, ops, const), unit[0].select(params)
        if pulls:
            carry, pull = vjp(run, part, carry)
        else:
            # The batch itself is not differentiated: the first stage is a function of its parameters alone.
            carry, pull = vjp(functools.partial(run, carry=carry), part)
        pulls.append((unit[0], pull))
    loss, cotangent, parts = carry["loss"], {"loss": torch.ones_like(carry["loss"])}, []
    del carry, const, run, pull
    while pulls:
        stage, pull = pulls.pop()
        part, *rest = pull(cotangent)
        cotangent = rest[0] if rest else None
        del pull
        parts.append((stage, part if into is None else _add(stage.select(into), part)))
    grads: Params = {}
    for stage, part in reversed(parts):
        stage.place(grads, part)
    return {key: grads[key] for key in params}, loss.detach()


def _units(stages: Sequence[flux.Stage]) -> list[list[flux.Stage]]:
    """Groups each stage with those without parameters after it: alone they would only keep their input alive."""
    units: list[list[flux.Stage]] = []
    for stage in stages:
        if stage.keys:
            units.append([stage])
        else:
            units[-1].append(stage)
    return units


def _run(unit: list[flux.Stage], ops: Ops, const: dict, part: Params, carry: dict) -> dict:
    for stage in unit:
        carry = flux.bind(stage, ops)(part if stage.keys else {}, carry, const)
    return carry


def _add(total: Params, part: Params) -> Params:
    if tree.leaves(part):
        torch._foreach_add_(tree.leaves(total), tree.leaves(part))
    return total
