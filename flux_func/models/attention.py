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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend

Pair = tuple[Tensor | None, Tensor | None]

# Scores that are there at once, of so many queries and as many heads as fit: what a CPU's cache holds, or enough to
# keep another device busy.
ROWS = 128
SCORES_CPU = 1 << 18
SCORES = 1 << 24


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v of every token to every token; [B, H, L, D] each, to [B, L, H*D].

    k and v may have another length than q. All of torch.func's and torch.autograd's transforms apply, forward and
    backward, up to second derivatives; inside torch.compile those of F.scaled_dot_product_attention do.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: a third derivative is asked for.
    """
    if q.shape[:2] != k.shape[:2] or q.shape[-1:] != k.shape[-1:] or k.shape != v.shape or q.ndim != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v should be [B, H, L, D] of one B, H and D, and k as long as v; they are {shapes}")
    if torch.compiler.is_compiling() or q.is_meta:
        # Dynamo refuses functions that have forward mode or vmap of their own; without memory none is to be saved.
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out, _ = _Attention.apply(packed(q), packed(k), packed(v))
    return rearrange(out, "B H L D -> B L (H D)")


def packed(x: Tensor) -> Tensor:
    """Returns x with the numbers of a head side by side, as kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


# The functions. Each takes tensors whose first dimension is the batch, or None for zero, and nothing else.


class _Batched(torch.autograd.Function):
    """Takes what vmap maps over as more of a batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Tensor | None) -> tuple:
        def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
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
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, total = block(q, k, v)
        return out.to(q.dtype), total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save(ctx, *inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
        return (None,) * 3 if grad is None else _Backward.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        qkv, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        return _Tangent.apply(*qkv, *_filled(tangents, qkv), *kept), None


class _Backward(_Batched):
    """(g, q, k, v, output, log of the sum of exponentials) to the gradients of q, k and v.

    The last two are functions of q, k and v that are given so as not to be computed again: what a change of q, k or v
    does to the gradients through them counts as theirs.
    """

    @staticmethod
    def forward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.to(q.dtype) for x in block_backward(packed(grad), q, k, v, out, total))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple:
        if all(x is None for x in directions):
            return (None,) * 6
        grad, qkv, kept = ctx.saved_tensors[0], ctx.saved_tensors[1:4], ctx.saved_tensors[4:]
        directions = tuple(_filled(directions, qkv))
        of_grad = _Tangent.apply(*qkv, *directions, *kept)
        return of_grad, *_BackwardTangent.apply(grad, *qkv, None, *directions), None, None

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
        return *of_qkv, *_Backward.apply(grad, *qkv, *kept), None, None

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


# What they compute, block by block, in float32 or the input's type if wider. The scale is in q and its tangents.


def _tangent(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> Tensor:
    kind, scale = q, q.shape[-1] ** -0.5
    q, k, v, tq, tk, tv = _heads(q, k, v, tq, tk, tv)
    q, tq, out = q * scale, tq * scale, torch.empty_like(q)
    for h, r in _blocks(q, k):
        weights = (q[h, r] @ k[h].mT).softmax(-1)
        change = _centred(_sum((tq[h, r], k[h].mT), (q[h, r], tk[h].mT)), weights).mul_(weights)
        out[h, r] = _sum((change, v[h]), (weights, tv[h]))
    return _like(kind, out)


def _backward_tangent(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tgrad: Tensor | None, tq: Tensor, tk: Tensor, tv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kinds, scale = (q, k, v), q.shape[-1] ** -0.5
    grad, q, k, v, tq, tk, tv = _heads(grad, q, k, v, tq, tk, tv)
    tgrad = None if tgrad is None else _heads(tgrad)[0]
    q, tq = q * scale, tq * scale
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h, r in _blocks(q, k):
        of_grad = None if tgrad is None else tgrad[h, r]
        weights = (q[h, r] @ k[h].mT).softmax(-1)
        moved = _centred(_sum((tq[h, r], k[h].mT), (q[h, r], tk[h].mT)), weights)
        pulled = _centred(grad[h, r] @ v[h].mT, weights)
        both = _sum((grad[h, r], tv[h].mT), (of_grad, v[h].mT))
        both = _centred(both.addcmul_(moved, pulled), weights)
        # Of the weights, and of the scores' gradient, the changes; and that gradient.
        moved, both, pulled = moved.mul_(weights), both.mul_(weights), pulled.mul_(weights)
        dq[h, r] = _sum((both, k[h]), (pulled, tk[h])).mul_(scale)
        _add(dk[h], (both.mT, q[h, r]), (pulled.mT, tq[h, r]))
        _add(dv[h], (moved.mT, grad[h, r]), (weights.mT, of_grad))
    return tuple(_like(kind, x) for kind, x in zip(kinds, (dq, dk, dv), strict=True))


def _second_tangent(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor) -> Tensor:
    """The tangents: a of q, k, v; b of q, k, v; and those of a along b."""
    kind, scale = q, q.shape[-1] ** -0.5
    q, k, v, aq, ak, av, bq, bk, bv, cq, ck, cv = _heads(q, k, v, *tangents)
    q, aq, bq, cq, out = q * scale, aq * scale, bq * scale, cq * scale, torch.empty_like(q)
    for h, r in _blocks(q, k):
        weights = (q[h, r] @ k[h].mT).softmax(-1)
        along_a = _centred(_sum((aq[h, r], k[h].mT), (q[h, r], ak[h].mT)), weights)
        along_b = _centred(_sum((bq[h, r], k[h].mT), (q[h, r], bk[h].mT)), weights)
        crossed = ((aq[h, r], bk[h].mT), (bq[h, r], ak[h].mT))
        both = _sum((cq[h, r], k[h].mT), (q[h, r], ck[h].mT), *crossed)
        both = _centred(both.addcmul_(along_a, along_b), weights).mul_(weights)
        along_a, along_b = along_a.mul_(weights), along_b.mul_(weights)
        out[h, r] = _sum((both, v[h]), (along_a, bv[h]), (along_b, av[h]), (weights, cv[h]))
    return _like(kind, out)


def _heads(*tensors: Tensor) -> list[Tensor]:
    """Returns [B, H, L, D] as [B * H, L, D], in float32 at least."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.flatten(0, 1).to(wide) for x in tensors]


