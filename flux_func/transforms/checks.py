"""What a function given by the caller returned, said in one way by all transforms."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


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
    """Returns "loss returned a tensor [3]": a function by its name, or that of the function in a partial."""
    name = getattr(fn, "__name__", None) or getattr(getattr(fn, "func", fn), "__name__", repr(fn))
    what = f"tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return f"{name} returned a {what}"
