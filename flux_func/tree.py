"""What we add to optree: dotted paths.

A tree is nested dicts and lists of tensors. A leaf's path is its keys joined by dots, which for FLUX's
parameters is Black Forest Labs' own state-dict key: `double_blocks.0.img_attn.qkv.weight`.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optree

Tree = Any

# The only sub-trees that are lists; every other level is a dict with string keys.
LISTS = ("double_blocks", "single_blocks")


def map(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Returns the tree of `fn(leaf, *leaves of rest)`; raises ValueError where structures differ."""
    return optree.tree_map(fn, tree, *rest)


def leaves(tree: Tree) -> list:
    """Returns the leaves in optree's order (dict keys sorted), which is the same for equal structures."""
    return optree.tree_leaves(tree)


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {dotted path: leaf}, in optree's order. Inverse of `unflatten`."""
    paths, values, _ = optree.tree_flatten_with_path(tree)
    return {".".join(str(key) for key in path): value for path, value in zip(paths, values, strict=True)}


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Returns the tree whose leaves have these dotted paths. Inverse of `flatten`.

    Children of the names in `LISTS` become lists; `img_mlp.0` and `img_mlp.2` stay dict keys, as in BFL's files.

    Raises:
      ValueError: a path is also the prefix of another, or a list's indices are not 0, 1, 2, ...
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"tree path {path!r}: {key!r} is a leaf and a branch at once")
        if last in node:
            raise ValueError(f"tree path {path!r} is a leaf and a branch at once")
        node[last] = leaf
    return _with_lists(root, "")


def _with_lists(node: Any, name: str) -> Any:
    if not isinstance(node, dict):
        return node
    if name not in LISTS:
        return {key: _with_lists(child, key) for key, child in node.items()}
    if set(node) != {str(i) for i in range(len(node))}:
        raise ValueError(f"tree path {name!r}: indices are {sorted(node)}, they should be 0 to {len(node) - 1}")
    return [_with_lists(node[str(i)], str(i)) for i in range(len(node))]


def match(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first of `patterns` (shell wildcards: `double_blocks.*.img_mlp.*`) that fits `path`, or None."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(path, pattern)), None)


def select(tree: Tree, patterns: Iterable[str]) -> dict[str, Any]:
    """Returns {dotted path: leaf} of the leaves that some pattern fits.

    Raises:
      ValueError: a pattern fits no leaf; the message lists the nearest paths. Or one pattern that is not in a list,
        whose every character would be taken for a pattern.
    """
    if isinstance(patterns, str):
        raise ValueError(f"patterns is {patterns!r}, it should be a list of patterns: [{patterns!r}]")
    flat = flatten(tree)
    patterns = tuple(patterns)
    for pattern in patterns:
        if not fnmatch.filter(flat, pattern):
            near = difflib.get_close_matches(pattern, flat, n=3, cutoff=0.0)
            raise ValueError(f"pattern {pattern!r} fits no path of the tree; the nearest are {', '.join(near)}")
    return {path: leaf for path, leaf in flat.items() if match(patterns, path)}


def bundles(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Returns the paths of {path: bytes} in their order, in bundles of at most `most` bytes each, or of one path."""
    found, total = [[]], 0
    for path, size in sizes.items():
        if found[-1] and total + size > most:
            found.append([])
            total = 0
        found[-1].append(path)
        total += size
    return [bundle for bundle in found if bundle]


def differences(found: Mapping[str, tuple], expected: Mapping[str, tuple], most: int = 20) -> str:
    """Returns on one line what keeps `found` {name: shape} from being `expected`; "" where nothing does.

    Lists the first `most` names that are missing, surplus or of another shape and counts the others. Beside a missing
    or surplus name stands the nearest of the other side, one without a counterpart where there is any.
    """
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    faults = [
        *((f"missing {name}", name, surplus or found) for name in missing),
        *((f"not expected {name}", name, missing or expected) for name in surplus),
        *(
            (f"{name} is {list(found[name])} and should be {list(shape)}", "", ())
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
    ]
    listed = [fault + _nearest(name, others) for fault, name, others in faults[:most]]
    rest = [f"and {len(faults) - most} more"] if len(faults) > most else []
    count = "1 tensor" if len(faults) == 1 else f"{len(faults)} tensors"
    return f"{count}: {'; '.join(listed + rest)}" if faults else ""


def _nearest(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
