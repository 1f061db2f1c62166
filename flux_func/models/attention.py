"""Attention with every first and second derivative, in memory linear in the tokens.

Value and gradient are torch's own kernels (Dao 2023, arXiv:2307.08691), which have neither forward mode nor a second
derivative. These functions close attention under differentiation up to the second order, forward (jvp) and
backward (vjp):

  `_Attention`        o(q, k, v)
  `_Backward`         the gradients of <g, o>
  `_Tangent`          o' along tangents of q, k, v
  `_BackwardTangent`  the gradients' tangent; also the gradients of <c, o'>, the Hessian of <c, o> being symmetric
  `_SecondTangent`    o' along further tangents

The last two end the chain: a third derivative is refused. Their matrix products go over blocks of some queries and all
keys. With weights p = softmax(s) a change x of the scores s changes p by p * (x - sum(p * x)), which is also how a
gradient comes through the softmax; `_centred` is the bracket, and all of it here. Shapes: B batch, H heads, L tokens,
D head size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_func.models import kernels
from flux_func.models.kernels import Pair

# (forward, given, *args) to forward(*args)[0], all of which it keeps; or to given(*args, *kept), the same again.
Tape = Callable[..., Tensor]


# By torch's own names: torch.compile would trace einops' parser, which was most of what it traced of a block.


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Returns x [B, L, H*D] as [B, H, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Returns x [B, H, L, D] as [B, L, H*D]: `split_heads`' inverse."""
    return x.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "", tape: Tape | None = None) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v of every token to every token; [B, H, L, D] each, to [B, L, H*D].

    k and v may have another length than q. All of torch.func's and torch.autograd's transforms apply, forward and
    backward, up to second derivatives; inside torch.compile those of F.scaled_dot_product_attention do.

    Args:
      q, k, v: [B, H, L, D] each.
      kernel: of value and gradient, one of `kernels.KERNELS`; "": the one that torch would take.
      tape: where the result is kept, or comes from (`transforms/selective.py`); first derivatives alone.

    Raises:
      ValueError: shapes that do not go together, or a kernel that the device has not.
      NotImplementedError: a third derivative is asked for.
    """
    if q.shape[:2] != k.shape[:2] or q.shape[-1:] != k.shape[-1:] or k.shape != v.shape or q.ndim != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v should be [B, H, L, D] of one B, H and D, and k as long as v; they are {shapes}")
    compiling = torch.compiler.is_compiling()
    if (compiling or q.is_meta) and not kernel and tape is None:
        # Dynamo refuses functions that have forward mode or vmap of their own; without memory none is to be saved.
        return join_heads(F.scaled_dot_product_attention(q, k, v))
    given = *map(kernels.packed, (q, k, v)), kernel
    if tape is not None:
        return join_heads(tape(_value, _Given.apply, *given))
    return join_heads((_Once if compiling else _Attention).apply(*given)[0])


def _value(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    out, total = kernels.block(q, k, v, kernel)
    return out.to(q.dtype), total


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.to(q.dtype) for x in kernels.block_backward(kernels.packed(grad), q, k, v, out, total, kernel))


# The functions. Each takes tensors whose first dimension is the batch, None for zero, and the kernel's name.


class _Batched(torch.autograd.Function):
    """Takes what vmap maps over as more of a batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Tensor | str | None) -> tuple:
        def fold(x: Tensor | str | None, dim: int | None) -> Tensor | str | None:
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        out = cls.apply(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        if isinstance(out, Tensor):
            return out.unflatten(0, (info.batch_size, -1)), 0
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)


