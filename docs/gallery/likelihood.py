"""How likely is an image? log p(x) by the probability-flow ODE, its divergence by forward mode."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.flow import timesteps
from flux_func.transforms import likelihood


def picture(digits: Digits, samples: int = 48, steps: int = 12) -> Figure:
    """Draws the bits per dimension of held-out digits under their own prompt, under another, and with noise added."""
    latents, classes = digits.held_out[:samples], digits.held_out_classes[:samples]
    schedule = timesteps.schedule(steps, image_tokens=16).clamp(min=0.02)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    data = (1 - schedule[-1]) * latents + schedule[-1] * noise
    cases = {
        "its own prompt": (data, classes),
        "the next digit's prompt": (data, (classes + 1) % 10),
        "a little noise added": (data + 0.05 * noise.flip(0), classes),
    }
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, (x, told) in cases.items():
        velocity = ff.velocity(digits.params, digits.cfg, txt=digits.txt[told], y=digits.y[told])
        probes = likelihood.signs(0, 1, x)
        log_p = likelihood.log_prob(velocity, x.float(), schedule.float(), probes=probes, method="heun")
        bits = likelihood.bits_per_dimension(log_p, x[0].numel())
        axes.hist(bits, bins=16, alpha=0.6, label=f"{name}: {bits.mean():.2f} in the mean")
    axes.set(xlabel="bits per dimension of the latents, fewer are likelier", ylabel="digits")
    axes.set_title("Digits that were not trained on")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    return figure


if __name__ == "__main__":
    run(picture)
