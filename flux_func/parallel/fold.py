"""The training fold: the chain of stages forward, and its vjp folded backward.

The same numbers as differentiating `ff.loss`, in less memory and time: gradients appear stage by stage, and what a
stage kept for its backward pass is freed as soon as that has run. A stage's parameters are gathered when it is their
turn, forward and again backward, and not held on to in between (`parallel/sharding.py`). `remat="full"` keeps each
stage's input alone and runs the stage again on the way back (Griewank & Walther 2000; Chen et al. 2016,
arXiv:1604.06174); "selective" keeps the results of attention too.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage, bind
from flux_func.parallel.sharding import ONE_PROCESS, Reduction, Sharding, Stream
from flux_func.parallel.timeline import phase
from flux_func.transforms import selective
from flux_func.transforms.remat import Policy

Pull = Callable[[Any], tuple]
Vjp = Callable[..., tuple[Any, Pull]]
# (fn, params, *carry) to (fn(params, *carry), pull); `pull(cotangent, params)` is given the parameters again.
Visit = Callable[..., tuple[Any, Callable[[Any, Params], tuple]]]


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
        if not pairs:  # as of a stage that has no trained parameters
            return tree.map(torch.zeros_like, detached)
        outs, grads = zip(*pairs, strict=True)
        wanted = iter(torch.autograd.grad(outs, tree.leaves(detached), grads, materialize_grads=True))
        return tree.map(lambda leaf: next(wanted), detached)

    return tree.map(torch.Tensor.detach, out), pull


def _lending_vjp(
    numbers: dict, fn: Callable, params: Params, *carry: tree.Tree
) -> tuple[Any, Callable[[Any, Params], tuple]]:
    """A visit by `autograd_vjp` that does not hold on to the parameters.

    What the graph would save of them, weights for the gradients of their inputs, is put down as a place among them.
    In the graph stand-ins of theirs are differentiated, each an element of `numbers` {type: scalar} repeated.
    """
    lent = tree.leaves(params)
    places = {leaf.untyped_storage()._cdata: place for place, leaf in enumerate(lent)}

    def pack(saved: Tensor) -> Any:
        place = places.get(saved.untyped_storage()._cdata)
        if place is None:
            return saved
        return place, saved.shape, saved.stride(), saved.storage_offset() - lent[place].storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        place, shape, strides, offset = kept
        return lent[place].as_strided(shape, strides, lent[place].storage_offset() + offset)

    numbers.update({leaf.dtype: leaf.new_empty(()) for leaf in lent if leaf.dtype not in numbers})
    stand_ins = tree.map(lambda leaf: numbers[leaf.dtype].expand(leaf.shape), params)

    def run(stand_ins: Params, *carry: tree.Tree) -> Any:
        named = iter(_Lend.apply(*tree.leaves(stand_ins), *lent))
        with saved_tensors_hooks(pack, unpack):
            return fn(tree.map(lambda _: next(named), stand_ins), *carry)

    out, inner = autograd_vjp(run, stand_ins, *carry)
    lent, params = [], None

    def pull(cotangent: tree.Tree, params: Params) -> tuple:
        nonlocal lent
        lent = tree.leaves(params)
        return inner(cotangent)

    return out, pull


class _Lend(torch.autograd.Function):
    """Parameters' values under stand-ins' names: the graph knows the stand-ins, which take no memory."""

    @staticmethod
    def forward(ctx: Any, *stand_ins_and_leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        leaves = stand_ins_and_leaves[len(stand_ins_and_leaves) // 2 :]
        return tuple(leaf.detach() for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *grads, *(None for _ in grads)


def _keep(vjp: Vjp) -> Visit:
    """A visit that keeps what the backward pass needs, but for the parameters where `vjp` can do without."""
    if vjp is autograd_vjp:
        return functools.partial(_lending_vjp, {})

    def keeping(fn: Callable, params: Params, *carry: tree.Tree) -> tuple[Any, Callable[[Any, Params], tuple]]:
        out, pull = vjp(fn, params, *carry)
        return out, lambda cotangent, params: pull(cotangent)

    return keeping


def _recompute(vjp: Vjp) -> Visit:
    """A visit that keeps the stage's input alone, and runs the stage again when pulled."""

    def recomputing(fn: Callable, params: Params, *carry: tree.Tree) -> tuple[Any, Callable[[Any, Params], tuple]]:
        with _value_alone(vjp):
            out = fn(params, *carry)
        return out, lambda cotangent, params: vjp(fn, params, *carry)[1](cotangent)

    return recomputing


def _value_alone(vjp: Vjp) -> contextlib.AbstractContextManager:
    # By another vjp the step may be differentiated through, the value too.
    return torch.no_grad() if vjp is autograd_vjp else contextlib.nullcontext()


def _select(keep: Policy, vjp: Vjp) -> Visit:
    """A visit that keeps the stage's input and the results of some operations, and does the rest again when pulled."""

    def selecting(
        fn: functools.partial, params: Params, *carry: tree.Tree
    ) -> tuple[Any, Callable[[Any, Params], tuple]]:
        ops, const = fn.keywords["ops"], fn.keywords["const"]
        with _value_alone(vjp):
            out = functools.partial(fn, ops=selective.recording(ops, keep))(params, *carry)
        again = {"ops": selective.replaying(ops, keep), "const": const | {selective.KEPT: out.pop(selective.KEPT)}}
        return out, lambda cotangent, params: vjp(functools.partial(fn, **again), params, *carry)[1](cotangent)

    return selecting


