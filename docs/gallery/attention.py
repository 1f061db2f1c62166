"""What does a derivative of attention cost? Memory and time over the tokens, beside torch's math backend."""

from functools import partial
from timeit import repeat

import matplotlib.pyplot as plt
import torch
from gallery import Digits, memory, run
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_func.models.attention import attention


def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def picture(digits: Digits, lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)) -> Figure:
    """Draws jvp and jvp(grad) of 2 heads of 128, as FLUX's are; an image of 1024 pixels is 4,096 tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.1), layout="constrained")
    for name, attend, mark in (("flux_func", attention, "o-"), ("math backend", theirs, "s--")):
        grad = torch.func.grad(lambda *qkv, attend=attend: attend(*qkv).square().sum(), argnums=(0, 1, 2))
        for kind, fn, color in (("jvp", attend, "tab:blue"), ("jvp(grad)", grad, "tab:red")):
            given = [tuple(torch.randn(3, 1, 2, length, 128)) for length in lengths]
            calls = [partial(torch.func.jvp, fn, qkv, qkv) for qkv in given]
            found = [memory(call)[1].max() for call in calls], [min(repeat(call, number=1, repeat=2)) for call in calls]
            for axis, values in zip(axes, found, strict=True):
                axis.loglog(lengths, values, mark, color=color, label=f"{kind}, {name}")
    for axis, title, unit in zip(axes, ("Peak memory", "Time on the CPU"), ("MiB", "seconds"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set(title=title, ylabel=unit, xlabel="tokens", xticks=lengths, xticklabels=lengths)
    axes[0].legend()
    figure.suptitle("Derivatives of attention, 2 heads of 128 in float32")
    return figure


if __name__ == "__main__":
    run(picture)
