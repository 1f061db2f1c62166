"""Guidance distilled: a student that is told its guidance draws in one pass what its teacher draws in two."""

import dataclasses

import torch
from gallery import Digits, run, show
from matplotlib.figure import Figure

import flux_func as ff


def picture(digits: Digits, steps: int = 150, batch: int = 32) -> Figure:
    """Trains a student towards the guided digits model; draws digits of both, from the same noise."""
    teacher, told = digits.params, dataclasses.replace(digits.cfg, guidance_embed=True)
    # A copy, since updates are made in place; what tells the guidance is new.
    student = {**ff.tree.map(torch.clone, teacher), "guidance_in": ff.init(told)["guidance_in"]}
    uncond = dict(uncond_txt=digits.txt[10:], uncond_y=digits.y[10:])

    def loss(student: dict, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        taught = dict(teacher=teacher, teacher_cfg=digits.cfg, **uncond)
        return ff.losses.guidance_distillation(student, told, sample, **taught).mean()

    optimizer = ff.optimizer.adamw(ff.optimizer.schedule("cosine", 1e-3, 10, steps + 10), weight_decay=0.0)
    state, draws = optimizer.init(student), torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.randint(len(digits.latents), (batch,), generator=draws)
        sample = digits.batch(index, torch.randn(batch, generator=draws).add(0.5).sigmoid(), seed=step)
        sample["guidance"] = 1 + 5 * torch.rand(batch, generator=draws)
        student, state = optimizer.update(torch.func.grad(loss)(student, sample), state, student)

    rows, noise = {}, torch.randn(10, 16, 8, 8, generator=draws)
    given = dict(noise=noise, txt=digits.txt[:10], y=digits.y[:10], steps=20)
    for scale in (1.0, 2.5, 5.0):
        rows[f"teacher, guided by {scale:g}"] = ff.sample(teacher, digits.cfg, cfg_scale=scale, **uncond, **given)
        rows[f"student, told {scale:g}"] = ff.sample(student, told, guidance=scale, **given)
    return show({name: digits.decode(latents) for name, latents in rows.items()}, "Guided by two passes, and by one")


if __name__ == "__main__":
    run(picture)
