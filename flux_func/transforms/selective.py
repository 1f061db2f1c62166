"""Selective rematerialization of stages that a fold runs twice: what the first run kept is given to the second.

    out, kept = first run, by `recording(ops, keep)`        without gradients
    vjp of the second run, by `replaying(ops, keep)`        attention, for one, is not computed again

What is kept is a value of the stage and no side effect, so that it goes through torch.compile too, where `remat`, which
composes with every transform of torch.func, cannot. Named by Korthikanti et al. 2022 (arXiv:2205.05198).
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_func import tree
from flux_func.models import flux, layers
from flux_func.models.attention import Tape
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage
from flux_func.transforms import checks
from flux_func.transforms.remat import Policy

# The key in what a recorded stage returns, and in the const of a replayed one.
KEPT = "kept"


@functools.cache
def check(keep: Policy, cfg: flux.FluxConfig) -> None:
    """Checks that there is what a policy keeps.

    Raises:
      ValueError: a name that is not "attention" and no pattern of the model's linears; it lists the nearest.
    """
    known = ["attention", *flux.linears(cfg)]
    for name in sorted(keep):
        if not any(tree.match([name], path) for path in known):
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
            raise ValueError(f"remat keeps {name!r}, which fits nothing that a stage runs; the nearest are {near}")


def recording(ops: Ops, keep: Policy) -> Ops:
    """Returns ops by which each stage returns what it kept, a list of tuples of tensors, beside its carry.

    Args:
      ops: how the stages are done, compiled ones too; those without parameters pass on what is kept.
      keep: "attention", and patterns of linears without their block's index, as `Ops.linear` is told them:
        "double_blocks.*_attn.proj", "single_blocks.linear1".

    Raises:
      ValueError: linears are named, and `ops` does them in its own way, whose gradients are unknown here; or attention
        is, and that of `ops` takes no `tape`, as `models.attention` does.
    """
    if "attention" in keep and "tape" not in inspect.signature(ops.attention).parameters:
        raise ValueError(f"remat keeps 'attention': {checks.name(ops.attention)} should take a tape, as ff's attention")
    if keep - {"attention"} and ops.linear is not layers.linear:
        named = ", ".join(map(repr, sorted(keep - {"attention"})))
        raise ValueError(f"remat keeps {named}: of linears that are not plain matrix products only 'attention' is kept")
    if keep - {"attention"}:
        # Dynamo does not follow how patterns are looked up; to say so at import would import Dynamo, for a second.
        torch.compiler.assume_constant_result(_fits)
    return dataclasses.replace(ops, wrap_stage=functools.partial(_wrap, ops.wrap_stage, _recorder, keep))


def replaying(ops: Ops, keep: Policy) -> Ops:
    """Returns ops by which each stage takes from const what `recording` kept of it."""
    return dataclasses.replace(ops, wrap_stage=functools.partial(_wrap, ops.wrap_stage, _replayer, keep))


def _wrap(inner: Callable, make: Callable, keep: Policy, fn: functools.partial, stage: Stage) -> Callable:
    if stage.keys:
        return inner(functools.partial(make(fn.func, keep), **fn.keywords), stage)
    run = inner(fn, stage)
    return lambda params, carry, const: run(params, carry, const) | {k: carry[k] for k in (KEPT,) if k in carry}


# One function for one stage's function and policy, or torch.compile would take it for another each time.


@functools.cache
def _recorder(base: Callable, keep: Policy) -> Callable:
    def recorded(params: Params, carry: dict, const: dict, *, ops: Ops, **static: Any) -> dict:
        kept: list[tuple[Tensor, ...]] = []

        def tape(forward: Callable, given: Callable, *args: Any) -> Tensor:
            found = forward(*args)
            kept.append(found)
            return found[0]

        return base(params, carry, const, ops=_taped(ops, keep, tape), **static) | {KEPT: kept}

    return _of_its_own_code(recorded)


@functools.cache
def _replayer(base: Callable, keep: Policy) -> Callable:
    def replayed(params: Params, carry: dict, const: dict, *, ops: Ops, **static: Any) -> dict:
        kept = iter(const[KEPT])

        def tape(forward: Callable, given: Callable, *args: Any) -> Tensor:
            return given(*args, *next(kept))

        return base(params, carry, const, ops=_taped(ops, keep, tape), **static)

    return _of_its_own_code(replayed)


def _of_its_own_code(fn: Callable) -> Callable:
    # By its code Dynamo knows what it compiled, and bounds how often it compiles the same.
    fn.__code__ = fn.__code__.replace()
    return fn


def _taped(ops: Ops, keep: Policy, tape: Tape) -> Ops:
    """Returns ops whose kept operations go by a tape."""
    if "attention" in keep:
        ops = dataclasses.replace(ops, attention=functools.partial(ops.attention, tape=tape))
    patterns = tuple(sorted(keep - {"attention"}))
    if not patterns:
        return ops

    def linear(params: Params, x: Tensor, path: str) -> Tensor:
        if _fits(patterns, path):
            return tape(_product, _Product.apply, x, params["weight"], params.get("bias"))
        return ops.linear(params, x, path)

    return dataclasses.replace(ops, linear=linear)


def _fits(patterns: tuple[str, ...], path: str) -> bool:
    return tree.match(patterns, path) is not None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (F.linear(x, weight, bias),)


class _Product(torch.autograd.Function):
    """(x, weight, bias or None, their product) to the product, as if it were computed."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor) -> Tensor:
        del x, weight, bias
        return product.view_as(product)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            grad @ weight if of_x else None,
            flat.mT @ x.flatten(0, -2) if of_weight else None,
            flat.sum(0) if of_bias else None,
            None,
        )
