"""Compilation by torch.compile: each kind of stage once, however many stages of it there are.

    ops = Ops(wrap_stage=compiled.stages())
    grads, loss = ff.grad_and_value(params, cfg, batch, ops=ops)

For torch.autograd, and so for the training fold and for sampling. torch.func's transforms are refused inside of
themselves by Dynamo, or run eager without a word: `torch.compile(torch.func.grad(fn))` of the whole is their way.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from flux_func.models.layers import Ops
from flux_func.models.stages import Stage


def stages(**options: Any) -> Callable[[Callable, Stage], Callable]:
    """Returns an `Ops.wrap_stage` that compiles each stage which has parameters, the first time that it is run.

    Stages of one kind, model and way of doing linears and attention share what was compiled. The first resolution is
    compiled for its shapes, the second for any, those after it not again. Nothing falls back to eager mode: what
    cannot be compiled whole is an error. Numbers differ from eager mode's by rounding.

    Args:
      options: torch.compile's own, such as `backend` and `mode`.

    Returns:
      It goes innermost, around stages as they are; ValueError where it is put around something else.
    """
    options = {"fullgraph": True, **options}
    made: dict[Callable, Callable] = {}

    def wrap_stage(fn: functools.partial, stage: Stage) -> Callable:
        if not stage.keys:
            return fn
        if not isinstance(fn, functools.partial) or "ops" not in fn.keywords:
            raise ValueError(f"{stage.name} is wrapped already: what compiles it should be the innermost wrap_stage")
        # Dynamo tells what it compiled apart by the code that it starts from: of a kind, not of a partial.
        given = dict(fn.keywords)
        plain = dataclasses.replace(given.pop("ops"), wrap_stage=Ops.wrap_stage)
        if fn.func not in made:
            made[fn.func] = torch.compile(fn.func, **options)
        return functools.partial(made[fn.func], **given, ops=plain)

    return wrap_stage
