"""How a stage's parameters come together before it is computed, and how its gradients go apart after it.

As in FSDP (Zhao et al. 2023, arXiv:2304.11277) and ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): a stage's
parameters are gathered as one flat collective while the stage before is computed, and let go of right after; its
gradients are added up by one flat reduce-scatter while the next stage's are computed. What is split over which
processes, the placements say; in one process nothing is sent, and what is left is the change of type.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage
from flux_func.parallel import collectives, placements
from flux_func.parallel.mesh import AXES, ONE, Mesh
from flux_func.parallel.placements import Placement, local
from flux_func.parallel.timeline import phase

# What a batch of `ff.loss` holds, and the sequence's dimension of what `path.inputs` makes of it.
BATCH = ("latents", "noise", "timesteps", "txt", "y", "guidance")
SEQUENCES = {"img": 1, "txt": 1, "rope": 2, "target": 1}

# What is gathered at a time of parameters that were updated in parts.
BUNDLE_BYTES = 256 << 20

Select = Callable[[Params], Params]
# Yields whenever collectives have been started; returns this process's part of a stage's gradients.
Reduction = Generator[None, None, Params]


@dataclass(frozen=True)
class Sharding:
    """What a fold gathers and reduces by. As it is by default: one process, every type left as it comes.

    Attributes:
      mesh: the processes.
      params: where the parameters are: a tree like theirs of `Placement`; None: whole in every process.
      grads: where their gradients go, likewise.
      batch_axes: the mesh axes that a batch's samples are split over.
      splits: {name in the carry or const of `path.inputs`: (mesh axes, dimension)}: what is split within a sample.
      compute: the type that parameters are gathered, and computed, in; None: their own.
      reduce: the type that gradients are added up in; None: the one they come in.
      prefetch: stages whose parameters are on their way while one is computed.
      device: where to compute; None: where the parameters are.
      home: where parameters, moments and averages are kept between steps; None: where they are.
    """

    mesh: Mesh = ONE
    params: Any = None
    grads: Any = None
    batch_axes: tuple[str, ...] = ()
    splits: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    prefetch: int = 1
    device: torch.device | None = None
    home: torch.device | None = None

    @property
    def repeats(self) -> int:
        """How many processes compute the very same: what each adds to a sum over all is to be divided by it."""
        split = {*self.batch_axes, *(axis for axes, _ in self.splits.values() for axis in axes)}
        return self.mesh.size([axis for axis in AXES if axis not in split])

    def start_gather(self, select: Select, params: Params) -> Callable[[], Params]:
        """Starts to gather what `select` takes of the parameters; returns the function that waits and returns it."""
        part = select(params)
        leaves = [self._to_compute(local(leaf)) for leaf in tree.leaves(part)]
        places = (
            [Placement((), torch.float32)] * len(leaves) if self.params is None else tree.leaves(select(self.params))
        )
        with self._phase("gather"):
            flying = [
                (members, collectives.start_all_gather(_flat([leaves[i] for i in members]), self.mesh.group(axes)))
                for axes, members in _by_axes(places).items()
                if axes
            ]

        def finish() -> Params:
            with self._phase("gather"):
                while flying:
                    members, gathered = flying.pop()
                    rows = collectives.wait(gathered).view(self.mesh.size(places[members[0]].axes), -1)
                    pieces = rows.split([leaves[i].numel() for i in members], dim=1)
                    for i, piece in zip(members, pieces, strict=True):
                        leaves[i] = _assemble(piece, leaves[i].shape, places[i])
            return _like(part, leaves)

        return finish

    def to_reduce(self, grads: Params) -> Params:
        """Returns a stage's gradients in the type that they are added up in."""
        return tree.map(lambda grad: grad.to(self.reduce or grad.dtype), grads)

    def reduction(self, select: Select, grads: Params) -> Reduction:
        """Adds up every process's gradients, whole ones of what `select` takes, in the background; see `Reduction`."""
        if self.grads is None:
            return grads
        if self.mesh.size() == 1:
            return tree.map(self._to_home, grads, select(self.grads))
        places, found = tree.leaves(select(self.grads)), tree.leaves(grads)
        groups = _by_axes(places)
        with self._phase("reduce"):
            flats = [
                torch.cat([_pieces(found[i], places[i], self.mesh) for i in members], dim=1).view(-1)
                for members in groups.values()
            ]
            del found, grads
            flats = [self._start_scatter(flat, axes) for flat, axes in zip(flats, groups, strict=True)]
        yield
        with self._phase("reduce"):
            flats = [self._start_sum(flat, axes) for flat, axes in zip(flats, groups, strict=True)]
        yield
        parts: dict[int, Tensor] = {}
        with self._phase("reduce"):
            for flat, axes, members in zip(flats, groups, groups.values(), strict=True):
                flat = collectives.wait(flat) if self._others(axes) is not None else flat
                shapes = [places[i].local_shape(self.mesh) for i in members]
                for i, piece, shape in zip(members, flat.split([math.prod(s) for s in shapes]), shapes, strict=True):
                    parts[i] = self._to_home(piece.view(shape), places[i])
        return _like(select(self.grads), [parts[i] for i in range(len(places))])

    def owned(self, params: Params) -> Params:
        """Returns what this process updates of the parameters that it has: those whose gradients it gets.

        It shares their memory, where it need not be copied to be contiguous; see `publish`.
        """
        if self.grads is None:
            return params
        return tree.map(
            lambda leaf, has, gets: self._slice(leaf, has, gets).contiguous(), params, self.params, self.grads
        )

    @torch.no_grad()
    def publish(self, owned: Params, params: Params) -> None:
        """Writes what every process has updated into the parameters that more than one has."""
        if self.grads is None:
            return
        mine, leaves, has, gets = map(tree.flatten, (owned, params, self.params, self.grads))
        finer = {path: gets[path] for path in leaves if gets[path].axes != has[path].axes}
        gathering = replace(self, params=finer, compute=None, device=None)
        for paths in tree.bundles({path: leaves[path].nbytes for path in finer}, BUNDLE_BYTES):
            whole = gathering.start_gather(lambda flat, paths=paths: {path: flat[path] for path in paths}, mine)()
            for path, leaf in whole.items():
                leaves[path].copy_(leaf)

    def _slice(self, leaf: Tensor, has: Placement, gets: Placement) -> Tensor:
        return leaf if has.axes == gets.axes else leaf[gets.local(self.mesh)]

    def split(self, carry: dict, const: dict) -> tuple[dict, dict]:
        """Returns this process's part of a chain's first carry and its const; see `path.inputs`."""
        out = {**carry, **const}
        for name, (axes, dim) in self.splits.items():
            # The rotary table is of text and then of image, each of which is split by itself.
            first = const["text_length"] if name == "rope" else 0
            out[name] = tree.map(lambda x, at=(dim, first, axes): self._part(x, *at), out[name])
        out["text_length"] = out["txt"].shape[1]
        return {name: out[name] for name in carry}, {name: out[name] for name in const}

    def _part(self, x: Tensor, dim: int, first: int, axes: tuple[str, ...]) -> Tensor:
        count, index = self.mesh.size(axes), self.mesh.index(axes)
        pieces = x.split([first, x.shape[dim] - first], dim) if first else [x]
        return torch.cat([piece.chunk(count, dim)[index] for piece in pieces], dim)

    def _to_compute(self, shard: Tensor) -> Tensor:
        return shard.to(self.device or shard.device, self.compute or shard.dtype, non_blocking=True)

    def _to_home(self, grad: Tensor, place: Placement) -> Tensor:
        return grad.to(self.home or grad.device, place.dtype)

    def _start_scatter(self, flat: Tensor, axes: tuple[str, ...]) -> Tensor:
        group = self.mesh.group(axes)
        return flat if group is None else collectives.start_reduce_scatter(flat, group)

    def _start_sum(self, flat: Tensor, axes: tuple[str, ...]) -> Tensor:
        flat = flat if self.mesh.group(axes) is None else collectives.wait(flat)
        group = self._others(axes)
        return flat if group is None else collectives.start_all_reduce(flat, group)

    def _phase(self, name: str) -> contextlib.AbstractContextManager:
        # One process neither gathers nor reduces.
        return phase(name) if self.mesh.size() > 1 else contextlib.nullcontext()

    def _others(self, axes: tuple[str, ...]) -> collectives.Group:
        return self.mesh.group([axis for axis in AXES if axis not in axes])


