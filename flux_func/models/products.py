"""The product of a linear by oneDNN, for processors on which the library that torch multiplies by is slower."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_func.models.layers import Params, is_transformed


def linear(params: Params, x: Tensor, path: str) -> Tensor:
    """Returns `layers.linear`, an `Ops.linear`: plain float32 on a CPU and without gradients by oneDNN, else as there.

    To rounding the same. Both are in torch, whose own choice for float32 is MKL: on AMD's processors oneDNN is faster.
    """
    del path
    weight, bias = params["weight"], params.get("bias")
    if torch.is_grad_enabled() or is_transformed() or not all(map(_fits, (x, weight))) or not x.numel():
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _fits(x: Tensor) -> bool:
    # A subclass, such as of quantized weights, has products of its own.
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32


# An operator of our own: inductor takes oneDNN's for one of weights that never change.
@torch.library.custom_op("flux_func::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], weight.shape[0])
