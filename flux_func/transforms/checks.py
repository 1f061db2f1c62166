"""What is given to transforms, and what functions given to them return, checked and said in one way by all of them."""

import functools
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import optree
from torch import Tensor

from flux_func import tree
from flux_func.tree import Tree

# Functions.


def scalar(fn: Callable, of: str = "") -> Callable[..., Tensor]:
    """Returns `fn`, which raises ValueError where it returns no scalar tensor; `of` says of what, " for one sample"."""

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Tensor:
        value = fn(*args, **kwargs)
        if not isinstance(value, Tensor) or value.ndim:
            raise ValueError(f"{returned(fn, value)}{of}, it should be a scalar tensor")
        return value

    return checked


def returned(fn: Callable, value: Any) -> str:
    """Returns "loss returned a tensor [3]"."""
    return f"{name(fn)} returned a {_kind(value)}"


def name(fn: Callable) -> str:
    """Returns what a function is called: its name, or that of the function in a partial."""
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", fn), "__name__", repr(fn))


def _kind(value: Any) -> str:
    return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# Numbers.


def count(name: str, value: int, least: int = 1) -> None:
    """Raises ValueError where a value is no whole number from `least` on."""
    if not isinstance(value, numbers.Integral) or value < least:
        found = repr(value) if isinstance(value, numbers.Number) else f"a {_kind(value)}"
        raise ValueError(f"{name} is {found}: should be a whole number from {least} on")


def positive(name: str, value: float) -> None:
    """Raises ValueError where a value is not above 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value!r}: should be a number above 0")


def weight(name: str, value: float | Tensor) -> None:
    """Raises ValueError where a value is neither a number nor a scalar tensor, and would be broadcast."""
    if not isinstance(value, numbers.Real) and (not isinstance(value, Tensor) or value.ndim):
        raise ValueError(f"{name} is a {_kind(value)}: should be a number or a scalar tensor")


# Trees.


def alike(found: Tree, expected: Tree, what: str) -> tuple[list, list]:
    """Returns the leaves of both trees, in pairs; no value is looked at.

    Raises:
      ValueError: `found` has another structure than `expected`, or other shapes; the message is `what`, and where.
    """
    (ours, spec), (theirs, other) = optree.tree_flatten(found), optree.tree_flatten(expected)
    if spec != other or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(f"{what}: {tree.misfit(found, expected)}")
    return ours, theirs


def like(found: Tree, expected: Tree, what: str) -> Tree:
    """Returns `found` in the types, devices and key order of `expected`; raises as `alike`."""
    alike(found, expected, what)
    return tree.map(lambda leaf, value: value.to(leaf), expected, found)


def filled(params: Tree) -> Tree:
    """Returns params; raises ValueError where they have no leaf to differentiate in."""
    if not tree.leaves(params):
        raise ValueError("params has no leaves: there is nothing to differentiate in")
    return params


def samples(batch: Tree, name: str = "batch") -> int:
    """Returns how many samples a batch has, B.

    Raises:
      ValueError: there are none, or its tensors have not one first dimension.
    """
    sizes = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in tree.flatten(batch).items()}
    if len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
        raise ValueError(f"{name} has the first dimensions {sizes}: should be one, the number of samples")
    return next(iter(sizes.values()))


def chunks(batch: Tree, chunk: int | None, name: str = "batch") -> Iterator[Tree]:
    """Returns the batch in parts of `chunk` samples, None: in one.

    Raises:
      ValueError: as `samples`, or a chunk below 1.
    """
    size = samples(batch, name)
    if chunk is not None:
        count("chunk", chunk)
    step = chunk or size
    return (tree.map(lambda leaf, i=i: leaf[i : i + step], batch) for i in range(0, size, step))
