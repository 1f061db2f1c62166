"""Arithmetic on whole models: means and paths between checkpoints, task vectors, ensembles, freezing, summaries.

    both = weights.lerp(ff.load(one)[0], ff.load(other)[0], 0.5)
    models = weights.stack([ff.init(cfg, seed=seed) for seed in range(4)])
    losses = torch.func.vmap(ff.loss, in_dims=(0, None, None))(models, cfg, batch)
    trained, frozen = weights.partition(params, ["double_blocks.*_mod.*"])
    grads = torch.func.grad(lambda part: ff.loss(weights.combine(part, frozen), cfg, batch))(trained)
    print(weights.table(weights.summarize(grads)))

Each is a function of trees of one structure and gives new ones: nothing is donated. Sums are made in float32, or in a
leaf's own type if that is wider, and come back in the leaf's type. Weights may be tensors: all is differentiable in
them, as a learned soup needs.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from flux_func import tree
from flux_func.models.layers import at_least_float32
from flux_func.transforms import checks

Weight = float | Tensor

# Stands where a leaf is in the other part. It holds no leaf, for optree as for torch.func (which refuses None).
HOLE = ()
# Of either part, where only the structure counts.
_ANY = torch.empty(())

_BLOCK_OF = re.compile(rf"\b({'|'.join(tree.LISTS)})\.\d+\.")


# Between checkpoints.


def soup(trees: Sequence[tree.Tree], weights: Sequence[float] | Tensor | None = None) -> tree.Tree:
    """Returns the weighted mean of checkpoints, sum w_i p_i / sum w_i (Wortsman et al. 2022, arXiv:2203.05482).

    Args:
      trees: at least one.
      weights: a number for each, or a tensor [len(trees)]; None: equal ones.

    Raises:
      ValueError: trees that differ, another number of weights, or numbers whose sum is 0. (That of tensors is not
        looked at, which could mean to wait for a device.)
    """
    _check_alike(trees, "soup")
    weights = _weights(weights, len(trees), "soup")
    total = sum(weights)
    if not isinstance(total, Tensor) and total == 0:
        raise ValueError(f"soup: the weights {list(weights)} add up to 0, their sum should not be 0")
    return _sum(trees, [weight / total for weight in weights])


def lerp(start: tree.Tree, end: tree.Tree, weight: Weight) -> tree.Tree:
    """Returns (1 - weight) start + weight end: a point of the line through two checkpoints, `end` exactly at 1.

    Args:
      start, end: trees alike.
      weight: a number or a scalar tensor; outside [0, 1] it is extrapolated.

    Raises:
      ValueError: trees that differ, or a weight that is no scalar.
    """
    checks.weight("weight", weight)
    _check_alike((start, end), "lerp")
    return _sum((start, end), (1 - weight, weight))


def slerp(start: tree.Tree, end: tree.Tree, weight: Weight) -> tree.Tree:
    """Returns each leaf turned from `start` to `end` by `weight` of the angle between them (Shoemake 1985).

    Between leaves of one length the length is kept, where `lerp` would shorten them. A leaf is one vector. Where
    either is zero, or they are opposite and no plane is given to turn in, it is the leaf of `lerp`.

    Args:
      start, end: trees alike.
      weight: a number or a scalar tensor.

    Raises:
      ValueError: trees that differ, or a weight that is no scalar.
    """
    checks.weight("weight", weight)
    _check_alike((start, end), "slerp")
    return tree.map(lambda a, b: _turn(a, b, weight), start, end)


def _turn(start: Tensor, end: Tensor, weight: Weight) -> Tensor:
    a, b = (leaf.to(at_least_float32(leaf.dtype)) for leaf in (start, end))
    tiny = torch.finfo(a.dtype).tiny
    lengths = [torch.linalg.vector_norm(leaf) for leaf in (a, b)]
    one, other = (leaf / length.clamp(min=tiny) for leaf, length in zip((a, b), lengths, strict=True))
    # Twice the arctangent of half the rhombus keeps its digits at small angles, where the arccosine loses half.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(one - other), torch.linalg.vector_norm(one + other))
    straight = (lengths[0] == 0) | (lengths[1] == 0) | (torch.pi - angle < 1e-3)
    angle = torch.where(straight, 0.0, angle) / torch.pi
    # sin(w x) / sin(x) as w sinc(w x) / sinc(x): at an angle of 0 it is w.
    parts = [share * torch.sinc(share * angle) / torch.sinc(angle) for share in (1 - weight, weight)]
    return (parts[0] * a + parts[1] * b).to(start.dtype)


# Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089).


def task_vector(finetuned: tree.Tree, base: tree.Tree) -> tree.Tree:
    """Returns finetuned - base: what fine-tuning did.

    Raises:
      ValueError: trees that differ.
    """
    _check_alike((base, finetuned), "task_vector")
    return _sum((finetuned, base), (1, -1))


def add_tasks(
    base: tree.Tree, vectors: Sequence[tree.Tree], weights: Sequence[float] | Tensor | None = None
) -> tree.Tree:
    """Returns base + sum w_i v_i.

    Args:
      base: a model's parameters.
      vectors: task vectors of this base.
      weights: a number for each, or a tensor [len(vectors)]; None: 1 each. Negative ones take a skill away.

    Raises:
      ValueError: trees that differ, or another number of weights.
    """
    _check_listed(vectors, "add_tasks")
    _check_alike((base, *vectors), "add_tasks")
    weights = _weights(weights, len(vectors), "add_tasks")
    return _sum((base, *vectors), (1, *weights))


def negate(vector: tree.Tree) -> tree.Tree:
    """Returns -vector: added, it makes a model forget the task."""
    return tree.map(torch.neg, vector)


# Ensembles.


def stack(trees: Sequence[tree.Tree]) -> tree.Tree:
    """Returns the one tree whose leaves are [len(trees), ...]: an ensemble, for torch.func.vmap over its first axis.

    Raises:
      ValueError: trees that differ, or none.
    """
    _check_alike(trees, "stack")
    return tree.map(lambda *leaves: torch.stack(leaves), *trees)


def unstack(stacked: tree.Tree) -> list[tree.Tree]:
    """Returns the trees of which `stack` made this one; their leaves share its memory.

    Raises:
      ValueError: leaves that have no first axis, or first axes of different lengths.
    """
    sizes = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in tree.flatten(stacked).items()}
    path, size = next(iter(sizes.items()), ("", 0))
    for other, found in sizes.items():
        if found is None or found != size:
            has = "no axis" if found is None else f"a first axis of {found}"
            raise ValueError(f"unstack: {other} has {has}, it should have a first axis of {size or 1} as {path}")
    return [tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(size or 0)]


# Freezing.


def partition(params: tree.Tree, patterns: Iterable[str]) -> tuple[tree.Tree, tree.Tree]:
    """Returns (trained, frozen): two trees shaped as the parameters, each leaf in the one, a hole in the other.

    The leaves whose paths some pattern fits are trained. A hole holds nothing, so a gradient, an optimizer or a moving
    average of `trained` is of those leaves alone, by their own paths. After equinox's partition (Kidger and Garcia
    2021, arXiv:2111.00254).

    Args:
      params: any tree.
      patterns: of dotted paths, with shell wildcards: `double_blocks.*.img_mlp.*`.

    Raises:
      ValueError: no pattern, or one that fits no path; the message lists the nearest.
    """
    chosen = tree.select(params, patterns)
    paths, leaves, spec = optree.tree_flatten_with_path(params)
    here = [".".join(map(str, path)) in chosen for path in paths]

    def part(wanted: bool) -> tree.Tree:
        return spec.unflatten([leaf if is_in is wanted else HOLE for is_in, leaf in zip(here, leaves, strict=True)])

    return part(True), part(False)


def combine(trained: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """Returns the tree of which `partition` made these two.

    Raises:
      ValueError: structures that differ, or a leaf that is in both or in neither.
    """
    filled = (optree.tree_map(lambda _: _ANY, part, is_leaf=is_hole) for part in (frozen, trained))
    checks.alike(*filled, "combine: frozen is not like trained")

    def either(path: tuple, one: Tensor | tuple, other: Tensor | tuple) -> Tensor:
        if is_hole(one) == is_hole(other):
            where = "neither part" if is_hole(one) else "both parts"
            raise ValueError(f"combine: {'.'.join(map(str, path))} is in {where}, it should be in one")
        return other if is_hole(one) else one

    return optree.tree_map_with_path(either, trained, frozen, is_leaf=is_hole)


def is_hole(node: Any) -> bool:
    """Returns whether a node stands where a leaf is in the other part."""
    return isinstance(node, tuple) and node == HOLE


# Summaries.


class Row(NamedTuple):
    """What a group of leaves is like. Statistics are over the finite elements of all its leaves together.

    Attributes:
      name: the path, with `*` for the block where several blocks' leaves are taken together.
      shape: of one leaf; None of the row of all, whose name is "*".
      leaves: how many.
      count: their elements.
      mean, std, rms: std is the population's, rms the root of the mean square.
      max_abs: the largest magnitude.
      zeros, nonfinite: shares of the elements, in [0, 1].
    """

    name: str
    shape: tuple[int, ...] | None
    leaves: int
    count: int
    mean: float
    std: float
    rms: float
    max_abs: float
    zeros: float
    nonfinite: float


@torch.no_grad()
def summarize(params: tree.Tree, group: bool = True) -> list[Row]:
    """Returns a row for each group of leaves, in the tree's order, and last one for all: of parameters, gradients, ...

    Args:
      params: a tree of real tensors.
      group: whether the same leaf of every block is one row.

    Raises:
      ValueError: a leaf on the meta device, which has no values, or a tree without leaves.
    """
    flat = tree.flatten(params)
    meta = [path for path, leaf in flat.items() if leaf.is_meta]
    if meta or not flat:
        raise ValueError(f"summarize: {meta[0]} is on the meta device" if meta else "summarize: the tree has no leaves")
    groups: dict[tuple, list[str]] = {}
    for path, leaf in flat.items():
        name = _BLOCK_OF.sub(lambda found: f"{found[1]}.*.", path) if group else path
        groups.setdefault((name, tuple(leaf.shape)), []).append(path)
    moments = {path: _moments(leaf) for path, leaf in flat.items()}
    return [_row(*key, [moments[path] for path in paths]) for key, paths in groups.items()] + [
        _row("*", None, list(moments.values()))
    ]


def table(rows: Sequence[Row]) -> str:
    """Returns rows as aligned text, with a head line."""
    head = ("leaves", "shape", "count", "mean", "std", "rms", "max|x|", "zeros", "nonfinite")
    cells = [head]
    for row in rows:
        name = row.name if row.leaves == 1 else f"{row.name} (x{row.leaves})"
        shape = "" if row.shape is None else str(list(row.shape))
        numbers = [f"{value:.3g}" for value in (row.mean, row.std, row.rms, row.max_abs)]
        cells.append((name, shape, f"{row.count:,}", *numbers, f"{row.zeros:.1%}", f"{row.nonfinite:.1%}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _moments(leaf: Tensor) -> Tensor:
    """Returns [6], float64: elements, zeros, finite ones; and of these the mean, sum of squares about it and largest
    magnitude."""
    leaf = leaf.detach().flatten()
    finite = leaf.isfinite()
    kept = (leaf if finite.all() else leaf[finite]).to(torch.float64)
    mean = kept.mean() if kept.numel() else 0.0
    largest = torch.stack(torch.aminmax(kept)).abs().max() if kept.numel() else 0.0
    zeros, about = leaf.numel() - leaf.count_nonzero(), (kept - mean).square_().sum()
    numbers = (leaf.numel(), zeros, kept.numel(), mean, about, largest)
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device="cpu") for number in numbers])


def _row(name: str, shape: tuple[int, ...] | None, moments: list[Tensor]) -> Row:
    count, zeros, finite, means, about, largest = torch.stack(moments, dim=1)
    total, size = finite.sum(), count.sum().item()
    # Of no elements these are nan, as they should be.
    mean = (finite * means).sum() / total
    variance = (about + finite * (means - mean) ** 2).sum() / total
    return Row(
        name,
        shape,
        len(moments),
        int(size),
        mean.item(),
        variance.sqrt().item(),
        (variance + mean**2).sqrt().item(),
        largest.max().item(),
        zeros.sum().item() / max(size, 1),
        (size - total.item()) / max(size, 1),
    )


# What they share.


def _sum(trees: Sequence[tree.Tree], weights: Sequence[Weight]) -> tree.Tree:
    def combined(*leaves: Tensor) -> Tensor:
        wide = at_least_float32(leaves[0].dtype)
        return sum(weight * leaf.to(wide) for weight, leaf in zip(weights, leaves, strict=True)).to(leaves[0].dtype)

    return tree.map(combined, *trees)


def _weights(weights: Sequence[float] | Tensor | None, count: int, name: str) -> Sequence[Weight]:
    weights = [1.0] * count if weights is None else weights
    if isinstance(weights, Tensor):
        if tuple(weights.shape) != (count,):
            raise ValueError(f"{name}: weights is {list(weights.shape)}, it should be [{count}]: one for each tree")
        return weights.unbind()
    if len(weights) != count:
        raise ValueError(f"{name}: {len(weights)} weights for {count} trees, there should be one for each")
    for place, weight in enumerate(weights):
        checks.weight(f"{name}: weight {place}", weight)
    return weights


def _check_alike(trees: Sequence[tree.Tree], name: str) -> None:
    """Checks that all trees have the structure of the first and its leaves' shapes."""
    _check_listed(trees, name)
    if not trees:
        raise ValueError(f"{name}: no trees, there should be at least one")
    for index, one in enumerate(trees[1:], 1):
        checks.alike(one, trees[0], f"{name}: tree {index} is not like tree 0")


def _check_listed(trees: Sequence[tree.Tree], name: str) -> None:
    if not isinstance(trees, Sequence):
        raise ValueError(f"{name}: the trees are a {type(trees).__name__}, they should be in a list")