ONE_PROCESS = Sharding()


class Stream:
    """Parameters, stage after stage as they are visited, the next ones on their way.

    What `take` returns is held on to by no one else, but for a stage that is visited twice running.
    """

    def __init__(self, sharding: Sharding, params: Params, visits: Sequence[Select]):
        """Takes the visits in order, each of which selects a stage's part of a tree; nothing is gathered yet."""
        self._sharding, self._params, self._visits = sharding, params, visits
        self._flying: dict[int, Callable[[], Params]] = {}
        self._next, self._kept = 0, None

    def take(self) -> Params:
        """Returns the whole parameters of the next visit."""
        self._start_until(self._next + 1)
        whole = self._kept if self._kept is not None else self._flying.pop(self._next)()
        self._next += 1
        self._start_until(self._next + self._sharding.prefetch)
        self._kept = whole if self._twice(self._next) else None
        return whole

    def _start_until(self, end: int) -> None:
        for at in range(self._next, min(end, len(self._visits))):
            if at not in self._flying and not self._twice(at):
                self._flying[at] = self._sharding.start_gather(self._visits[at], self._params)

    def _twice(self, at: int) -> bool:
        return 0 < at < len(self._visits) and self._visits[at] is self._visits[at - 1]


def gathering(sharding: Sharding, params: Params, stages: Sequence[Stage], ops: Ops = Ops()) -> Ops:
    """Returns `ops` that gather each stage's parameters before it, for forward passes over sharded parameters.

    Every process is to make the same forward passes in the same order, each of them from the first stage to the last.

    Args:
      sharding: where the parameters are.
      params: what this process has of them; the passes are to be given the same tree.
      stages: those of the passes, in order.
      ops: how the rest is done.
    """
    take = taker(sharding, params, {stage.name: stage.select for stage in stages if stage.keys})

    def wrap_stage(fn: Callable, stage: Stage) -> Callable:
        wrapped = ops.wrap_stage(fn, stage)
        return (lambda part, carry, const: wrapped(take(stage.name), carry, const)) if stage.keys else wrapped

    return replace(ops, wrap_stage=wrap_stage)