def _like(kind: Tensor, x: Tensor) -> Tensor:
    return x.view(kind.shape).to(kind.dtype)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields slices of the heads and the queries of [B * H, L, D] that cover all."""
    most = SCORES_CPU if q.device.type == "cpu" else SCORES
    rows = max(1, min(ROWS, q.shape[1]))
    heads = max(1, most // max(1, rows * k.shape[1]))
    for head in range(0, q.shape[0], heads):
        for row in range(0, q.shape[1], rows):
            yield slice(head, head + heads), slice(row, row + rows)


def _sum(first: tuple[Tensor, Tensor], *rest: Pair) -> Tensor:
    """Returns the sum of the pairs' matrix products; a pair with None counts as zero."""
    return _add(first[0] @ first[1], *rest)


def _add(total: Tensor, *pairs: Pair) -> Tensor:
    """Adds the pairs' matrix products to the total, in place."""
    for a, b in pairs:
        if a is not None and b is not None:
            # The same as baddbmm_, which torch's counter of operations does not know.
            torch.baddbmm(total, a, b, out=total)
    return total


def _centred(x: Tensor, weights: Tensor) -> Tensor:
    """Returns x, in place, less its mean under the weights of each row."""
    return x.sub_((weights * x).sum(-1, keepdim=True))


# Value and gradient by torch's kernels. They give the logarithm of the sum of exponentials too, and take any in their
# backward: of more keys than they are given, as in a ring, the probabilities are those of the whole.


def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (output [B, H, L, D], log of the sum of exponentials [B, H, L]); q, k and v as `packed` gives them."""
    kernel, aten = _kernel(q, k), torch.ops.aten
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    if kernel == "cudnn":
        out, total = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        return out, total.squeeze(-1)
    if kernel == "efficient":
        out, total = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        return out, total.narrow(-1, 0, q.shape[2])
    return _by_products(q, k, v)


def block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, of which k and v may be a part of those that out and total are of."""
    kernel, aten = _kernel(q, k), torch.ops.aten
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, total, 0.0, False)
    if kernel == "products":
        return _by_products_backward(grad, q, k, v, out, total)
    given, lengths = (grad, q, k, v), (None, None, q.shape[2], k.shape[2])
    if kernel == "flash":
        # The state of a dropout that there is not.
        state = [torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ())]
        return aten._scaled_dot_product_flash_attention_backward(*given, out, total, *lengths, 0.0, False, *state)
    state = [torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2)]
    if kernel == "cudnn":
        backward = aten._scaled_dot_product_cudnn_attention_backward
        return backward(*given, out, total.unsqueeze(-1), *state, None, *lengths, 0.0, False)
    # Rows of whole 32, as the kernel has them.
    total = F.pad(total, (0, -total.shape[-1] % 32), value=torch.inf)
    backward = aten._scaled_dot_product_efficient_attention_backward
    return backward(*given, None, out, total, *state, 0.0, (True, True, True, False))[:3]


def _kernel(q: Tensor, k: Tensor) -> str:
    """Returns which kernel F.scaled_dot_product_attention would take; "products" where it would be its own math."""
    # Dynamo cannot look up what is enabled.
    compiling = torch.compiler.is_compiling()
    if q.device.type == "cpu":
        # Of no tokens the kernel dies.
        enabled = compiling or torch.backends.cuda.flash_sdp_enabled()
        return "cpu" if enabled and q.numel() and k.numel() else "products"
    if q.device.type != "cuda" or q.shape[-1] % 8:
        return "products"
    if compiling:
        return "flash" if q.dtype.itemsize == 2 and q.shape[-1] <= 256 else "products"
    return _CUDA.get(SDPBackend(torch._fused_sdp_choice(q, k, k)), "products")


_CUDA = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    kind, scale = q, q.shape[-1] ** -0.5
    q, k, v = _heads(q, k, v)
    q, out, total = q * scale, torch.empty_like(q), q.new_empty(q.shape[:2])
    for h, r in _blocks(q, k):
        scores = q[h, r] @ k[h].mT
        total[h, r] = scores.logsumexp(-1)
        out[h, r] = scores.sub_(total[h, r, None]).exp_() @ v[h]
    return out.view(kind.shape), total.view(kind.shape[:-1])


def _by_products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shapes, scale = (q.shape, k.shape, v.shape), q.shape[-1] ** -0.5
    q, k, v, grad, out, total = _heads(q, k, v, grad, out, total)
    q, drawn = q * scale, (grad * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h, r in _blocks(q, k):
        weights = (q[h, r] @ k[h].mT).sub_(total[h, r, None]).exp_()
        _add(dv[h], (weights.mT, grad[h, r]))
        pulled = (grad[h, r] @ v[h].mT).sub_(drawn[h, r]).mul_(weights)
        dq[h, r] = (pulled @ k[h]).mul_(scale)
        _add(dk[h], (pulled.mT, q[h, r]))
    return tuple(x.view(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))
