"""Rematerialization: a function that keeps its inputs alone, and is run again when a derivative of it is asked for.

    loss = ff.loss(params, cfg, batch, ops=remat.ops())             # every stage; or remat.ops("attention"), kept

torch.func.grad lets go of nothing until it has returned, so what it saves there is more than the activations; in the
training fold (`ff.grad_and_value`), which frees as it goes, it is those alone.

After Griewank & Walther 2000 and Chen et al. 2016, arXiv:1604.06174; policies by name as jax.checkpoint has them. It
goes through torch.autograd and through every transform of torch.func, in any nesting, because derivatives of a
rematerialized function, forward and backward, and its map over a batch, are rematerialized functions again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import optree
import torch
from torch import Tensor

from flux_func.models import kernels, layers
from flux_func.models.attention import join_heads, split_heads
from flux_func.models.stages import Stage
from flux_func.transforms import captured

Policy = frozenset[str]
# A function of tensors alone, to a tuple of tensors.
Flat = Callable[..., tuple[Tensor, ...]]
# What an operation gives when it is kept: its result, and what else its backward needs.
Kept = tuple[Tensor, ...]


def remat(fn: Callable, policy: Policy | None = None) -> Callable:
    """Returns `fn`, keeping its arguments alone for its derivatives.

    Forward mode is that of torch.func.jvp: torch.autograd.forward_ad by itself is refused by torch, as nested.

    Args:
      fn: a pure function of trees; leaves that are no tensors are constants. Every tensor that is differentiated or
        mapped over has to be among its arguments: any other would silently get a gradient of zero. So have random
        numbers: drawn inside, from torch's own generators, they would be others when it is run again.
      policy: the operations whose results are kept, see `keep`; None: none. It is honoured in the gradient itself;
        under vmap, in forward mode and in the derivatives of the gradient all is computed again, to the same numbers.

    Raises:
      ValueError: when it is called. `fn` holds a tensor that is being differentiated or mapped over: in its closure,
        its bound arguments, defaults or attributes, in a global variable that it names, or in the attributes of objects
        that it so holds and of their classes. (Functions, modules and classes by global names are not looked into, nor
        are more than 10,000 objects.) Or `fn` does not run an operation that the policy keeps.
    """
    _check_policy(policy)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return _call(fn, policy, args, kwargs)

    return wrapped


def stages(policy: Policy | None = None) -> Callable[[Callable, Stage], Callable]:
    """Returns an `Ops.wrap_stage` that rematerializes each stage that has parameters.

    The others would only hold on to their input, which the stage before need not keep.

    Args:
      policy: as for `remat`; a stage that does not run an operation keeps nothing of it.
    """
    _check_policy(policy)

    def wrap_stage(fn: Callable, stage: Stage) -> Callable:
        if not stage.keys:
            return fn
        return lambda *args: _call(fn, policy, args, {}, all_met=False)

    return wrap_stage


def ops(*names: str) -> layers.Ops:
    """Returns ops by which stages are rematerialized, keeping the results of "attention", "linear", both or neither.

    Raises:
      ValueError: another name.
    """
    kept = {"attention": attention, "linear": linear}
    if unknown := set(names) - set(kept):
        raise ValueError(f"{unknown.pop()!r} should be one of {', '.join(map(repr, kept))}")
    return layers.Ops(**{name: kept[name] for name in names}, wrap_stage=stages(keep(*names) if names else None))


def keep(*names: str) -> Policy:
    """Returns the policy that keeps the results of the operations of these names; this module names two.

    A name is an operation's (`named`) and not a value's, as with jax.checkpoint_name: without a compiler, what
    computes a value has run before the value could be replaced.
    """
    return frozenset(names)


def named(op: Callable, name: str, forward: Callable[..., Kept], backward: Callable[..., tuple]) -> Callable:
    """Returns `op` as an operation that a policy may keep; where none does it is `op`, with all its derivatives.

    Args:
      op: `(*args) -> tensor`, of trees.
      name: what policies call it.
      forward: `(*args) -> (what op returns, *tensors)`: all that is kept.
      backward: `(grad, kept, *args) -> gradients`, a tuple of trees like args, with None for a leaf that is no tensor
        or does not require a gradient. First order is enough.
    """

    @functools.wraps(op)
    def run(*args: Any) -> Tensor:
        tape = _tape.get()
        # An operation within another transform, inside the function that is run, is that transform's to differentiate.
        if tape is None or tape.level != _level():
            return op(*args)
        tape.met.add(name)
        if name not in tape.policy:
            return op(*args)
        if tape.given is None:
            tape.kept.append(tuple(forward(*args)))
            return tape.kept[-1][0]
        kept = next(tape.given)
        leaves, form = optree.tree_flatten(args, none_is_leaf=True)

        def pull(grad: Tensor, leaves: Sequence) -> list[Tensor | None]:
            return optree.tree_leaves(backward(grad, kept, *optree.tree_unflatten(form, leaves)), none_is_leaf=True)

        return _Given.apply(kept[0], pull, *leaves)

    return run


# Functions of trees as functions of tensors.


def _call(fn: Callable, policy: Policy | None, args: tuple, kwargs: dict, all_met: bool = True) -> Any:
    leaves, form = optree.tree_flatten((args, kwargs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    tensors, constants = _split(is_tensor, leaves)
    captured.check(_name(fn), [("", fn), *(("a constant", value) for value in constants)])
    result: list = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = optree.tree_unflatten(form, _merge(is_tensor, tensors, constants))
        leaves, out_form = optree.tree_flatten(fn(*args, **kwargs))
        mask = [isinstance(leaf, Tensor) for leaf in leaves]
        found, rest = _split(mask, leaves)
        result[:] = out_form, mask, rest
        return tuple(found)

    run = _Recording(flat, policy, _name(fn) if all_met else None) if policy else flat
    found = _Remat.apply(run, flat, *tensors)
    out_form, mask, rest = result
    return optree.tree_unflatten(out_form, _merge(mask, found, rest))


def _split(mask: Sequence[bool], values: Sequence) -> tuple[list, list]:
    pairs = list(zip(mask, values, strict=True))
    return [value for chosen, value in pairs if chosen], [value for chosen, value in pairs if not chosen]


def _merge(mask: Sequence[bool], chosen: Sequence, rest: Sequence) -> list:
    """`_split`'s inverse."""
    chosen, rest = iter(chosen), iter(rest)
    return [next(chosen if which else rest) for which in mask]


