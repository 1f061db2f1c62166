"""What does recomputation save? Memory through one gradient, with nothing, some or all of it computed again."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, memory, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.transforms import remat

WAYS = {
    "no recomputation": ff.Ops(),
    "products kept": remat.ops("linear"),
    "attention kept": remat.ops("attention"),
    "nothing kept": remat.ops(),
}


def picture(digits: Digits, samples: int = 4, side: int = 8) -> Figure:
    """Draws what is allocated during a gradient of the digits model, of images of side x side digits each."""
    batch = digits.batch(torch.arange(samples), torch.linspace(0.05, 0.95, samples))
    batch |= {name: batch[name].repeat(1, 1, side, side) for name in ("latents", "noise")}
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for name, ops in WAYS.items():
        gradient = lambda ops=ops: torch.func.grad(ff.loss)(digits.params, digits.cfg, batch, ops)  # noqa: E731
        seconds, mebibytes = min((memory(gradient) for _ in range(3)), key=lambda found: found[0][-1])
        label = f"{name}: {mebibytes.max():,.0f} MiB, {seconds[-1]:.1f} s"
        axes.plot(seconds, mebibytes, drawstyle="steps-post", label=label)
    axes.set(xlabel="seconds, on the CPU", ylabel="MiB allocated, parameters not counted", xlim=0, ylim=0)
    axes.set_title(f"One gradient by torch.func.grad, {samples} images of {16 * side**2:,} tokens")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    run(picture)
