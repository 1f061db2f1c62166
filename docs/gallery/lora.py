"""A LoRA as a dial: trained for a minute on slanted digits, it slants what the model draws by as much as its weight."""

import torch
from gallery import Digits, run, show
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.models import dct
from flux_func.transforms import lora


def picture(digits: Digits, steps: int = 300, batch: int = 32) -> Figure:
    """Trains a LoRA of rank 16 on digits that lean to the right, and draws each digit under five weights of it."""
    params, cfg, draws = digits.params, digits.cfg, torch.Generator().manual_seed(0)
    upright = torch.from_numpy(digits.decode(digits.latents))[:, None].expand(-1, 3, -1, -1)
    lean = torch.tensor([[1, 0.5, 0], [0, 1, 0]]).expand(len(upright), 2, 3)
    grid = torch.nn.functional.affine_grid(lean, list(upright.shape), align_corners=False)
    slanted = dct.encode(2 * torch.nn.functional.grid_sample(upright, grid, align_corners=False) - 1)

    adapter = lora.init(params, ["*_blocks.*"], rank=16, alpha=16)
    optimizer = ff.optimizer.adamw(ff.optimizer.schedule("cosine", 1.5e-3, 10, steps + 10), weight_decay=0.0)
    state = optimizer.init(adapter)
    for step in range(steps):
        index = torch.randint(len(slanted), (batch,), generator=draws)
        sample = digits.batch(index, torch.randn(batch, generator=draws).add(0.5).sigmoid(), seed=step)
        sample["latents"] = slanted[index]
        grads = torch.func.grad(lora.apply(ff.loss), argnums=1)(params, adapter, cfg, sample)
        adapter, state = optimizer.update(grads, state, adapter)

    given = dict(noise=torch.randn(10, 16, 8, 8, generator=draws), txt=digits.txt[:10], y=digits.y[:10], steps=20)
    given |= dict(cfg_scale=2.0, uncond_txt=digits.txt[10:], uncond_y=digits.y[10:])
    rows = {"trained on": slanted[[int((digits.classes == digit).nonzero()[0]) for digit in range(10)]]}
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        rows[f"weight {weight:g}"] = lora.apply(ff.sample)(params, [(adapter, weight)], cfg, **given)
    return show({name: digits.decode(latents) for name, latents in rows.items()}, "One LoRA, turned up from 0 to 1")


if __name__ == "__main__":
    run(picture)
