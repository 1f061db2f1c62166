"""Context parallelism: attention of a sequence that is split over processes.

Each process has l tokens of the L = n * l, in queries, keys and values [B, H, l, D] alike, and gets their output. All
attend to all and positions are in the tensors already (rope), so which tokens a process has does not matter.

  all_gather  every process gets all keys and values: one collective there, one back
  ulysses     heads are exchanged for tokens, so that a process has all tokens of H / n heads (Jacobs et al. 2023,
              arXiv:2309.14509); where its degree is below n, as with more processes than heads, neighbours exchange,
              and a ring goes over the rest (Fang & Zhao 2024, arXiv:2405.07719)
  ring        keys and values are passed round while those at hand are attended to (Liu et al. 2023, arXiv:2310.01889)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed import ProcessGroup

from flux_func.errors import UserError
from flux_func.models import kernels, layers
from flux_func.models.attention import Tape, join_heads
from flux_func.models.layers import at_least_float32
from flux_func.parallel import collectives
from flux_func.parallel.collectives import Members
from flux_func.parallel.mesh import Mesh

KINDS = ("all_gather", "ulysses", "ring")
Attention = Callable[..., Tensor]


def context_attention(kind: str, mesh: Mesh, heads: int, ulysses: int = -1, kernel: str = "") -> Attention:
    """Returns an `Ops.attention` for a sequence that is split over the mesh's `context` axis.

    Args:
      kind: one of `KINDS`.
      mesh: the processes; with one of them on that axis the result is `layers.attention`.
      heads: of the model.
      ulysses: with kind "ulysses", how many neighbours exchange heads; -1: all of them. The rest is a ring.
      kernel: as for `attention.attention`.

    Returns:
      (q, k, v, tape=None) to [B, l, H*D], as `attention.attention`, of q, k and v [B, H, l, D]. By torch.func,
      "all_gather" and "ulysses" without a ring have every derivative that `layers.attention` has; a ring has the vjp
      alone.

    Raises:
      ValueError: the degree divides not the heads, or not the processes (`check` says it to a user).
    """
    group, size = mesh.group(("context",)), mesh.size(("context",))
    degree = {"all_gather": 1, "ulysses": size if ulysses == -1 else ulysses, "ring": 1}[kind]
    if heads % degree or size % degree:
        raise ValueError(f"ulysses {degree} should divide {heads} heads and {size} processes")
    whole = functools.partial(layers.attention, kernel=kernel) if kernel else layers.attention
    if group is None:
        return whole
    if kind == "all_gather":
        return functools.partial(_gathered, group, whole)
    inner = whole if degree == size else functools.partial(_ring, Members.of(group), degree, kernel)
    return inner if degree == 1 else functools.partial(_exchanged, group, degree, inner)


def check(kind: str, context: int, ulysses: int, heads: int, text_tokens: int, image_tokens: int) -> None:
    """Checks that a sequence can be split so; UserError names the field, and the degrees that would divide.

    Args:
      kind: `parallel.attention`.
      context: processes that the sequence is split over.
      ulysses: `parallel.ulysses`.
      heads: of the model.
      text_tokens, image_tokens: of a sample.
    """
    if kind not in KINDS:
        raise UserError(f"parallel.attention is {kind!r}: should be one of {', '.join(KINDS)}")
    for field, tokens in (("text.max_length", text_tokens), ("data.image_size", image_tokens)):
        if tokens % context:
            raise UserError(
                f"parallel.context is {context}: does not divide the {tokens} tokens that {field} comes to; "
                f"degrees that divide text and image: {_degrees(text_tokens, image_tokens)}"
            )
    if kind != "ulysses":
        return
    degree = context if ulysses == -1 else ulysses
    if degree < 1 or context % degree or heads % degree:
        said = f"{ulysses} (all of parallel.context)" if ulysses == -1 else ulysses
        raise UserError(
            f"parallel.ulysses is {said}: {degree} should divide the {heads} heads and parallel.context={context}; "
            f"degrees that do: {_degrees(heads, context)} (a ring goes over the rest)"
        )


def _degrees(*numbers: int) -> str:
    common = math.gcd(*numbers)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)


def _gathered(
    group: ProcessGroup, inner: Attention, q: Tensor, k: Tensor, v: Tensor, tape: Tape | None = None
) -> Tensor:
    # Tokens are outermost, so that what is sent and what comes lies as it should without another copy.
    kv = torch.stack([rearrange(x, "B H l D -> l B H D") for x in (k, v)], dim=1)
    kv = collectives.all_gather(kv, 0, group)
    return inner(q, *(rearrange(x, "L B H D -> B H L D") for x in kv.unbind(1)), tape=tape)


def _exchanged(
    group: ProcessGroup, degree: int, inner: Attention, q: Tensor, k: Tensor, v: Tensor, tape: Tape | None = None
) -> Tensor:
    """Attends to the tokens of `degree` neighbours with its share of the heads, by `inner`."""
    parts = [rearrange(x, "B (n h) l D -> n l B h D", n=degree) for x in (q, k, v)]
    # Its first dimension is of size 1 afterwards: the tokens join where they lie.
    qkv = collectives.all_to_all(torch.stack(parts, dim=2), 0, 1, group, among=degree)
    mixed = inner(*(rearrange(x, "1 L B h D -> B h L D") for x in qkv.unbind(2)), tape=tape)
    heads = q.shape[1] // degree
    mixed = rearrange(mixed, "B (n l) (h D) -> n l B h D", n=degree, h=heads)
    mixed = collectives.all_to_all(mixed, 0, 3, group, among=degree)
    return rearrange(mixed, "1 l B H D -> B l (H D)")


# The ring.


def _ring(
    members: Members, stride: int, kernel: str, q: Tensor, k: Tensor, v: Tensor, tape: Tape | None = None
) -> Tensor:
    """Attends to the tokens of every process that is some multiple of `stride` places away."""
    given = kernels.packed(q), k, v, members, stride, kernel
    if tape is not None:
        out = tape(_attend, _RingGiven.apply, *given)
    else:
        out, _ = (_Ring if torch.compiler.is_compiling() else _RingEverywhere).apply(*given)
    return join_heads(out)


class _Ring(torch.autograd.Function):
    """(q, k, v) to (output, log of the sum of exponentials); its vjp is the ring once more."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, members: Members, stride: int, kernel: str) -> tuple[Tensor, Tensor]:
        return _attend(q, k, v, members, stride, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *ctx.ring = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        return *_RingBackward.apply(grad, *ctx.saved_tensors, *ctx.ring), None, None, None


class _RingGiven(torch.autograd.Function):
    """(q, k, v, the ring, output, log of the sum of exponentials) to the output, as if it were computed."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, members: Members, stride: int, kernel: str, out: Tensor, total: Tensor
    ) -> Tensor:
        del q, k, v, members, stride, kernel, total
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        q, k, v, *ctx.ring, out, total = inputs
        ctx.save_for_backward(q, k, v, out, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return *_RingBackward.apply(grad, *ctx.saved_tensors, *ctx.ring), None, None, None, None, None


class _RingBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        members: Members,
        stride: int,
        kernel: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _attend_backward(grad, q, k, v, out, total, members, stride, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise _no_rule("a second derivative")


class _RingEverywhere(_Ring):
    """Says what a ring lacks; the mere presence of these torch.compile refuses."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        raise _no_rule("forward mode (jvp)")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        raise _no_rule("vmap")


def _no_rule(what: str) -> NotImplementedError:
    return NotImplementedError(f"ring attention has no {what}; parallel.attention 'all_gather' and 'ulysses' have")


def _attend(q: Tensor, k: Tensor, v: Tensor, members: Members, stride: int, kernel: str) -> tuple[Tensor, Tensor]:
    """Passes keys and values round, joining the softmax of what was seen with that of the block at hand."""
    kv, out, total = torch.stack((k, v)), None, None
    for left in reversed(range(members.size // stride)):
        coming = collectives.start_permute(kv, stride, members) if left else None
        block, block_total = kernels.block(q, *kv.unbind(0), kernel)
        block = block.to(at_least_float32(q.dtype))
        if out is None:
            out, total = block, block_total
        else:
            joined = torch.logaddexp(total, block_total)
            out.lerp_(block, (block_total - joined).exp()[..., None])
            total = joined
        kv = collectives.wait(coming) if left else kv
    return out.to(q.dtype), total


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    members: Members,
    stride: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Passes keys and values round, and a step behind them what each process adds to their gradients."""
    wide, grad = at_least_float32(q.dtype), kernels.packed(grad)
    kv, dq, arriving = torch.stack((k, v)), torch.zeros_like(q, dtype=wide), None
    for left in reversed(range(members.size // stride)):
        coming = collectives.start_permute(kv, stride, members) if left else None
        block = kernels.block_backward(grad, q, *kv.unbind(0), out, total, kernel)
        dq += block[0]
        dkv = torch.stack(block[1:]).to(wide)
        if arriving is not None:
            dkv += collectives.wait(arriving)
        # The last one of these brings them home.
        arriving = collectives.start_permute(dkv, stride, members)
        kv = collectives.wait(coming) if left else kv
    dk, dv = collectives.wait(arriving).to(q.dtype).unbind(0)
    return dq.to(q.dtype), dk, dv
