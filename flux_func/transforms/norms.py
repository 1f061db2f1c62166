"""Norms of trees, of samples' trees and of products, with their digits kept."""

import torch
from torch import Tensor

from flux_func import tree
from flux_func.models.layers import at_least_float32
from flux_func.tree import Tree

# On a CPU torch adds up squares in float32 one after the other: the norm of 56 million normal draws comes out 4.5e-3
# too small. In parts of this size it is 2e-7 off, and no slower.
_CPU_PART = 1 << 16


def global_norm(grads: Tree) -> Tensor:
    """Returns the norm of all leaves as one vector: a scalar of float32, or of float64 if a leaf is."""
    dtype, parts = torch.float32, []
    for leaf in tree.leaves(grads):
        dtype = torch.promote_types(dtype, leaf.dtype)
        parts += leaf.reshape(-1).split(_CPU_PART) if leaf.device.type == "cpu" else [leaf]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, 2, dtype=dtype)))


def squared_norms(grads: Tree) -> Tensor:
    """Returns the squared norms [B] of the samples' trees, of leaves [B, ...], in float32 or wider."""
    wide = (leaf.to(at_least_float32(leaf.dtype)) for leaf in tree.leaves(grads))
    # By rows: on a CPU torch adds up squares one after the other, and a norm of millions would lose digits.
    rows = (leaf.reshape(len(leaf), -1, leaf.shape[-1] if leaf.ndim > 1 else 1) for leaf in wide)
    return sum(torch.linalg.vector_norm(leaf, dim=2).square().sum(1) for leaf in rows)


def square_of_product(grad: Tensor, x: Tensor) -> Tensor:
    """Returns |grad^T x|^2, a scalar, of [L, out] and [L, in]: by whichever products take less arithmetic."""
    rows, out, fan_in = grad.shape[0], grad.shape[1], x.shape[1]
    if rows * (out + fan_in) < out * fan_in:
        return ((grad @ grad.mT) * (x @ x.mT)).sum()
    # A norm is one pass over the product, where its squares would be another tensor; that of a row keeps its digits.
    return torch.linalg.vector_norm(grad.mT @ x, dim=1).square().sum()
