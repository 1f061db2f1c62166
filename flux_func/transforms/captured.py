"""What a function holds beside its arguments: tensors that are differentiated there would be lost on a transform."""

import functools
import types
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# How many objects are looked at: one may hold a whole program.
MOST = 10_000

# What a function calls by a global name, and does not hold.
_CALLED = (types.FunctionType, types.ModuleType, type)


def check(name: str, held: Sequence[tuple[str, Any]]) -> None:
    """Checks that what a function holds is not differentiated, nor mapped over.

    Args:
      name: the function's.
      held: (what it is to the function, value): the function itself, say, whose closure, defaults, bound arguments,
        attributes and global variables by name are looked at, and the attributes of the objects in there and of their
        classes. Not so functions, modules and classes by global names, nor more than `MOST` objects.

    Raises:
      ValueError: a tensor is, and would silently get a gradient of zero.
    """
    for where, tensor in _held(list(held)):
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped or (tensor.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"{name} holds a tensor {list(tensor.shape)} ({where}) which is differentiated or mapped over: "
                "it should be an argument, since remat would give it a gradient of zero"
            )


def _held(left: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of the tensors in functions, objects and containers, all the way down."""
    seen: dict[int, Any] = {}  # the values too, or another would get the address of one that is gone
    while left and len(seen) < MOST:
        name, value = left.pop()
        if id(value) in seen or isinstance(value, types.ModuleType):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (dict, types.MappingProxyType)):
            left += [(name, item) for item in value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            left += [(name, item) for item in value]
        elif isinstance(value, functools.partial):
            left += [("a bound argument", (value.args, value.keywords)), (name, value.func)]
        elif isinstance(value, types.MethodType):
            left += [("an attribute", value.__self__), (name, value.__func__)]
        elif isinstance(value, types.BuiltinFunctionType):
            left += [("what it is bound to", value.__self__)]
        elif isinstance(value, types.FunctionType):
            left += [("a default", (value.__defaults__, value.__kwdefaults__)), *_variables(value)]
        elif isinstance(value, type):
            left += [(f"attribute {key}", item) for key, item in _of_class(value)]
        else:
            left += [(f"attribute {key}", item) for key, item in (*_attributes(value), *_of_class(type(value)))]


def _of_class(cls: type) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the tensors, and of what may hold some, among the attributes of a class."""
    for base in cls.__mro__:
        for name, value in vars(base).items() if base.__module__ != "builtins" else ():
            if isinstance(value, (Tensor, dict, list, tuple)) and not name.startswith("__"):
                yield name, value


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        yield from ((name, getattr(value, name)) for name in names if hasattr(value, name))


def _variables(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of what a function closes over, and of the globals that it names and does not call."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        # A variable that has no value yet has no contents.
        with suppress(ValueError):
            yield f"variable {name}", cell.cell_contents
    for name in _names(fn.__code__):
        value = fn.__globals__.get(name)
        if not isinstance(value, _CALLED):
            yield f"variable {name}", value


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Returns the names in a function's code, and in that of the functions within."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
