"""What does the model look at? Attention as a value of a stage, and the patches that a digit hangs on, by one vjp."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

from flux_func.transforms import attribution


def picture(digits: Digits, t: float = 0.4) -> Figure:
    """Draws ten digits; how much each patch moves their loss; and what the last block's patches look at."""
    index = torch.tensor([int((digits.held_out_classes == digit).nonzero()[0]) for digit in range(10)])
    batch = digits.batch(index, t, held_out=True)
    saliency = attribution.token_saliency(digits.params, digits.cfg, batch)["img"]
    last = f"single_blocks.{digits.cfg.depth_single_blocks - 1}"
    maps = attribution.attention_maps(digits.params, digits.cfg, batch, last)
    looked_at = maps["img"]["img"].mean(dim=(1, 2))
    noisy = (1 - t) * batch["latents"] + t * batch["noise"]
    rows = {
        "image": digits.decode(batch["latents"]),
        f"at t = {t}": digits.decode(noisy),
        "saliency": saliency.reshape(10, 4, 4),
        "attention": looked_at.reshape(10, 4, 4),
    }
    figure, axes = plt.subplots(len(rows), 10, figsize=(10, 4.2))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray" if len(image) == 64 else "magma")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("What moves a digit's loss, and what its patches attend to", y=0.95)
    return figure


if __name__ == "__main__":
    run(picture)
