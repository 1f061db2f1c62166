"""What a run will take on a mesh of machines: memory, communication and time of one step, without the machines.

Each thing that a step does is run once for each kind of stage, by the code that trains, on fake tensors under a meter
(`costs`); the fold says in which order it does them (`schedule`); and playing that back on a clock, with a stream for
computing and one for each group of processes that talk, gives memory and seconds.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_func import tree
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.parallel.mesh import AXES, Mesh
from flux_func.parallel.sharding import Sharding
from flux_func.plan import costs, schedule
from flux_func.plan.devices import Cluster
from flux_func.plan.meter import Compute, Cost, Meter, Send


class Group(NamedTuple):
    """What `collectives` ask of a process group, of one that is only planned; its name are its axes."""

    axes: tuple[str, ...]
    count: int
    place: int

    @property
    def group_name(self) -> str:
        """Returns the axes, joined."""
        return " x ".join(self.axes)

    def size(self) -> int:
        """Returns how many processes are in it."""
        return self.count

    def rank(self) -> int:
        """Returns this process's place among them."""
        return self.place


@dataclass(frozen=True)
class Planned(Mesh):
    """A mesh without processes, whose groups serve as long as nothing but fake tensors is sent."""

    def group(self, axes: Sequence[str] = AXES) -> Group | None:
        """Returns what stands for the processes along some axes; None where this is the only one."""
        split = tuple(axis for axis in axes if self.sizes[axis] > 1)
        return Group(split, self.size(split), self.index(split)) if split else None


class Step(NamedTuple):
    """Something that is done: what its memory is for, what it takes, and what its collectives belong to."""

    member: str
    cost: Cost
    chain: str = ""


@dataclass(frozen=True)
class Problem:
    """A step of training on a mesh.

    Attributes:
      cfg: the model.
      sharding: what is where, on a mesh that may be `Planned`, and on the meta device.
      state: the train state, {params, opt, ema}, as a tree of placements.
      batch: a micro-batch of one process, meta tensors.
      ops, remat: as for the fold.
      accumulate: micro-batches in a step.
      update: (the state's parts, gradients' parts) to the end of the step, from the gradients on.
      frozen: {name: bytes on a process} of the encoders' weights.
      encode: what encoding a micro-batch does.
      offload: whether the state is in the host's memory.
      base: the weights under a LoRA that is trained, `adapt.Base`, meta tensors; None: the weights are.
    """

    cfg: flux.FluxConfig
    sharding: Sharding
    state: Params
    batch: Mapping[str, Tensor]
    ops: Ops
    remat: str
    accumulate: int
    update: Callable[[Params, Params], Any]
    frozen: Mapping[str, int] = field(default_factory=dict)
    encode: Sequence[Step] = ()
    offload: bool = False
    base: Any = None


@dataclass(frozen=True)
class Plan:
    """What a step takes; bytes are of one process.

    Attributes:
      state: {params, opt, ema: bytes}; and "base", of the weights under a LoRA.
      frozen: of the encoders' weights.
      memory: what the rest of the memory is for when the most is taken.
      sent: {(collective, axes): bytes sent in a step}.
      operations: floating-point operations, recomputation included.
      compute, exposed: seconds of computing, and of waiting for others.
      communication: seconds that collectives take, waited for or not.
      offload: whether the state is in the host's memory.
    """

    state: Mapping[str, int]
    frozen: Mapping[str, int]
    memory: Mapping[str, int]
    sent: Mapping[tuple[str, str], float]
    operations: float
    compute: float
    exposed: float
    communication: float
    offload: bool = False

    @property
    def working(self) -> int:
        """Returns the bytes of all that is not weights or state."""
        return sum(self.memory.values())

    @property
    def peak(self) -> int:
        """Returns the most bytes that the device holds."""
        kept = 0 if self.offload else sum(self.state.values())
        return kept + sum(self.frozen.values()) + self.working

    @property
    def seconds(self) -> float:
        """Returns the time of a step."""
        return self.compute + self.exposed


def predict(problem: Problem, cluster: Cluster, known: dict | None = None) -> Plan:
    """Returns what a step of the problem takes on a cluster.

    Args:
      problem: the step.
      cluster: the machines.
      known: kept from one mesh to the next of the same run and device, saves time.
    """
    player = Player(cluster)
    for step in program(problem, cluster, {} if known is None else known):
        player.play(step)
    held = {**problem.state, **({"base": problem.base.sharding.params} if problem.base else {})}
    mesh = problem.sharding.mesh
    return Plan(
        state={member: sum(place.local_bytes(mesh) for place in tree.leaves(of)) for member, of in held.items()},
        frozen=dict(problem.frozen),
        memory=dict(player.highest),
        sent=dict(player.sent),
        operations=player.operations,
        compute=player.compute,
        exposed=player.exposed,
        communication=player.communication,
        offload=problem.offload,
    )


