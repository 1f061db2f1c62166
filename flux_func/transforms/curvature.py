"""Curvature of a loss in its parameters: products with the Hessian and the Gauss-Newton matrix, and what they estimate.

A loss is any pure function `(params, *args) -> scalar`, params any tree of tensors; `curvature.hvp(ff.loss, params, v,
cfg, batch)` is one. Nothing here holds a matrix: all comes from products with vectors, and a vector is a tree.

`patterns` chooses parameters by path (`double_blocks.*.img_mlp.*`) and everything is then about their block of the
matrix, the others being constants: vectors and results are `{dotted path: tensor}`, as `tree.select` gives them. None
is the whole tree, and vectors are trees like it. Products are in the parameters' types; estimates made of them in
float32 or in the widest of those types, if wider.

Trace, diagonal and spectrum are the Hessian's by default. `product` makes them those of another symmetric matrix: of
the Gauss-Newton matrix by `curvature.trace(loss_of_outputs, params, *args, product=functools.partial(gvp, model))`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_func import random, tree
from flux_func.transforms import checks, per_sample
from flux_func.transforms.norms import global_norm

Patterns = Sequence[str] | None
# (params, *args) to a scalar.
Loss = Callable[..., Tensor]
# (loss, params, v, *args, patterns) to the product with v.
Product = Callable[..., tree.Tree]
UNFIT = "v does not fit the parameters"


class Estimate(NamedTuple):
    """A mean over random probes, a scalar, and its standard error."""

    value: Tensor
    standard_error: Tensor


class Eigenpairs(NamedTuple):
    """Eigenvalues, and how far each may be off.

    Attributes:
      values: [count], the largest first.
      vectors: a tree like the parameters, [count, ...] each, of unit norm over the tree.
      residuals: [count], the norms of A v - value v: within so much of each value lies an eigenvalue of A.
    """

    values: Tensor
    vectors: tree.Tree
    residuals: Tensor


class Spectrum(NamedTuple):
    """The distribution of a matrix's eigenvalues, as `probes` quadratures of it.

    Attributes:
      nodes: [probes, steps], ascending.
      weights: [probes, steps], not negative, of sum 1 for each probe.
    """

    nodes: Tensor
    weights: Tensor


def hvp(loss: Loss, params: tree.Tree, v: tree.Tree, *args: Any, patterns: Patterns = None) -> tree.Tree:
    """Returns the Hessian of `loss` at params times v, the gradient's derivative along v (Pearlmutter 1994).

    Forward mode over reverse mode, so every operation of the loss needs both. It takes the time of some 3.5 gradients.

    Args:
      loss: `(params, *args) -> scalar`.
      params: where the Hessian is taken.
      v: a tree like the parameters, or like those that `patterns` chooses.
      args: the loss's other arguments.
      patterns: of the paths of the parameters that it is about; None: all.

    Returns:
      A tree like v, in the parameters' types.

    Raises:
      ValueError: a loss that is no scalar, a v that does not fit, params without leaves, or a pattern that fits no
        parameter.
    """
    fn, at = _restricted(checks.scalar(loss), params, patterns)
    gradient = torch.func.grad(lambda part: fn(part, *args))
    return torch.func.jvp(gradient, (at,), (checks.like(v, at, UNFIT),))[1]


def gvp(
    model: Callable[..., Any], loss: Loss, params: tree.Tree, v: tree.Tree, *args: Any, patterns: Patterns = None
) -> tree.Tree:
    """Returns the (generalized) Gauss-Newton matrix J^T H J times v, in the time of some 2.5 gradients.

    J is the model's Jacobian in the parameters and H the loss's Hessian in the model's outputs: what is left of the
    Hessian where the model is taken as linear (Schraudolph 2002; Martens 2010). It is positive semi-definite for every
    convex loss, and the Fisher information where the loss is the negative log-likelihood of natural parameters.

    Args:
      model: `(params, *args) -> outputs`, a tensor or a tree of them.
      loss: `outputs -> scalar`; targets are its own affair.
      params, v, args, patterns: as for `hvp`, args being the model's.

    Raises:
      ValueError: as `hvp`.
    """
    fn, at = _restricted(model, params, patterns)
    run = lambda part: fn(part, *args)  # noqa: E731
    outputs, moved = torch.func.jvp(run, (at,), (checks.like(v, at, UNFIT),))
    _, curved = torch.func.jvp(torch.func.grad(checks.scalar(loss)), (outputs,), (moved,))
    # The forward pass again, rather than a graph of the tangents that nobody would go back through.
    return torch.func.vjp(run, at)[1](curved)[0]


def trace(
    loss: Loss,
    params: tree.Tree,
    *args: Any,
    seed: int,
    probes: int = 16,
    patterns: Patterns = None,
    product: Product = hvp,
) -> Estimate:
    """Returns the trace, as the mean of z^T A z over random signs z (Hutchinson 1990), and its standard error.

    Args:
      loss, params, args, patterns: as for `hvp`.
      seed: of the counted draws; a parameter's signs depend on (seed, path, probe) alone.
      probes: products to take the mean of, at least 2: a standard error needs them.
      product: with which matrix, see the module.

    Raises:
      ValueError: as `hvp`, or fewer than 2 probes.
    """
    checks.count("probes", probes, 2)
    _, at = _restricted(loss, params, patterns)
    wide, forms = _wide(at), []
    for signs in _signs(at, seed, probes):
        products = product(loss, params, signs, *args, patterns=patterns)
        forms.append(sum(tree.leaves(tree.map(lambda z, az: (z.to(wide) * az.to(wide)).sum(), signs, products))))
    forms = torch.stack(forms)
    return Estimate(forms.mean(), forms.std() / math.sqrt(probes))


def diagonal(
    loss: Loss,
    params: tree.Tree,
    *args: Any,
    seed: int,
    probes: int = 16,
    patterns: Patterns = None,
    product: Product = hvp,
) -> tree.Tree:
    """Returns the diagonal, a tree like the (chosen) parameters: the mean of z * A z over random signs z.

    The variance of an element is the sum of squares of the others in its row, over `probes` (Bekas, Kokiopoulou & Saad
    2007). The signs are those of `trace` for the same seed, so the elements add up to that estimate.

    Args:
      loss, params, args, seed, patterns, product: as for `trace`.
      probes: products to take the mean of, at least 1.

    Raises:
      ValueError: as `hvp`, or no probes.
    """
    checks.count("probes", probes)
    _, at = _restricted(loss, params, patterns)
    wide = _wide(at)
    total = tree.map(lambda leaf: torch.zeros_like(leaf, dtype=wide), at)
    for signs in _signs(at, seed, probes):
        products = product(loss, params, signs, *args, patterns=patterns)
        total = tree.map(lambda mean, z, az: mean + z.to(wide) * az.to(wide) / probes, total, signs, products)
    return total


def fisher_diagonal(
    loss: Loss, params: tree.Tree, batch: tree.Tree, chunk: int | None = None, patterns: Patterns = None
) -> tree.Tree:
    """Returns the empirical Fisher's diagonal, a tree like the (chosen) parameters: the samples' mean squared gradient.

    The loss of a sample is taken for its negative log-likelihood, which a mean squared error is only up to a scale. And
    this is no estimate of the Fisher information, let alone of the Hessian, away from a well-specified optimum
    (Kunstner et al. 2019, arXiv:1905.12558).

    Args:
      loss: `(params, sample) -> scalar`, such as `per_sample.one(ff.loss, cfg)`.
      params, patterns: as for `hvp`.
      batch: a tree of tensors [B, ...].
      chunk: samples at a time, by vmap; None: all. So many gradients are held at once.

    Raises:
      ValueError: as `hvp` and `per_sample.losses`.
    """
    fn, at = _restricted(checks.scalar(loss, per_sample.FOR_ONE), params, patterns)
    wide = _wide(at)

    def squares(grads: tree.Tree, values: Tensor) -> tuple[tree.Tree, int]:
        return tree.map(lambda grad: grad.to(wide).square().sum(0), grads), len(values)

    parts, counts = zip(*per_sample.each(fn, at, batch, chunk, squares), strict=True)
    return tree.map(lambda *leaves: sum(leaves) / sum(counts), *parts)


# Spectra by Lanczos.


def eigenpairs(
    loss: Loss,
    params: tree.Tree,
    *args: Any,
    seed: int,
    count: int = 1,
    steps: int = 32,
    patterns: Patterns = None,
    product: Product = hvp,
) -> Eigenpairs:
    """Returns the largest eigenvalues and their vectors, by Lanczos with full re-orthogonalization.

    Largest as numbers: those of the negated loss are the smallest. An eigenvalue of higher multiplicity is found once,
    unless the iteration runs out of new directions and starts again in another.

    Args:
      loss, params, args, seed, patterns, product: as for `trace`.
      count: how many.
      steps: products, and vectors of the (chosen) parameters' size that are held at once; `Eigenpairs.residuals` says
        whether they were enough.

    Raises:
      ValueError: as `hvp`; count not between 1 and both steps and the number of parameters; or a product that is not
        finite.
    """
    checks.count("count", count)
    checks.count("steps", steps)
    _, at = _restricted(loss, params, patterns)
    steps = min(steps, _size(at))
    if count > steps:
        raise ValueError(f"count is {count}: should be at most {steps}, the steps that there are")
    matrix, basis, left = _lanczos(lambda v: product(loss, params, v, *args, patterns=patterns), at, seed, 0, steps)
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:count].to(basis), vectors.flip(1)[:, :count].to(basis)
    return Eigenpairs(values, _unraveled(vectors.T @ basis, at), left * vectors[-1].abs())


def spectrum(
    loss: Loss,
    params: tree.Tree,
    *args: Any,
    seed: int,
    probes: int = 4,
    steps: int = 64,
    patterns: Patterns = None,
    product: Product = hvp,
) -> Spectrum:
    """Returns the eigenvalues' distribution, by stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv:1901.10159).

    For a polynomial f of a degree below 2 `steps`, the mean over probes of sum(weights * f(nodes)), times the number of
    parameters, is an unbiased estimate of the trace of f(A). `density` draws it.

    Args:
      loss, params, args, seed, patterns, product: as for `trace`.
      probes: random vectors to start from.
      steps: products for each, at most the number of parameters; as many vectors are held at once.

    Raises:
      ValueError: as `hvp`, probes or steps below 1, or a product that is not finite.
    """
    checks.count("probes", probes)
    checks.count("steps", steps)
    _, at = _restricted(loss, params, patterns)
    steps = min(steps, _size(at))
    matvec, found = lambda v: product(loss, params, v, *args, patterns=patterns), []
    for probe in range(probes):
        matrix, basis, _ = _lanczos(matvec, at, seed, probe, steps)
        nodes, vectors = torch.linalg.eigh(matrix)
        found.append((nodes.to(basis), vectors[0].square().to(basis)))
    return Spectrum(*map(torch.stack, zip(*found, strict=True)))


def density(spectrum: Spectrum, at: Tensor, width: float) -> Tensor:
    """Returns the density of the eigenvalues at [...], each node of the quadratures a Gaussian of this deviation.

    Raises:
      ValueError: a width that is not above 0.
    """
    checks.positive("width", width)
    scaled = (at[..., None, None] - spectrum.nodes) / width
    peaks = torch.exp(-scaled.square() / 2) / (width * math.sqrt(2 * math.pi))
    return (peaks * spectrum.weights).sum(-1).mean(-1)


def _lanczos(
    matvec: Callable[[tree.Tree], tree.Tree], at: tree.Tree, seed: int, probe: int, steps: int
) -> tuple[Tensor, Tensor, float]:
    """Returns (T, Q, left): T = Q A Q^T, tridiagonal [steps, steps] in float64 on the CPU; Q, orthonormal rows
    [steps, n]; and the norm of what A adds to the span of Q."""
    basis = tree.leaves(at)[0].new_empty(steps, _size(at), dtype=_wide(at))
    matrix, left, scale = torch.zeros(steps, steps, dtype=torch.float64), 0.0, 0.0
    w = _raveled(_start(at, seed, probe, 0), basis)
    for step in range(steps):
        basis[step] = w / global_norm(w)
        w = _raveled(matvec(_unraveled(basis[step], at)), basis)
        norm = global_norm(w).item()
        if not math.isfinite(norm):
            raise ValueError(
                f"product {step} with the matrix has the norm {norm}: the loss's derivatives are not finite"
            )
        scale = max(scale, norm)
        matrix[step, step] = (basis[step] @ w).item()
        w = _orthogonal(w, basis[: step + 1])
        left = global_norm(w).item()
        if left <= 100 * torch.finfo(basis.dtype).eps * scale:
            # The span is invariant: what is left is rounding, so the iteration goes on from outside.
            left, w = 0.0, _orthogonal(_raveled(_start(at, seed, probe, step + 1), basis), basis[: step + 1])
        if step + 1 < steps:
            matrix[step, step + 1] = matrix[step + 1, step] = left
    return matrix, basis, left


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    # Twice: the first time leaves the rounding of what it takes away.
    for _ in range(2):
        w = w - (basis @ w) @ basis
    return w


def _raveled(vector: tree.Tree, basis: Tensor) -> Tensor:
    return torch.cat([leaf.to(basis).flatten() for leaf in tree.leaves(vector)])


def _unraveled(vectors: Tensor, at: tree.Tree) -> tree.Tree:
    """Returns the tree like `at`, of leaves [..., *shape], of vectors [..., n]."""
    parts = iter(vectors.split([leaf.numel() for leaf in tree.leaves(at)], dim=-1))
    return tree.map(lambda leaf: next(parts).reshape((*vectors.shape[:-1], *leaf.shape)).to(leaf.device), at)


# Draws, sub-trees and checks.


def _signs(at: tree.Tree, seed: int, probes: int) -> Iterator[tree.Tree]:
    """Yields trees like `at` of independent +1 and -1."""
    for probe in range(probes):
        yield _drawn(at, lambda rng, shape: 2 * rng.integers(0, 2, shape, np.int8) - 1, seed, "hutchinson", probe)


def _start(at: tree.Tree, seed: int, probe: int, restart: int) -> tree.Tree:
    return _drawn(at, lambda rng, shape: rng.standard_normal(shape, np.float32), seed, "lanczos", probe, restart)


def _drawn(at: tree.Tree, draw: Callable, seed: int, purpose: str, *position: int) -> tree.Tree:
    paths = iter(tree.flatten(at))

    def leaf_of(leaf: Tensor) -> Tensor:
        rng = random.generator(seed, f"{purpose}/{next(paths)}", *position)
        return torch.as_tensor(draw(rng, tuple(leaf.shape))).to(leaf)

    return tree.map(leaf_of, at)


def _restricted(fn: Callable, params: tree.Tree, patterns: Patterns) -> tuple[Callable, tree.Tree]:
    """Returns fn as a function of the chosen parameters alone, `(part, *args)`, and them."""
    checks.filled(params)
    if patterns is None:
        return fn, params
    return lambda part, *args: fn(tree.replace(params, part), *args), tree.select(params, patterns)


def _size(at: tree.Tree) -> int:
    return sum(leaf.numel() for leaf in tree.leaves(at))


def _wide(at: tree.Tree) -> torch.dtype:
    return functools.reduce(torch.promote_types, [leaf.dtype for leaf in tree.leaves(at)], torch.float32)
