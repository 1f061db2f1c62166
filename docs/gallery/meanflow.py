"""Mean velocities: the digits model learns from its own velocity, by a jvp in time, to draw in one step."""

import torch
from gallery import Digits, run, show
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.flow import losses, meanflow


def picture(digits: Digits, steps: int = 90, batch: int = 32) -> Figure:
    """Draws from one noise: the model by Euler's method, and in one step at first and as it learns."""
    params, cfg = meanflow.from_flow_matching(digits.params, digits.cfg)
    params = ff.tree.map(torch.clone, meanflow.slow(params))
    optimizer = ff.optimizer.adamw(ff.optimizer.schedule("linear", 1e-3, steps // 9, steps), weight_decay=0.0)
    state, draws = optimizer.init(params), torch.Generator().manual_seed(0)
    given = dict(noise=torch.randn(10, 16, 8, 8, generator=draws), txt=digits.txt[:10], y=digits.y[:10])
    uncond = dict(uncond_txt=digits.txt[10:], uncond_y=digits.y[10:])

    def loss(params: dict, sample: dict, r: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        return meanflow.loss(params, cfg, sample, r, velocity=velocity, power=0.75, floor=0.01).mean()

    plain = {n: ff.sample(digits.params, digits.cfg, steps=n, shift=False, **given) for n in (25, 1)}
    rows = {"25 Euler steps": plain[25], "1 Euler step": plain[1]}
    for step in range(1, steps + 1):
        t, r = meanflow.times(torch.rand(2, batch, generator=draws), moving=batch, ends=4, mean=0.8, std=1.4)
        sample = digits.batch(torch.randint(len(digits.latents), (batch,), generator=draws), t, seed=step)
        velocity = losses.guided_velocity(digits.params, digits.cfg, sample, 1.2, **uncond)
        grads = meanflow.slow(torch.func.grad(loss)(params, sample, r, velocity))
        params, state = optimizer.update(ff.optimizer.clip(grads, 1.0)[0], state, params)
        if step * 3 % steps == 0:
            rows[f"1 step after {step} updates"] = meanflow.sample(params, cfg, **given)
    return show({name: digits.decode(latents) for name, latents in rows.items()}, "Digits in one step")


if __name__ == "__main__":
    run(picture)
