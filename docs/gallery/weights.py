"""The loss around a trained model: every point of the plane is a model, and one vmap computes a row of them."""

import matplotlib.pyplot as plt
import torch
from gallery import Digits, run
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.transforms import weights


def picture(digits: Digits, points: int = 11, samples: int = 32) -> Figure:
    """Draws the loss along two random directions, scaled leaf by leaf to the weights (Li et al. 2018)."""
    batch = digits.batch(torch.arange(samples), torch.linspace(0.05, 0.95, samples))
    draws = torch.Generator().manual_seed(0)

    def direction() -> dict:
        def like(leaf: torch.Tensor) -> torch.Tensor:
            drawn = torch.randn(leaf.shape, generator=draws)
            return drawn * leaf.norm() / drawn.norm()

        return ff.tree.map(like, digits.params)

    across, along = direction(), direction()
    at = torch.linspace(-0.6, 0.6, points)
    losses = torch.func.vmap(ff.loss, in_dims=(0, None, None))
    rows = []
    for y in at.tolist():
        models = [weights.add_tasks(digits.params, [across, along], [x, y]) for x in at.tolist()]
        rows.append(losses(weights.stack(models), digits.cfg, batch))
    figure, axes = plt.subplots(figsize=(5.6, 4.6))
    drawn = axes.contourf(at, at, torch.stack(rows).log10(), levels=18, cmap="viridis")
    axes.plot(0, 0, "w+", markersize=12)
    axes.set(xlabel="along one direction", ylabel="along another", title=f"{points**2} models by {points} calls")
    figure.colorbar(drawn, label="log10 of the loss")
    return figure


if __name__ == "__main__":
    run(picture)
