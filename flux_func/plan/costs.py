"""What the parts of a training step take, each measured once for each kind of stage, on fake tensors."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage
from flux_func.parallel import fold
from flux_func.parallel.sharding import ONE_PROCESS, Sharding
from flux_func.plan.meter import Cost, Meter

# The kinds of a unit's stages, and the shapes of what is trained of it.
Kind = tuple[tuple[str, ...], tuple]


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
      stages, moving: by `kind` of unit.
      base: {a stage's kind: what its weights under a LoRA take to be gathered}.
      cast: whether gradients come in another type than they are added up in.
      alias: whether a reduction hands back the gradients it was given.
    """

    inputs: Cost
    stages: dict[Kind, StageCost]
    moving: dict[Kind, Moving]
    cast: bool
    alias: bool
    base: dict[str, Moving] = field(default_factory=dict)


def units(cfg: flux.FluxConfig) -> dict[str, list[Stage]]:
    """Returns {name of its first stage: unit} of what the fold visits, in order."""
    return {unit[0].name: unit for unit in fold.units(path.chain(cfg))}


def kind(unit: list[Stage], params: Params) -> Kind:
    """Returns what units have in common that take the same; a LoRA may have more of one than of another.

    Args:
      unit: one of `units`.
      params: what is trained, or anything of its shapes.
    """
    trained = tree.flatten(unit[0].select(params))
    return tuple(stage.kind for stage in unit), tuple((path, *leaf.shape) for path, leaf in trained.items())


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
    moving, base, alias = {}, {}, False
    with meter:
        for unit in units(problem.cfg).values():
            found = kind(unit, problem.sharding.params)
            if found not in moving:
                moving[found], alias = _moving(problem.sharding, unit[0], params, meter)
            if problem.base and unit[0].kind not in base:
                gathered = _gathered(problem.base.sharding, unit[0], problem.base.params, meter)
                base[unit[0].kind] = Moving(*gathered, Cost(), Cost(), ())
    compute = {place.dtype for place in tree.leaves(problem.sharding.params)}
    compute = {problem.sharding.compute or dtype for dtype in compute}
    return Costs(
        inputs, stages, moving, compute != {problem.sharding.reduce or dtype for dtype in compute}, alias, base
    )


def _stages(problem: Any, meter: Meter) -> tuple[Cost, dict[Kind, StageCost]]:
    """Runs one unit of each kind forward, and then backward, as the fold does."""
    sharding, cfg = problem.sharding, problem.cfg
    batch = {name: torch.empty(leaf.shape, dtype=leaf.dtype) for name, leaf in problem.batch.items()}
    (carry, const), inputs = meter.cost(lambda: sharding.split(*path.inputs(cfg, batch, 1)))
    ops, vjp = (problem.ops, fold.autograd_vjp) if problem.base is None else _over(problem.base, problem.ops)
    visit, done = fold.visit(problem.remat, vjp), {}
    for unit in units(cfg).values():
        # A block gives what the next one takes, so those of a kind that are left out are not missed.
        if kind(unit, sharding.params) not in done:
            run = functools.partial(fold.run_unit, unit, ops=ops, const=const)
            run, given = (run, [carry]) if done else (functools.partial(run, carry=carry), [])
            whole = _whole(unit[0], sharding)
            before = meter.live
            (carry, pull), cost = meter.cost(visit, run, whole, *given)
            del run, given
            # A LoRA's part is kept for the backward pass, and counted where it is gathered and let go.
            kept = whole if problem.base else None
            done[kind(unit, sharding.params)] = (unit, pull, Cost(meter.live - before, cost.peak, cost.events), kept)
            del pull, whole, kept
    cotangent = {"loss": torch.ones_like(carry["loss"])}
    del carry, const
    found = {}
    for key in reversed(list(done)):
        unit, pull, forward, kept = done.pop(key)
        whole, before = _whole(unit[0], sharding), meter.live
        (part, *rest), cost = meter.cost(pull, cotangent, whole)
        cotangent = rest[0] if rest else None
        del pull, rest
        backward = Cost(meter.live - before, cost.peak, cost.events)
        found[key] = StageCost(forward, backward, _bytes(part))
        del part, whole, kept
    return inputs, found


def _over(base: Any, ops: Ops) -> tuple[Ops, fold.Vjp]:
    """Returns the ops and vjp of training over a base that is there whole."""
    params = tree.map(
        lambda place: torch.empty(place.shape, dtype=base.sharding.compute or place.dtype), base.sharding.params
    )
    return replace(base, params=params, sharding=ONE_PROCESS).training(ops)


def _whole(stage: Stage, sharding: Sharding, device: str = "cpu") -> Params:
    """Returns a stage's whole parameters, or gradients, in the type they are computed in."""
    places = stage.select(sharding.params)
    return tree.map(
        lambda place: torch.empty(place.shape, dtype=sharding.compute or place.dtype, device=device), places
    )


def _moving(sharding: Sharding, stage: Stage, params: Params, meter: Meter) -> tuple[Moving, bool]:
    start, finished, whole = _gathered(sharding, stage, params, meter)
    computed = _whole(stage, sharding, "meta")
    grads, cast = meter.cost(sharding.to_reduce, computed)
    add = meter.cost(_add, grads)[1]
    steps, alias = _reduction(sharding, stage, grads, meter)
    return Moving(start, finished, whole, cast, add, steps), alias


def _add(grads: Params) -> None:
    if tree.leaves(grads):
        torch._foreach_add_(tree.leaves(grads), tree.leaves(grads))


def _gathered(sharding: Sharding, stage: Stage, params: Params, meter: Meter) -> tuple[Cost, Cost, int]:
    """Returns what the two halves of a stage's gather take, and the bytes of the whole."""
    finish, start = meter.cost(sharding.start_gather, stage.select, params)
    gathered, finished = meter.cost(finish)
    whole = _bytes(gathered, beside=params)
    return start, replace(finished, kept=whole - start.kept), whole


def _reduction(sharding: Sharding, stage: Stage, grads: Params, meter: Meter) -> tuple[tuple[Cost, ...], bool]:
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