def taker(sharding: Sharding, params: Params, visits: Mapping[str, Select]) -> Callable[[str], Params]:
    """Returns a function from a stage's name to its whole parameters, for passes that visit all in this order."""
    names, stream = list(visits), [None]

    def take(name: str) -> Params:
        if name == names[0]:
            stream[0] = Stream(sharding, params, list(visits.values()))
        return stream[0].take()

    return take


def _by_axes(places: Sequence[Placement]) -> dict[tuple[str, ...], list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, place in enumerate(places):
        groups.setdefault(place.axes, []).append(i)
    return groups


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def _assemble(piece: Tensor, shape: torch.Size, place: Placement) -> Tensor:
    """Returns the leaf of which each process gave a row of `piece` [n, numbers]."""
    return piece.reshape(-1, *shape).movedim(0, place.dim).reshape(place.shape)


def _pieces(grad: Tensor, place: Placement, mesh: Mesh) -> Tensor:
    """Returns what each process is to get of a whole gradient, [n, numbers]: the inverse of `_assemble`."""
    count = mesh.size(place.axes)
    if count == 1:
        return grad.reshape(1, -1)
    return grad.unflatten(place.dim, (count, -1)).movedim(place.dim, 0).reshape(count, -1)


def _like(part: Params, leaves: Sequence[Tensor]) -> Params:
    each = iter(leaves)
    return tree.map(lambda _: next(each), part)


# From the config.


def from_config(
    config: Any, shapes: Params, mesh: Mesh, compute: torch.dtype, reduce: torch.dtype, device: torch.device
) -> Sharding:
    """Returns the sharding of a run.

    Args:
      config: of the run; its `parallel` is read.
      shapes: the parameters, meta tensors too, in the type that they are kept in.
      mesh: the processes.
      compute, reduce, device: see `Sharding`.

    Raises:
      UserError: a table that cannot be honoured.
    """
    p, flat = config.parallel, tree.flatten(shapes)
    params = placements.resolve(p.params, flat, mesh, "parallel.params")
    grads = placements.resolve(p.moments, flat, mesh, "parallel.moments") if p.moments else params
    for path, place in params.items():
        if place.axes and (place.axes, place.dim) != (grads[path].axes, grads[path].dim):
            raise UserError(
                f"parallel.moments has {path} as {placements.say(grads[path], mesh)} and parallel.params as "
                f"{placements.say(place, mesh)}: moments are split as the parameters are, or where those are repeated"
            )
    batch_axes, splits = _batch_axes(p.batch, mesh), _splits(p.activations, mesh)
    if splits and "context" in batch_axes:
        raise UserError(
            f"parallel.batch splits samples over context={mesh.sizes['context']}, and parallel.activations their "
            f"sequences: leave context out of the one, or set --config.parallel.activations='()'"
        )
    return Sharding(
        mesh=mesh,
        params=_like(shapes, [params[path] for path in flat]),
        grads=_like(shapes, [grads[path] for path in flat]),
        batch_axes=batch_axes,
        splits=splits,
        compute=compute,
        reduce=reduce,
        prefetch=p.prefetch,
        device=device,
        home=torch.device("cpu") if p.offload else device,
    )


def _batch_axes(table: placements.Table, mesh: Mesh) -> tuple[str, ...]:
    placements.check(table, dict.fromkeys(BATCH, 1), "parallel.batch")
    rows = {name: placements.row(table, name) for name in BATCH}
    first = rows["latents"]
    for name, row in rows.items():
        if row != first or any(row.values()):
            raise UserError(
                f"parallel.batch has {name} as {dict(row)}: every part of a batch is split over the same axes, along "
                f"dimension 0"
            )
    return tuple(axis for axis in AXES if axis in first)


def _splits(table: placements.Table, mesh: Mesh) -> dict[str, tuple[tuple[str, ...], int]]:
    placements.check(table, {name: dim + 1 for name, dim in SEQUENCES.items()}, "parallel.activations")
    rows = {name: placements.row(table, name) for name in SEQUENCES}
    for name, row in rows.items():
        if dict(row) not in ({}, {"context": SEQUENCES[name]}) or bool(row) != bool(rows["img"]):
            raise UserError(
                f"parallel.activations has {name} as {dict(row)}: should be {{'context': {SEQUENCES[name]}}}, the "
                f"sequence, for {', '.join(SEQUENCES)} together, or nothing for any of them"
            )
    return {name: (("context",), dim) for name, dim in SEQUENCES.items() if rows[name] and mesh.sizes["context"] > 1}
