"""How sharp is the loss? The Hessian's eigenvalues, by Lanczos, for the parts of a trained FLUX."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.transforms import curvature

PARTS = {
    "image attention": ["double_blocks.*.img_attn.*"],
    "image MLP": ["double_blocks.*.img_mlp.*"],
    "modulation": ["*_mod.lin.*", "single_blocks.*.modulation.*"],
    "single blocks": ["single_blocks.*.linear?.*"],
}


def picture(digits: Digits, samples: int = 16, steps: int = 12) -> Figure:
    """Draws the density of each part's eigenvalues, and names the largest."""
    batch = digits.batch(torch.arange(samples), torch.linspace(0.05, 0.95, samples))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, patterns in PARTS.items():
        found = curvature.spectrum(
            ff.loss, digits.params, digits.cfg, batch, seed=0, probes=1, steps=steps, patterns=patterns
        )
        top = found.nodes.max().item()
        at = torch.linspace(-0.2 * top, 1.2 * top, 400).to(found.nodes)
        axes.semilogy(at, curvature.density(found, at, width=0.02 * top), label=f"{name}: largest {top:.3g}")
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(1e-6, None))
    axes.set_title("A few directions are sharp, nearly all are flat")
    axes.legend()
    return figure


if __name__ == "__main__":
    run(picture)