def _save(ctx: Any, *tensors: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _filled(changes: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> Iterator[Tensor]:
    return (torch.zeros_like(x) if change is None else change for change, x in zip(changes, like, strict=True))


class _Attention(_Batched):
    """(q, k, v) to (output [B, H, L, D], log of the sum of exponentials [B, H, L])."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        return _value(q, k, v, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *qkv, ctx.kernel = inputs
        ctx.mark_non_differentiable(output[1])
        _save(ctx, *qkv, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
        if grad is None:
            return (None,) * 4
        return *_Backward.apply(grad, *ctx.saved_tensors, ctx.kernel), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        qkv, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        return _Tangent.apply(*qkv, *_filled(tangents[:3], qkv), *kept), None


class _Backward(_Batched):
    """(g, q, k, v, output, log of the sum of exponentials) to the gradients of q, k and v.

    The last two are functions of q, k and v that are given so as not to be computed again: what a change of q, k or v
    does to the gradients through them counts as theirs.
    """

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.kernel = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple:
        if all(x is None for x in directions):
            return (None,) * 7
        grad, qkv, kept = ctx.saved_tensors[0], ctx.saved_tensors[1:4], ctx.saved_tensors[4:]
        directions = tuple(_filled(directions, qkv))
        of_grad = _Tangent.apply(*qkv, *directions, *kept)
        return of_grad, *_BackwardTangent.apply(grad, *qkv, None, *directions), None, None, None

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        grad, qkv = ctx.saved_tensors[0], ctx.saved_tensors[1:4]
        return _BackwardTangent.apply(grad, *qkv, of_grad, *_filled(tangents[:3], qkv))


class _Tangent(_Batched):
    """(q, k, v, their tangents, output, log of the sum of exponentials) to the output's tangent."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, out: Tensor, total: Tensor
    ) -> Tensor:
        del out, total
        return _tangent(q, k, v, tq, tk, tv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 8
        qkv, tangents, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
        of_qkv = _BackwardTangent.apply(grad, *qkv, None, *tangents)
        return *of_qkv, *_Backward.apply(grad, *qkv, *kept, ""), None, None

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Tensor:
        given = ctx.saved_tensors[:6]
        return _SecondTangent.apply(*given, *_filled(directions[:6], given))


class _Last(_Batched):
    """What has no derivative any more."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if any(grad is not None for grad in grads):
            raise _no_third()
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise _no_third()


def _no_third() -> NotImplementedError:
    return NotImplementedError("attention has no third derivative: transforms of it may be nested twice")


class _BackwardTangent(_Last):
    """(g, q, k, v, their tangents) to the tangents of the gradients of q, k and v; that of g may be None."""

    @staticmethod
    def forward(grad: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return _backward_tangent(grad, *given)


class _SecondTangent(_Last):
    """(q, k, v, their tangents, and of these six the tangents) to the tangent of the output's tangent."""

    @staticmethod
    def forward(*given: Tensor) -> Tensor:
        return _second_tangent(*given)


# Value and gradient alone: what torch.compile takes, and what can be given its result.


class _Once(torch.autograd.Function):
    """`_Attention` with a first derivative."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        return _value(q, k, v, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *qkv, ctx.kernel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*qkv, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple:
        return *_OnceBackward.apply(grad, *ctx.saved_tensors, ctx.kernel), None


class _OnceBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(grad, q, k, v, out, total, kernel)  # Dynamo wants them named

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError("attention that is compiled or given its result has no second derivative")


class _Given(torch.autograd.Function):
    """(q, k, v, kernel, output, log of the sum of exponentials) to the output, as if it were computed."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, kernel: str, out: Tensor, total: Tensor) -> Tensor:
        del q, k, v, kernel, total
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *qkv, ctx.kernel, out, total = inputs
        ctx.save_for_backward(*qkv, out, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return *_OnceBackward.apply(grad, *ctx.saved_tensors, ctx.kernel), None, None, None


# What they compute, block by block, in float32 or the input's type if wider. The scale is in q and its tangents.


def _tangent(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> Tensor:
    kind, scale = q, q.shape[-1] ** -0.5
    q, k, v, tq, tk, tv = kernels.heads(q, k, v, tq, tk, tv)
    q, tq, out = q * scale, tq * scale, torch.empty_like(q)
    for h, r in kernels.blocks(q, k):
        weights = (q[h, r] @ k[h].mT).softmax(-1)
        change = _centred(_sum((tq[h, r], k[h].mT), (q[h, r], tk[h].mT)), weights).mul_(weights)
        out[h, r] = _sum((change, v[h]), (weights, tv[h]))
    return _like(kind, out)


def _backward_tangent(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tgrad: Tensor | None, tq: Tensor, tk: Tensor, tv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kinds, scale = (q, k, v), q.shape[-1] ** -0.5
    grad, q, k, v, tq, tk, tv = kernels.heads(grad, q, k, v, tq, tk, tv)
    tgrad = None if tgrad is None else kernels.heads(tgrad)[0]
    q, tq = q * scale, tq * scale
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h, r in kernels.blocks(q, k):
        of_grad = None if tgrad is None else tgrad[h, r]
        weights = (q[h, r] @ k[h].mT).softmax(-1)
        moved = _centred(_sum((tq[h, r], k[h].mT), (q[h, r], tk[h].mT)), weights)
        pulled = _centred(grad[h, r] @ v[h].mT, weights)
        both = _sum((grad[h, r], tv[h].mT), (of_grad, v[h].mT))
        both = _centred(both.addcmul_(moved, pulled), weights)
        # Of the weights, and of the scores' gradient, the changes; and that gradient.
        moved, both, pulled = moved.mul_(weights), both.mul_(weights), pulled.mul_(weights)
        dq[h, r] = _sum((both, k[h]), (pulled, tk[h])).mul_(scale)
        kernels.add(dk[h], (both.mT, q[h, r]), (pulled.mT, tq[h, r]))
        kernels.add(dv[h], (moved.mT, grad[h, r]), (weights.mT, of_grad))
    return tuple(_like(kind, x) for kind, x in zip(kinds, (dq, dk, dv), strict=True))


def _second_tangent(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor) -> Tensor:
    """The tangents: a of q, k, v; b of q, k, v; and those of a along b."""
    kind, scale = q, q.shape[-1] ** -0.5
    q, k, v, aq, ak, av, bq, bk, bv, cq, ck, cv = kernels.heads(q, k, v, *tangents)
    q, aq, bq, cq, out = q * scale, aq * scale, bq * scale, cq * scale, torch.empty_like(q)
    for h, r in kernels.blocks(q, k):
        weights = (q[h, r] @ k[h].mT).softmax(-1)
        along_a = _centred(_sum((aq[h, r], k[h].mT), (q[h, r], ak[h].mT)), weights)
        along_b = _centred(_sum((bq[h, r], k[h].mT), (q[h, r], bk[h].mT)), weights)
        crossed = ((aq[h, r], bk[h].mT), (bq[h, r], ak[h].mT))
        both = _sum((cq[h, r], k[h].mT), (q[h, r], ck[h].mT), *crossed)
        both = _centred(both.addcmul_(along_a, along_b), weights).mul_(weights)
        along_a, along_b = along_a.mul_(weights), along_b.mul_(weights)
        out[h, r] = _sum((both, v[h]), (along_a, bv[h]), (along_b, av[h]), (weights, cv[h]))
    return _like(kind, out)


def _like(kind: Tensor, x: Tensor) -> Tensor:
    return x.view(kind.shape).to(kind.dtype)


def _sum(first: tuple[Tensor, Tensor], *rest: Pair) -> Tensor:
    """Returns the sum of the pairs' matrix products; a pair with None counts as zero."""
    return kernels.add(first[0] @ first[1], *rest)


def _centred(x: Tensor, weights: Tensor) -> Tensor:
    """Returns x, in place, less its mean under the weights of each row."""
    return x.sub_((weights * x).sum(-1, keepdim=True))