# Rematerialization of a function of tensors. Each rule below ends in `_Remat.apply`, so that there is no highest order
# of derivatives, and none that keeps more than inputs.


class _Remat(torch.autograd.Function):
    """(run, fn, *tensors) to `run(*tensors)`, which is `fn(*tensors)` done in some way; `fn` is differentiated."""

    @staticmethod
    def forward(run: Flat, fn: Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
        del fn
        # An input that is returned as it is would be taken for one that was changed in place.
        return tuple(x.view_as(x) if any(x is y for y in tensors) else x for x in _taped(None, run, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        run, ctx.fn, *tensors = inputs
        ctx.count, ctx.mask = len(tensors), [x.is_floating_point() for x in output]
        ctx.mark_non_differentiable(*_split(ctx.mask, output)[1])
        kept = run.kept if isinstance(run, _Recording) else []
        # Not `run` itself, which would hold on to what it kept when the graph lets go of it.
        ctx.replay = functools.partial(_replaying, ctx.fn, getattr(run, "policy", None), [len(x) for x in kept])
        ctx.save_for_backward(*tensors, *(x for group in kept for x in group))
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        wanted, saved = ctx.needs_input_grad[2:], ctx.saved_tensors
        pull = run = _pull(ctx.fn, wanted, ctx.mask)
        if len(saved) > ctx.count:
            run = _pull(ctx.replay(saved[ctx.count :]), wanted, ctx.mask)
        found = _Remat.apply(run, pull, *saved[: ctx.count], *_split(ctx.mask, grads)[0])
        return None, None, *_merge(wanted, found, [None] * ctx.count)

    @staticmethod
    def jvp(ctx: Any, _run: None, _fn: None, *tangents: Tensor | None) -> tuple:
        moved = [tangent is not None for tangent in tangents]
        push = _push(ctx.fn, moved, ctx.mask)
        found = _Remat.apply(push, push, *ctx.saved_tensors[: ctx.count], *_split(moved, tangents)[0])
        return tuple(_merge(ctx.mask, found, [None] * len(ctx.mask)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, run: Flat, fn: Flat, *tensors: Tensor) -> tuple:
        mapped = torch.func.vmap(fn, in_dims[2:], randomness=info.randomness)
        return _Remat.apply(mapped, mapped, *tensors), 0


def _pull(fn: Flat, wanted: Sequence[bool], mask: Sequence[bool]) -> Flat:
    """Returns (*tensors, *cotangents of the outputs in mask) to the gradients of the wanted tensors."""

    def pull(*args: Tensor) -> tuple[Tensor, ...]:
        tensors, cotangents = args[: len(wanted)], args[len(wanted) :]
        moving, fixed = _split(wanted, tensors)
        _, vjp = torch.func.vjp(lambda *moving: _masked(fn(*_merge(wanted, moving, fixed)), mask), *moving)
        # Only where the gradient is differentiated does its graph have to be kept, and that is most of the memory.
        again = torch.is_grad_enabled()
        return vjp(tuple(cotangents), retain_graph=again, create_graph=again)

    return pull


def _push(fn: Flat, moved: Sequence[bool], mask: Sequence[bool]) -> Flat:
    """Returns (*tensors, *tangents of the moved ones) to the tangents of the outputs in mask."""

    def push(*args: Tensor) -> tuple[Tensor, ...]:
        tensors, tangents = args[: len(moved)], args[len(moved) :]
        moving, fixed = _split(moved, tensors)
        # Cotangents and tangents may be expanded, or zeros without memory, neither of which can have a tangent.
        moving = [x.clone() for x in moving]
        # With gradients enabled, gradients in fn are made of operations that have forward mode.
        with torch.enable_grad():
            _, out = torch.func.jvp(
                lambda *moving: _masked(fn(*_merge(moved, moving, fixed)), mask), tuple(moving), tuple(tangents)
            )
        return out

    return push


def _masked(outputs: tuple[Tensor, ...], mask: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(_split(mask, outputs)[0])


# Policies: a run has a tape, on which operations put what is kept, or from which they get it.


@dataclasses.dataclass
class _Tape:
    """What is kept of a run, or given to it; its operations are those at the same depth of transforms, `level`."""

    policy: Policy
    given: Iterator[Kept] | None = None
    level: int | None = dataclasses.field(default_factory=lambda: _level())
    kept: list[Kept] = dataclasses.field(default_factory=list)
    met: set[str] = dataclasses.field(default_factory=set)


# The tape of the run under way in this thread: how an operation finds it. Set while `_taped` runs its function.
_tape: ContextVar[_Tape | None] = ContextVar("remat_tape", default=None)


def _taped(tape: _Tape | None, fn: Flat, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    token = _tape.set(tape)
    try:
        return fn(*tensors)
    finally:
        _tape.reset(token)


def _level() -> int | None:
    return torch._C._functorch.maybe_current_level()


class _Recording:
    """`fn`, keeping what the policy says; `name` is the function to blame if that does not come up, None: nobody."""

    def __init__(self, fn: Flat, policy: Policy, name: str | None):
        self.fn, self.policy, self.name, self.kept = fn, policy, name, []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tape = _Tape(self.policy)
        out = _taped(tape, self.fn, tensors)
        if self.name and not self.policy <= tape.met:
            missing, known = min(self.policy - tape.met), ", ".join(map(repr, sorted(tape.met))) or "none"
            raise ValueError(
                f"policy keeps {missing!r}: {self.name} should run an operation of that name, it runs {known}"
            )
        self.kept = tape.kept
        return out


def _replaying(fn: Flat, policy: Policy, lengths: Sequence[int], kept: Sequence[Tensor]) -> Flat:
    """Returns `fn` with what was kept, in groups of these lengths, in the place of what it came from."""
    parts = iter(kept)
    groups = [tuple(next(parts) for _ in range(length)) for length in lengths]
    return lambda *tensors: _taped(_Tape(policy, iter(groups)), fn, tensors)


class _Given(torch.autograd.Function):
    """(result, pull, *leaves) to the result, as if computed from the leaves; `pull` gives their gradients."""

    @staticmethod
    def forward(result: Tensor, pull: Callable, *leaves: Any) -> Tensor:
        del pull, leaves
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.pull, *leaves = inputs
        ctx.mask = [isinstance(leaf, Tensor) for leaf in leaves]
        tensors, ctx.constants = _split(ctx.mask, leaves)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, *ctx.pull(grad, _merge(ctx.mask, ctx.saved_tensors, ctx.constants))


# The two operations of the model that are worth keeping.


def _attention_forward(q: Tensor, k: Tensor, v: Tensor) -> Kept:
    out, total = kernels.block(*map(kernels.packed, (q, k, v)))
    return join_heads(out.to(q.dtype)), total


def _attention_backward(grad: Tensor, kept: Kept, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    grad, out = (split_heads(x, q.shape[1]) for x in (grad, kept[0]))
    grads = kernels.block_backward(*map(kernels.packed, (grad, q, k, v)), out, kept[1])
    return tuple(x.to(q.dtype) for x in grads)


def _linear_backward(grad: Tensor, kept: Kept, params: layers.Params, x: Tensor, path: str) -> tuple:
    flat = grad.flatten(0, -2)
    grads = {"weight": lambda: flat.mT @ x.flatten(0, -2), "bias": lambda: flat.sum(0)}
    of_params = {name: grads[name]() if leaf.requires_grad else None for name, leaf in params.items()}
    return of_params, grad @ params["weight"] if x.requires_grad else None, None


attention = named(layers.attention, "attention", _attention_forward, _attention_backward)
linear = named(layers.linear, "linear", lambda *args: (layers.linear(*args),), _linear_backward)


# What is wrong is said.


def _check_policy(policy: Policy | None) -> None:
    if policy is not None and not (isinstance(policy, frozenset) and policy):
        raise ValueError(f"policy is {policy!r}: should be None or what remat.keep returns, as in keep('attention')")


def _name(fn: Callable) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__name__)