REMAT = {"none": _keep, "full": _recompute, "selective": functools.partial(_select, frozenset({"attention"}))}


def visit(policy: str | Policy, vjp: Vjp) -> Visit:
    """Returns how a fold visits a stage under a policy of rematerialization; ValueError for one there is not."""
    if isinstance(policy, frozenset):
        return _select(policy, vjp)
    if not isinstance(policy, str) or policy not in REMAT:
        raise ValueError(f"remat {policy!r} should be one of {', '.join(map(repr, REMAT))}, or of ff.remat.keep")
    return REMAT[policy](vjp)


def grad_and_value(
    params: Params,
    cfg: flux.FluxConfig,
    batch: Mapping[str, Tensor],
    ops: Ops = Ops(),
    remat: str | Policy = "none",
    *,
    denominator: float | None = None,
    into: Params | None = None,
    vjp: Vjp = autograd_vjp,
    sharding: Sharding = ONE_PROCESS,
    last: bool = True,
) -> tuple[Params, Tensor]:
    """Returns (gradients, loss) of `ff.loss`, as torch.func.grad_and_value(ff.loss) would.

    Args:
      params, cfg, batch, ops, denominator: as for `ff.loss`. Sharded, params are what this process has of them and
        batch its samples; the denominator is then to be given, times `sharding.repeats`.
      remat: "none"; "full": each stage is run again in the backward pass; "selective": all of it but attention; or
        `ff.remat.keep(...)`, but what that names: "attention" and patterns of linears (`selective.recording`).
      into: gradients so far, to which these are added in place: accumulation over micro-batches.
      vjp: how a stage is differentiated; torch.func.vjp to differentiate through the step.
      sharding: where the parameters are and where their gradients go; by default, one process.
      last: whether no micro-batch is to follow. Gradients are added up over the processes after the last one; before,
        they are whole, this process's alone, and in `sharding.reduce`.

    Returns:
      The gradients, of what `sharding.grads` gives this process, and this process's part of the loss.

    Raises:
      ValueError: a policy that does not exist or keeps what there is not, parameters of another model, or shapes that
        do not fit.
    """
    visiting, pulls = visit(remat, vjp), []
    # What is of several processes its state was built for, by this very cfg.
    if sharding is ONE_PROCESS:
        flux.check_params(params, cfg, ops)
    if isinstance(remat, frozenset):
        selective.check(remat, cfg)
    carry, const = sharding.split(*path.inputs(cfg, batch, denominator))
    chain = units(path.chain(cfg))
    selects = [unit[0].select for unit in chain]
    stream = Stream(sharding, params, [*selects, *reversed(selects)])
    for unit in chain:
        run = functools.partial(run_unit, unit, ops=ops, const=const)
        with phase(unit[0].name):
            if pulls:
                carry, pull = visiting(run, stream.take(), carry)
            else:
                # The batch itself is not differentiated: the first stage is a function of its parameters alone.
                carry, pull = visiting(functools.partial(run, carry=carry), stream.take())
        pulls.append((unit[0], pull))
    loss, cotangent = carry["loss"], {"loss": torch.ones_like(carry["loss"])}
    del carry, const, run, pull
    gradients = _Gradients(sharding, into, last)
    while pulls:
        stage, pull = pulls.pop()
        with phase(f"{stage.name} backward"):
            part, *rest = pull(cotangent, stream.take())
        cotangent = rest[0] if rest else None
        del pull
        gradients.add(stage, part)
        del part
    return gradients.collect(params), loss.detach()


class _Gradients:
    """The gradients of a fold's stages, from the last to the first, added up in the background."""

    def __init__(self, sharding: Sharding, into: Params | None, last: bool):
        self._sharding, self._into, self._last = sharding, into, last
        self._running: deque[tuple[Stage, Reduction]] = deque()
        self._parts: list[tuple[Stage, Params]] = []

    def add(self, stage: Stage, part: Params) -> None:
        """Takes a stage's gradients; the sums under way go one step on."""
        part = self._sharding.to_reduce(part)
        if self._into is not None:
            part = _add(stage.select(self._into), part)
        if not self._last:
            self._parts.append((stage, part))
            return
        self._running.append((stage, self._sharding.reduction(stage.select, part)))
        del part
        self._advance()

    def collect(self, like: Params) -> Params:
        """Waits for all sums; returns the tree of gradients, its keys in the order of `like`'s."""
        while self._running:
            self._advance()
        grads: Params = {}
        for stage, part in reversed(self._parts):
            stage.place(grads, part)
        return {key: grads[key] for key in like}

    def _advance(self) -> None:
        for _ in range(len(self._running)):
            stage, reduction = self._running.popleft()
            try:
                next(reduction)
                self._running.append((stage, reduction))
            except StopIteration as done:
                self._parts.append((stage, done.value))


def units(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Groups each stage with those without parameters after it: alone they would only keep their input alive."""
    grouped: list[list[Stage]] = []
    for stage in stages:
        if stage.keys:
            grouped.append([stage])
        else:
            grouped[-1].append(stage)
    return grouped


def run_unit(unit: list[Stage], part: Params, carry: dict, *, ops: Ops, const: dict) -> dict:
    """Returns the carry after a unit, of whose stages the first has the parameters `part`."""
    for stage in unit:
        carry = bind(stage, ops)(part if stage.keys else {}, carry, const)
    return carry


def _add(total: Params, part: Params) -> Params:
    if tree.leaves(part):
        torch._foreach_add_(tree.leaves(total), tree.leaves(part))
    return total
