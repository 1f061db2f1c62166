"""How BFL's modules are called and watched, and torchtitan's, which are made after them."""

from typing import Any

from torch import Tensor, nn

# What the model's forward calls its patches and their time.
IMAGE, TIME = "img", "timesteps"


def velocity(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Returns the model's output."""
    return model(**given)


def blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Returns the double and the single blocks."""
    return model.double_blocks, model.single_blocks


def double_in(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns what goes into a double block, by our names."""
    return {name: kwargs[name] for name in ("img", "txt", "vec")}


def double_out(out: tuple) -> dict[str, Tensor]:
    """Returns what comes out of a double block."""
    return dict(zip(("img", "txt"), out, strict=True))


def single_in(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns what goes into a single block."""
    return {"stream": args[0]}


def single_out(out: Tensor) -> dict[str, Tensor]:
    """Returns what comes out of a single block."""
    return {"stream": out}
