"""The path and the loss against their definitions, in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux

TINY = flux.flavor("flux-tiny")


def draw_batch(cfg=TINY, batch=2, height=4, width=6, text=3, dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    out = dict(
        latents=normal(batch, 16, height, width),
        noise=normal(batch, 16, height, width),
        timesteps=torch.from_numpy(rng.random(batch)).to(dtype),
        txt=normal(batch, text, cfg.context_in_dim),
        y=normal(batch, cfg.vec_in_dim),
    )
    return {**out, "guidance": torch.linspace(1, 4, batch, dtype=dtype)} if cfg.guidance_embed else out


@given(st.floats(0, 1), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_target_is_the_derivative_of_the_path(t, batch):
    data, noise = draw_batch(batch=batch)["latents"], draw_batch(batch=batch, seed=1)["latents"]
    times = torch.full((batch,), t, dtype=torch.float64)
    moved = path.interpolate(data, noise, times + 1e-6) - path.interpolate(data, noise, times - 1e-6)
    torch.testing.assert_close(moved / 2e-6, path.target(data, noise), rtol=1e-7, atol=1e-8)


def test_t_of_one_is_noise():
    data, noise = draw_batch()["latents"], draw_batch(seed=1)["latents"]
    assert torch.equal(path.interpolate(data, noise, torch.ones(2, dtype=torch.float64)), noise)
    assert torch.equal(path.interpolate(data, noise, torch.zeros(2, dtype=torch.float64)), data)


@pytest.mark.parametrize("guided", [False, True])
def test_loss_is_the_mean_squared_error_of_the_velocity(guided):
    cfg = dataclasses.replace(TINY, guidance_embed=guided)
    params, batch = flux.init(cfg, scheme="nonzero", dtype=torch.float64), draw_batch(cfg)
    t = batch["timesteps"].view(-1, 1, 1, 1)
    velocity = flux.apply(
        params,
        cfg,
        img=flux.patchify((1 - t) * batch["latents"] + t * batch["noise"]),
        img_ids=flux.image_ids(4, 6),
        txt=batch["txt"],
        txt_ids=flux.text_ids(3),
        timesteps=batch["timesteps"],
        y=batch["y"],
        guidance=batch.get("guidance"),
    )
    error = flux.unpatchify(velocity, 4, 6) - (batch["noise"] - batch["latents"])
    torch.testing.assert_close(path.loss(params, cfg, batch), error.square().mean())
    torch.testing.assert_close(path.loss(params, cfg, batch, denominator=10), error.square().sum() / 10)


def test_loss_at_initialization_is_the_second_moment_of_the_target():
    batch = draw_batch()
    loss = path.loss(flux.init(TINY, dtype=torch.float64), TINY, batch)
    torch.testing.assert_close(loss, (batch["noise"] - batch["latents"]).square().mean())


@pytest.mark.parametrize("size", [(1, 4, 6), (5, 4, 6), (2, 8, 8)])
def test_loss_does_not_scale_with_batch_or_resolution(size):
    batch = draw_batch(TINY, *size)
    loss = path.loss(flux.init(TINY, dtype=torch.float64), TINY, batch)
    assert loss.item() == pytest.approx(2, rel=0.2)


def test_loss_is_float32_or_wider():
    params = flux.init(TINY, scheme="nonzero", dtype=torch.bfloat16)
    assert path.loss(params, TINY, draw_batch(dtype=torch.float32)).dtype == torch.float32


def test_gradient_agrees_with_finite_differences():
    params, batch = flux.init(TINY, scheme="nonzero", dtype=torch.float64), draw_batch()
    grads = tree.flatten(torch.func.grad(path.loss)(params, TINY, batch))
    rng = np.random.default_rng(0)
    for name in ("img_in.weight", "double_blocks.1.txt_mod.lin.weight", "single_blocks.0.norm.key_norm.scale"):
        direction = torch.from_numpy(rng.standard_normal(grads[name].shape))

        def moved(h, name=name, direction=direction):
            flat = dict(tree.flatten(params))
            flat[name] = flat[name] + h * direction
            return path.loss(tree.unflatten(flat), TINY, batch)

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        torch.testing.assert_close((grads[name] * direction).sum(), numeric, rtol=1e-6, atol=1e-9)


def test_misfit_latents_are_named():
    batch = draw_batch()
    with pytest.raises(ValueError, match="latents and noise"):
        path.loss(flux.init(TINY), TINY, {**batch, "noise": batch["noise"][:1]})
    odd = batch["noise"][..., 1:]
    with pytest.raises(ValueError, match="even h and w"):
        path.loss(flux.init(TINY), TINY, {**batch, "noise": odd, "latents": odd})
    with pytest.raises(ValueError, match=r"timesteps has shape \(1,\)"):
        path.loss(flux.init(TINY), TINY, {**batch, "timesteps": batch["timesteps"][:1]})
    fill = dataclasses.replace(TINY, in_channels=2 * TINY.in_channels)
    with pytest.raises(ValueError, match="should be equal for a flow"):
        path.loss(flux.init(fill), fill, batch)
    lacking = {name: value for name, value in batch.items() if name not in ("noise", "y")}
    with pytest.raises(ValueError, match="batch lacks noise, y: it has latents, timesteps, txt"):
        path.loss(flux.init(TINY), TINY, lacking)


def test_a_column_is_a_number_for_each_sample():
    like = torch.zeros(2, 3, 4)
    assert path.column(2.0, like) == 2.0 and path.column(torch.tensor(2.0), like).shape == ()
    assert path.column(torch.tensor([1.0, 2.0]), like).tolist() == [[[1.0]], [[2.0]]]
    for wrong in (torch.ones(1), torch.ones(3), torch.ones(2, 1), [1.0, 2.0], None):
        with pytest.raises(ValueError, match=r"t (has shape|is) .* it should be a number or a tensor \(2,\)"):
            path.column(wrong, like, "t")
