"""What we add to optree: dotted paths.

A tree is nested dicts and lists of tensors. A leaf's path is its keys joined by dots, which for FLUX's
parameters is Black Forest Labs' own state-dict key: `double_blocks.0.img_attn.qkv.weight`.
"""

import difflib
import fnmatch
import functools
import re
import textwrap
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


def replace(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Returns the tree with other leaves at these dotted paths, which are among its own."""
    values = iter({**flatten(tree), **leaves}.values())
    return map(lambda _: next(values), tree)


def match(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first of `patterns` (shell wildcards: `double_blocks.*.img_mlp.*`) that fits `path`, or None."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(path, pattern)), None)


def select(tree: Tree, patterns: Iterable[str], note: str = "") -> dict[str, Any]:
    """Returns {dotted path: leaf} of the leaves that some pattern fits.

    Args:
      tree: any.
      patterns: at least one.
      note: what the message for a pattern that fits no leaf ends in.

    Raises:
      ValueError: a pattern fits no leaf; the message lists the nearest paths. Or there is none, or one that is not in
        a list, whose every character would be taken for a pattern.
    """
    if isinstance(patterns, str):
        raise ValueError(f"patterns is {patterns!r}, it should be a list of patterns: [{patterns!r}]")
    flat = flatten(tree)
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError("patterns is empty, it should be a list of patterns: ['*'] chooses all")
    for pattern in patterns:
        if not fnmatch.filter(flat, pattern):
            near = f"; the nearest are {', '.join(_nearest_of(pattern, flat))}" if flat else ", there is none"
            raise ValueError(f"pattern {pattern!r} fits no path of the tree{near}{note}")
    return {path: leaf for path, leaf in flat.items() if match(patterns, path)}


def _nearest_of(pattern: str, paths: Iterable[str], most: int = 3) -> list[str]:
    """Returns the paths whose keys are most like the words of a pattern, one for each choice of such keys."""
    words = [word for word in re.split(r"[.*?!\[\]]+", pattern) if word]

    @functools.cache
    def likeness(word: str, key: str) -> float:
        return difflib.SequenceMatcher(None, word, key, autojunk=False).ratio()

    def keys(path: str) -> tuple[str, ...]:
        return tuple(max(path.split("."), key=lambda key: likeness(word, key)) for word in words)

    def score(path: str) -> tuple[float, float]:
        alike = sum(len(word) * likeness(word, key) for word, key in zip(words, keys(path), strict=True))
        return alike, likeness(pattern, path)

    found: dict[tuple, str] = {}
    for path in sorted(paths, key=score, reverse=True):
        found.setdefault(keys(path), path)
    return list(found.values())[:most]


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


def misfit(found: Tree, expected: Tree) -> str:
    """Returns on one line what keeps a tree from having the paths, shapes and structure of another; "" where nothing
    does."""

    def shapes(tree: Tree) -> dict[str, tuple]:
        return {path or "it": tuple(getattr(leaf, "shape", ())) for path, leaf in flatten(tree).items()}

    unlike = differences(shapes(found), shapes(expected))
    return unlike or _built_apart(optree.tree_structure(found), optree.tree_structure(expected))


def _built_apart(found: optree.PyTreeSpec, expected: optree.PyTreeSpec, path: str = "") -> str:
    """Returns the first node that two trees of the same leaves have built in different ways, in words, or ""."""
    if found == expected:
        return ""
    nodes = [spec.one_level() for spec in (found, expected)]
    if nodes[0] != nodes[1]:
        words = (str(node).removeprefix("PyTreeSpec(").removesuffix(")") for node in nodes)
        one, other = (textwrap.shorten(word, 100, placeholder=" ...") for word in words)
        return f"the leaves are the same, but {path or 'the top'} is {one} and should be {other}"
    pairs = zip(found.entries(), found.children(), expected.children(), strict=True)
    return next(filter(None, (_built_apart(a, b, f"{path}.{entry}".lstrip(".")) for entry, a, b in pairs)))
