"""Checks a plan against the training fold itself, run whole at any number of processes without them.

Torch's fake process group takes every collective for done, and fake tensors have no memory: what is left is what
process 0 would do, in full, stage by stage.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_func import tree
from flux_func.models.layers import Params
from flux_func.parallel import fold, mesh
from flux_func.parallel.mesh import AXES, Mesh
from flux_func.plan.meter import Meter, Send
from flux_func.plan.predict import Problem, parts


@dataclass(frozen=True)
class Trace:
    """What process 0 did in a step.

    Attributes:
      state: bytes of what it has of the train state.
      working: the most bytes there were of anything else.
      sent: {(collective, axes): bytes sent}.
    """

    state: int
    working: int
    sent: Mapping[tuple[str, str], float]


@contextlib.contextmanager
def processes(sizes: Mapping[str, int]) -> Iterator[Mesh]:
    """Gives a mesh over a fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    count = 1
    for size in sizes.values():
        count *= size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield mesh.build(sizes)
    finally:
        dist.destroy_process_group()


def trace(problem: Problem) -> Trace:
    """Runs a problem's step, encoders apart, on fake tensors; its mesh is one of `processes`."""
    here, meter = problem.sharding.mesh, Meter()
    # First of all, since a mesh computes the groups of its processes when they are asked for.
    names, sent = group_names(here), Counter()
    shapes = parts(problem.state, here)
    with FakeTensorMode(allow_fallback_kernels=False), meter:
        params, grads = _fakes(shapes["params"]), None
        base = replace(problem.base, params=_fakes(problem.base.params)) if problem.base else None
        state = meter.live
        for turn in range(1, problem.accumulate + 1):
            batch = _fakes(problem.batch)
            ops, vjp = base.training(problem.ops) if base else (problem.ops, fold.autograd_vjp)
            grads, _ = fold.grad_and_value(
                params,
                problem.cfg,
                batch,
                ops,
                problem.remat,
                denominator=1,
                into=grads,
                vjp=vjp,
                sharding=problem.sharding,
                last=turn == problem.accumulate,
            )
        working = meter.peak - state
    with meter:
        problem.update(shapes, parts(problem.sharding.grads, here))
    for event in meter.events:
        if isinstance(event, Send):
            sent[event.kind, names[event.group]] += event.sent
    whole = sum(leaf.nbytes for leaf in tree.leaves((shapes, problem.base.params if problem.base else ())))
    return Trace(whole, working, dict(sent))


def group_names(here: Mesh) -> dict[str, str]:
    """Returns {torch's name of a group of a mesh: the axes it is along, as a plan names it}."""
    split = [axis for axis in AXES if here.sizes[axis] > 1]
    found = {}
    for chosen in range(1, 2 ** len(split)):
        axes = tuple(axis for place, axis in enumerate(split) if chosen >> place & 1)
        found[here.group(axes).group_name] = " x ".join(axes)
    return found


def _fakes(shapes: Params) -> Params:
    return tree.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype), shapes)
