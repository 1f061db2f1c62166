"""Linears whose matrix products are taken in Float8 or MXFP8, forward and backward, by torchao's functions.

    ops = Ops(linear=quantized.linear("float8_rowwise", paths))

Input, weight and gradient are scaled and rounded for each product (Micikevicius et al. 2022, arXiv:2209.05433; Rouhani
et al. 2023, arXiv:2310.10537). For the backward pass is kept what a plain linear keeps, input and weight as they came:
no byte more, and a fold can let go of the weight. Compiled, the casts are done again in the backward pass, as they are
eager; the compiler alone would keep those of weights, a byte of each number. torchao's functions go through
torch.autograd and torch.compile, and not through torch.func.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flux_func.models import layers
from flux_func.models.layers import Params

Linear = Callable[[Params, Tensor, str], Tensor]
# (x [..., in], weight [out, in]) to x @ weight.T.
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for.

    Attributes:
      multiple: what a linear's sizes are to be multiples of: inputs, outputs, and rows of input, which are tokens.
      capability: the least of a CUDA device that has such products.
      devices: some that do.
    """

    multiple: int
    capability: tuple[int, int]
    devices: str


RECIPES = {
    # A scale for each tensor; e4m3, and e5m2 for gradients.
    "float8_tensorwise": Recipe(16, (8, 9), "L40S, H100, B200"),
    # A power of two for each row of a factor; e4m3.
    "float8_rowwise": Recipe(16, (9, 0), "H100, B200"),
    # A power of two for each 32 numbers of a row; e4m3.
    "mxfp8": Recipe(32, (10, 0), "B200"),
}


@functools.cache  # one function for the same arguments, or torch.compile would take it for another each time
def linear(recipe: str, paths: frozenset[str], inner: Linear = layers.linear, emulate: bool = False) -> Linear:
    """Returns an `Ops.linear` that takes the products of some linears by a recipe, and does the others by `inner`.

    Args:
      recipe: one of `RECIPES`.
      paths: of the linears, as `Ops.linear` is told them.
      inner: does the others.
      emulate: multiply what was rounded in float32 (MXFP8: in bfloat16), which any device can; it is slow.

    Returns:
      The linear. It raises ValueError for sizes that the recipe does not take, and for types other than bfloat16.

    Raises:
      ValueError: a recipe that there is not. ImportError: torchao is not installed.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} should be one of {', '.join(map(repr, RECIPES))}")
    product = _mxfp8(emulate) if recipe == "mxfp8" else _float8(recipe.removeprefix("float8_"), emulate)

    def run(params: Params, x: Tensor, path: str) -> Tensor:
        if path not in paths:
            return inner(params, x, path)
        x, weight = x.contiguous(), params["weight"]
        check(recipe, path, x, weight)
        y = checkpoint(product, x, weight, use_reentrant=False) if torch.compiler.is_compiling() else product(x, weight)
        return y + params["bias"] if "bias" in params else y

    return run


def check(recipe: str, path: str, x: Tensor, weight: Tensor) -> None:
    """Checks that a recipe takes a linear's input [..., in] and weight [out, in]; ValueError names the linear."""
    if not x.dtype == weight.dtype == torch.bfloat16:
        raise ValueError(f"{path} multiplies {x.dtype} by {weight.dtype}: {recipe} takes bfloat16 alone")
    multiple, sizes = RECIPES[recipe].multiple, (math.prod(x.shape[:-1]), *weight.shape)
    for name, size in zip(("rows of input", "outputs", "inputs"), sizes, strict=True):
        if size % multiple:
            raise ValueError(f"{path} has {size} {name}: {recipe} takes multiples of {multiple}")


def check_device(recipe: str, device: torch.device) -> None:
    """Takes a product and its gradients by a recipe; a CPU emulates them.

    Raises:
      ValueError: the device has no such products; it and what would do are named. ImportError: as for `linear`.
    """
    multiple, needed, devices = dataclasses.astuple(RECIPES[recipe])
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
        name, have = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise ValueError(
            f"{name} is of compute capability {have[0]}.{have[1]}, {recipe} takes {needed[0]}.{needed[1]}: {devices}"
        )
    given = (torch.ones(4 * multiple, 4 * multiple, dtype=torch.bfloat16, device=device) for _ in range(2))
    x, weight = (tensor.requires_grad_() for tensor in given)
    run = linear(recipe, frozenset({"trial"}), emulate=device.type == "cpu")
    try:
        torch.autograd.grad(run({"weight": weight}, x, "trial").sum(), (x, weight))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{recipe} does not run on {device}: {str(error).splitlines()[0]}") from error


def _float8(recipe: str, emulate: bool) -> Product:
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    each = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    products = LinearMMConfig(*(ScaledMMConfig(emulate, one.use_fast_accum) for one in each))
    return lambda x, weight: matmul_with_hp_or_float8_args.apply(x, weight.t(), products, config)


def _mxfp8(emulate: bool) -> Product:
    from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    kernels = KernelPreference.EMULATED if emulate else KernelPreference.AUTO
    return lambda x, weight: _to_mxfp8_then_scaled_mm(x, weight, kernels, ScaleCalculationMode.RCEIL)
