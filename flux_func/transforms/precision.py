"""Mixed precision as a wrapper of stages: parameters are kept in one type and computed with in another."""

from collections.abc import Callable

import torch

from flux_func import tree
from flux_func.models.flux import Stage


def compute_in(dtype: torch.dtype) -> Callable[[Callable, Stage], Callable]:
    """Returns an `Ops.wrap_stage` that casts each stage's parameters to `dtype` just before it is computed.

    Activations follow, since the stem brings its input to the parameters' type; gradients come back in the type that
    the parameters are kept in (Micikevicius et al. 2018, arXiv:1710.03740; bfloat16 needs no loss scaling).
    """

    def wrap_stage(fn: Callable, stage: Stage) -> Callable:
        if stage.kind == "loss":
            return fn
        return lambda params, carry, const: fn(tree.map(lambda leaf: leaf.to(dtype), params), carry, const)

    return wrap_stage
