"""Attention of a few tokens, torch's own to hold it against, and how far two results are apart."""

import contextlib
import functools
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad
from torch.utils._pytree import tree_leaves

from flux_func.models import kernels

ALL = (0, 1, 2)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def draw_qkv(batch, heads, length, keys, size, seed=0, dtype=torch.float64):
    lengths = (length, keys, keys)
    return tuple(draw(batch, heads, n, size, seed=(seed, i), dtype=dtype) for i, n in enumerate(lengths))


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


@contextlib.contextmanager
def blocks(rows, scores=1 << 18):
    """With so few queries and scores at once that there are several blocks."""
    with mock.patch.multiple(kernels, ROWS=rows, SCORES_CPU=scores):
        yield


def relative(found, expected):
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return max(((a - b).norm() / (b.norm() + 1e-3)).item() for a, b in pairs)


def loss(attend, *qkv):
    # Not linear in the output, so that the cotangent moves too.
    out = attend(*qkv)
    return (out.sin() * torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)).sum()


def gradient(attend):
    return grad(functools.partial(loss, attend), ALL)
