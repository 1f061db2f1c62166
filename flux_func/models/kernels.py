"""Torch's kernels of attention, and one of plain matrix products where it has none.

They give the logarithm of the sum of exponentials too, and take any in their backward: of more keys than they are
given, as in a ring, the probabilities are those of the whole. Shapes: B batch, H heads, L tokens, D head size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

Pair = tuple[Tensor | None, Tensor | None]

# Scores that are there at once, of so many queries and as many heads as fit: what a CPU's cache holds, or enough to
# keep another device busy.
ROWS = 128
SCORES_CPU = 1 << 18
SCORES = 1 << 24


def packed(x: Tensor) -> Tensor:
    """Returns x with the numbers of a head side by side, as kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block(q: Tensor, k: Tensor, v: Tensor, kernel: str = "") -> tuple[Tensor, Tensor]:
    """Returns (output [B, H, L, D], log of the sum of exponentials [B, H, L]); q, k and v as `packed` gives them.

    Args:
      q, k, v: [B, H, L, D], k and v of any length.
      kernel: one of `KERNELS`; "": that of F.scaled_dot_product_attention.

    Raises:
      ValueError: the device has no such kernel. RuntimeError, of torch: it does not take the type or the head size.
    """
    kernel, aten = _kernel(q, k, kernel), torch.ops.aten
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
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, kernel: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, of which k and v may be a part of those that out and total are of."""
    kernel, aten = _kernel(q, k, kernel), torch.ops.aten
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


def check(kernel: str, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Takes a value and a gradient of a few tokens by a kernel of `KERNELS`: ValueError where it cannot be had."""
    draw = torch.zeros(1, heads, 64, size, dtype=dtype, device=device)
    try:
        out, total = block(draw, draw, draw, kernel)
        block_backward(out, draw, draw, draw, out, total, kernel)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"kernel {kernel!r} does not take heads of {size} in {dtype} on {device}: {reason}") from error


def _kernel(q: Tensor, k: Tensor, asked: str) -> str:
    """Returns which kernel is asked for, or else F.scaled_dot_product_attention's; "products" for torch's own math."""
    if asked:
        known = _BY_NAME.get(q.device.type, {})
        if asked not in known:
            have = ", ".join(map(repr, known))
            raise ValueError(f"kernel {asked!r} is none of a {q.device.type}'s, which are {have}")
        return known[asked]
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


# What each device has, by the names that users know.
_BY_NAME = {
    "cpu": {"flash": "cpu", "math": "products"},
    # Flash 3, where it has been activated, torch puts in the place of Flash 2.
    "cuda": {
        "flash": "flash",
        "flash3": "flash",
        "efficient": "efficient",
        "cudnn": "cudnn",
        "math": "products",
    },
}
KERNELS = tuple(_BY_NAME["cuda"])
_CUDA = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
}


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    kind, scale = q, q.shape[-1] ** -0.5
    q, k, v = heads(q, k, v)
    q, out, total = q * scale, torch.empty_like(q), q.new_empty(q.shape[:2])
    for h, r in blocks(q, k):
        scores = q[h, r] @ k[h].mT
        total[h, r] = scores.logsumexp(-1)
        out[h, r] = scores.sub_(total[h, r, None]).exp_() @ v[h]
    return out.view(kind.shape), total.view(kind.shape[:-1])


def _by_products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shapes, scale = (q.shape, k.shape, v.shape), q.shape[-1] ** -0.5
    q, k, v, grad, out, total = heads(q, k, v, grad, out, total)
    q, drawn = q * scale, (grad * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for h, r in blocks(q, k):
        weights = (q[h, r] @ k[h].mT).sub_(total[h, r, None]).exp_()
        add(dv[h], (weights.mT, grad[h, r]))
        pulled = (grad[h, r] @ v[h].mT).sub_(drawn[h, r]).mul_(weights)
        dq[h, r] = (pulled @ k[h]).mul_(scale)
        add(dk[h], (pulled.mT, q[h, r]))
    return tuple(x.view(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))


# Blocks of a computation over [B * H, L, D].


def heads(*tensors: Tensor) -> list[Tensor]:
    """Returns [B, H, L, D] as [B * H, L, D], in float32 at least."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.flatten(0, 1).to(wide) for x in tensors]


def blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields slices of the heads and the queries of [B * H, L, D] that cover all."""
    most = SCORES_CPU if q.device.type == "cpu" else SCORES
    rows = max(1, min(ROWS, q.shape[1]))
    together = max(1, most // max(1, rows * k.shape[1]))
    for head in range(0, q.shape[0], together):
        for row in range(0, q.shape[1], rows):
            yield slice(head, head + together), slice(row, row + rows)


def add(total: Tensor, *pairs: Pair) -> Tensor:
    """Adds the pairs' matrix products to the total, in place."""
    for a, b in pairs:
        if a is not None and b is not None:
            # The same as baddbmm_, which torch's counter of operations does not know.
            torch.baddbmm(total, a, b, out=total)
    return total
