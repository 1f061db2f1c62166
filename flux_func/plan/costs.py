"""What the parts of a training step take, each measured once for each kind of stage, on fake tensors."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Params
from flux_func.parallel import fold
from flux_func.parallel.sharding import Sharding
from flux_func.plan.meter import Cost, Meter


@dataclass(frozen=True)
class StageCost:
    """Of a stage's computation: forward, backward with what that computes again, and its gradients' bytes."""

    forward: Cost
    backward: Cost
    grads: int


@dataclass(frozen=True)
class Moving:
    """Of a stage's parameters and gradients between processes.

    Attributes:
      start, finish: of the gather's two halves.
      whole: bytes of the whole parameters, in the type they are computed in; 0 where they are the state's own.
      cast: of bringing gradients to the type they are added up in.
      add: of adding them to those of the micro-batches before.
      reduce: of each step of their reduction.
    """

    start: Cost
    finish: Cost
    whole: int
    cast: Cost
    add: Cost
    reduce: tuple[Cost, ...]


@dataclass(frozen=True)
class Costs:
    """Of all that a fold does.

    Attributes:
      inputs: of what the chain starts from.
      stages: by `kind` of unit.
      moving: by a stage's kind.
      cast: whether gradients come in another type than they are added up in.
      alias: whether a reduction hands back the gradients it was given.
    """

    inputs: Cost
    stages: dict[tuple[str, ...], StageCost]
    moving: dict[str, Moving]
    cast: bool
    alias: bool


def units(cfg: flux.FluxConfig) -> dict[str, list[flux.Stage]]:
    """Returns {name of its first stage: unit} of what the fold visits, in order."""
    return {unit[0].name: unit for unit in fold.units(path.chain(cfg))}


def kind(unit: list[flux.Stage]) -> tuple[str, ...]:
    """Returns what units have in common that take the same."""
    return tuple(stage.kind for stage in unit)


def measure(problem: Any, params: Params, meter: Meter, known: dict) -> Costs:
    """Returns what the parts of a problem take.

    Args:
      problem: see `predict.Problem`.
      params: what a process has of the parameters, meta tensors.
      known: what computing was found to take, by what it depends on of a mesh; for meshes to come.
      meter: that counts, and is entered here.
    """
    split = problem.sharding.mesh.size(("context",)) if problem.sharding.splits else 1
    key = (split, *(tuple(leaf.shape) for leaf in problem.batch.values()))
    if key not in known:
        # It is a CPU's as far as torch is told: on the meta device attention would be another.
        with FakeTensorMode(allow_fallback_kernels=False), meter:
            known[key] = _stages(problem, meter)
    inputs, stages = known[key]
    moving, alias = {}, False
    with meter:
        for unit in units(problem.cfg).values():
            if unit[0].kind not in moving:
                moving[unit[0].kind], alias = _moving(problem.sharding, unit[0], params, meter)
    compute = {place.dtype for place in tree.leaves(problem.sharding.params)}
    compute = {problem.sharding.compute or dtype for dtype in compute}
    return Costs(inputs, stages, moving, compute != {problem.sharding.reduce or dtype for dtype in compute}, alias)


def _stages(problem: Any, meter: Meter) -> tuple[Cost, dict[tuple[str, ...], StageCost]]:
    """Runs one unit of each kind forward, and then backward, as the fold does."""
    sharding, cfg = problem.sharding, problem.cfg
    batch = {name: torch.empty(leaf.shape, dtype=leaf.dtype) for name, leaf in problem.batch.items()}
    (carry, const), inputs = meter.cost(lambda: sharding.split(*path.inputs(cfg, batch, 1)))
    visit, done = fold.REMAT[problem.remat](fold.autograd_vjp), {}
    for unit in units(cfg).values():
        # A block gives what the next one takes, so those of a kind that are left out are not missed.
        if kind(unit) not in done:
            run = functools.partial(fold.run_unit, unit, problem.ops, const)
            run, given = (run, [carry]) if done else (functools.partial(run, carry=carry), [])
            whole = _whole(unit[0], sharding)
            before = meter.live
            (carry, pull), cost = meter.cost(visit, run, whole, *given)
            del run, given
            done[kind(unit)] = (unit, pull, Cost(meter.live - before, cost.peak, cost.events))
            del pull, whole
    cotangent = {"loss": torch.ones_like(carry["loss"])}
    del carry, const
    found = {}
    for key in reversed(list(done)):
        unit, pull, forward = done.pop(key)
        whole, before = _whole(unit[0], sharding), meter.live
        (part, *rest), cost = meter.cost(pull, cotangent, whole)
        cotangent = rest[0] if rest else None
        del pull, rest
        backward = Cost(meter.live - before, cost.peak, cost.events)
        found[key] = StageCost(forward, backward, _bytes(part))
        del part, whole
    return inputs, found


def _whole(stage: flux.Stage, sharding: Sharding, device: str = "cpu") -> Params:
    """Returns a stage's whole parameters, or gradients, in the type they are computed in."""
    places = stage.select(sharding.params)
    return tree.map(
        lambda place: torch.empty(place.shape, dtype=sharding.compute or place.dtype, device=device), places
    )


def _moving(sharding: Sharding, stage: flux.Stage, params: Params, meter: Meter) -> tuple[Moving, bool]:
    finish, start = meter.cost(sharding.start_gather, stage.select, params)
    gathered, finished = meter.cost(finish)
    whole = _bytes(gathered, beside=params)
    del finish, gathered
    computed = _whole(stage, sharding, "meta")
    grads, cast = meter.cost(sharding.to_reduce, computed)
    add = meter.cost(torch._foreach_add_, tree.leaves(grads), tree.leaves(grads))[1]
    steps, alias = _reduction(sharding, stage, grads, meter)
    return Moving(start, replace(finished, kept=whole - start.kept), whole, cast, add, steps), alias


def _reduction(sharding: Sharding, stage: flux.Stage, grads: Params, meter: Meter) -> tuple[tuple[Cost, ...], bool]:
    """Returns what each step takes, and whether the gradients themselves come back."""
    reduction, steps, ended = sharding.reduction(stage.select, grads), [], []

    def step() -> None:
        try:
            next(reduction)
        except StopIteration as done:
            ended.append(done.value)

    while not ended:
        steps.append(meter.cost(step)[1])
    return tuple(steps), not _bytes(ended, beside=grads)


def _bytes(leaves: Any, beside: Any = ()) -> int:
    """Returns the bytes of some tensors' memory, less what other tensors have."""
    known = {leaf.untyped_storage()._cdata for leaf in tree.leaves(beside)}
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in tree.leaves(leaves)}
    return sum(size for key, size in storages.items() if key not in known)