def program(problem: Problem, cluster: Cluster, known: dict) -> Iterator[Step]:
    """Yields what a step of training does, in order; see `predict`."""
    sharding = problem.sharding
    state, grads = parts(problem.state, sharding.mesh), parts(sharding.grads, sharding.mesh)
    meter = Meter(cluster.device)
    found = costs.measure(problem, state["params"], meter, known)
    with meter:
        _, update = meter.cost(problem.update, state, grads)
    params = tree.map(lambda place: _meta(place.shape, place.dtype), sharding.params)
    units = costs.units(problem.cfg)
    kinds = {name: costs.kind(unit, params) for name, unit in units.items()}
    recorder = schedule.recorder(
        sharding,
        parts={name: unit[0].select(params) for name, unit in units.items()},
        cast=found.cast,
        steps={name: len(found.moving[kind].reduce) for name, kind in kinds.items()},
        alias=found.alias,
    )
    base = problem.base
    if base:
        base = replace(base, sharding=schedule.recorder(base.sharding, log=recorder.log, of=" base"))
    keep = problem.remat == "none"
    schedule.record(problem.cfg, params, problem.batch, recorder, problem.accumulate, base, keep)
    turn = 0
    for action in recorder.log:
        if action.what == "turn":
            turn = action.step
            yield from _turn(problem, found, turn)
        else:
            yield from _steps(action, kinds[action.stage], found, turn)
    yield Step("activations", Cost(-found.inputs.kept))
    yield Step("update", update)


def parts(places: Params, mesh: Mesh) -> Params:
    """Returns what a process has of a tree of placements, as meta tensors."""
    return tree.map(lambda place: _meta(place.local_shape(mesh), place.dtype), places)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _turn(problem: Problem, known: costs.Costs, turn: int) -> Iterator[Step]:
    """Yields what comes before the fold of a micro-batch, counted from 1."""
    if turn > 1:
        yield Step("activations", Cost(-known.inputs.kept))
    yield from problem.encode
    held = sum(leaf.nbytes for leaf in problem.batch.values())
    # The batch before is let go of when this one has been encoded.
    yield Step("batch", Cost(held if turn == 1 else 0, held))
    yield Step("activations", known.inputs)


def _steps(action: schedule.Action, kind: costs.Kind, known: costs.Costs, turn: int) -> Iterator[Step]:
    """Yields what an action of the fold comes to."""
    moving, stage, chain = known.moving[kind], known.stages[kind], f"gather {action.stage}"
    if action.what.endswith(" base"):
        moving, chain = known.base[kind[0][0]], f"gather base {action.stage}"
    match action.what:
        case "start" | "start base":
            yield Step("gathered", moving.start, chain)
        case "gather" | "gather base":
            yield Step("gathered", moving.finish, chain)
        case "release" | "release base":
            yield Step("gathered", Cost(-moving.whole))
        case "forward":
            yield Step("activations", stage.forward)
        case "backward":
            backward = stage.backward
            yield Step("activations", Cost(backward.kept - stage.grads, backward.peak, backward.events))
            yield Step("gradients", Cost(stage.grads))
            if turn > 1:
                yield Step("gradients", moving.add)
        case "cast":
            yield Step("gradients", moving.cast)
        case "reduce":
            yield Step("gradients", moving.reduce[action.step], f"reduce {action.stage}")
        case "drop":
            yield Step("gradients", Cost(-stage.grads))
        case "drop_cast":
            yield Step("gradients", Cost(-moving.cast.kept))


class Player:
    """Plays steps back on a clock."""

    def __init__(self, cluster: Cluster):
        """Takes the machines."""
        self._cluster = cluster
        self._now, self._busy, self._flying = 0.0, {}, {}
        self._live, self._most = Counter(), -1
        self.highest: dict[str, int] = {}
        self.sent: Counter = Counter()
        self.operations = self.compute = self.exposed = self.communication = 0.0

    def play(self, step: Step) -> None:
        """Goes on by a step."""
        most = self._live.total() + step.cost.peak
        if most > self._most:
            now = {**self._live, step.member: self._live[step.member] + step.cost.peak}
            self._most, self.highest = most, {member: size for member, size in now.items() if size}
        self._live[step.member] += step.cost.kept
        for event in step.cost.events:
            if isinstance(event, Compute):
                self._now += event.seconds
                self.compute += event.seconds
                self.operations += event.operations
            elif isinstance(event, Send):
                self._send(event, step.chain)
            else:
                end = self._flying.pop((step.chain, event.number))
                self.exposed += max(end - self._now, 0)
                self._now = max(end, self._now)

    def _send(self, event: Send, chain: str) -> None:
        self.sent[event.kind, event.group] += event.sent
        seconds = self._cluster.seconds(event.kind, tuple(event.group.split(" x ")), event.sent)
        # Collectives of one group wait for each other, as they do on NCCL's stream for it.
        end = max(self._busy.get(event.group, 0.0), self._now) + seconds
        self._busy[event.group] = self._flying[chain, event.number] = end
        self.communication += seconds
