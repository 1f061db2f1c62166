"""An image to its noise and back under another prompt: the flow is a map that can be walked both ways."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.flow import timesteps
from flux_func.transforms import likelihood


def picture(digits: Digits, steps: int = 20) -> Figure:
    """Draws held-out threes, what comes back under their own prompt, and what under four others."""
    threes = digits.held_out[digits.held_out_classes == 3][:6]
    schedule = timesteps.schedule(steps, image_tokens=16).float()

    def told(digit: int) -> likelihood.Velocity:
        row = torch.tensor([digit])
        return ff.velocity(digits.params, digits.cfg, txt=digits.txt[row], y=digits.y[row])

    # Not quite to the noise: what is left of the image is its style.
    part = schedule[steps // 6 :]
    noise = likelihood.encode(told(3), threes, part)
    rows = {"image": threes}
    for digit, name in {3: "and back", 5: "as a five", 8: "as an eight", 9: "as a nine", 2: "as a two"}.items():
        rows[name] = likelihood.decode(told(digit), noise, part)
    figure, axes = plt.subplots(len(rows), len(threes), figsize=(6, 6.4))
    for line, (name, latents) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, digits.decode(latents), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


if __name__ == "__main__":
    run(picture)
