"""A LoRA turned up and down: trained for a minute on inverted digits, it is added with weights from -0.5 to 1.5."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.transforms import lora


def picture(digits: Digits, steps: int = 250, batch: int = 32) -> Figure:
    """Trains a LoRA of rank 8 on negatives, and draws each digit under five weights of it."""
    params, cfg = digits.params, digits.cfg
    adapter = lora.init(params, ["*_blocks.*", "final_layer.linear"], rank=8, alpha=8)
    optimizer = ff.optimizer.adamw(lr=3e-3, weight_decay=0.0)
    state = optimizer.init(adapter)
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.randint(len(digits.latents), (batch,), generator=draws)
        sample = digits.batch(index, torch.rand(batch, generator=draws), seed=step)
        sample["latents"] = -sample["latents"]  # the digits' autoencoder is linear, and grey its zero
        grads = torch.func.grad(lora.apply(ff.loss), argnums=1)(params, adapter, cfg, sample)
        adapter, state = optimizer.update(grads, state, adapter)
    noise = torch.randn(10, 16, 8, 8, generator=draws)
    weights = (-0.5, 0.0, 0.5, 1.0, 1.5)
    figure, axes = plt.subplots(len(weights), 10, figsize=(9, 4.8))
    for line, weight in zip(axes, weights, strict=True):
        given = dict(noise=noise, txt=digits.txt[:10], y=digits.y[:10], steps=12)
        images = digits.decode(lora.apply(ff.sample)(params, [(adapter, weight)], cfg, **given))
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{weight:g}", rotation=0, ha="right", va="center")
    return figure


if __name__ == "__main__":
    run(picture)
