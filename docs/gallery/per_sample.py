"""Whose gradient is large? The norm of every digit's own gradient, over time and by digit; none is ever held."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.transforms import per_sample


def tiled(images: np.ndarray) -> np.ndarray:
    return np.block([[np.pad(image, 2, constant_values=1) for image in line] for line in images.reshape(4, 5, 64, 64)])


def picture(digits: Digits, samples: int = 1600, t: float = 0.7, draws: int = 2) -> Figure:
    """Draws norms over the timestep, and the digits with the least and the greatest of them at one timestep."""
    every, loss = torch.arange(samples), per_sample.one(ff.loss, digits.cfg)

    def norms(t: torch.Tensor | float, seed: int) -> torch.Tensor:
        return per_sample.ghost_norms(loss, digits.params, digits.batch(every, t, seed), chunk=32)[0]

    times = (every + 0.5) / samples
    over_time = norms(times, seed=0)
    binned = per_sample.by_timestep(times, {"norm": over_time}, bins=20)
    ranked = sum(norms(t, seed) for seed in range(1, 1 + draws)).argsort()
    figure, (left, *right) = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=(4, 3, 3), layout="constrained")
    left.plot(times, over_time, ".", color="silver", markersize=3, label="one digit")
    left.plot(binned["centres"], binned["norm"]["mean"], "k-", label="mean")
    left.set(xlabel="timestep, 1 is noise", ylabel="norm of a digit's gradient", ylim=0, title=f"{samples:,} digits")
    left.legend()
    for axis, name, chosen in zip(right, ("Least", "Greatest"), (ranked[:20], ranked[-20:]), strict=True):
        axis.imshow(tiled(digits.decode(digits.latents[chosen])), cmap="gray")
        axis.set(xticks=[], yticks=[], title=f"{name} gradient at t = {t}")
    return figure


if __name__ == "__main__":
    run(picture)
