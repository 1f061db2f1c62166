"""Losses by sample against their definitions, written out in float64 with difference quotients for derivatives."""

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.flow import losses, path, sampler
from tests.helpers import tiny_model
from tests.helpers.tiny_model import CFG, GUIDED, NAIVE, call, column, mean_square, on_path, slope

PARAMS, STUDENT = tiny_model.params(), tiny_model.params(GUIDED, seed=1)


def check_gradient(loss, params, names):
    """The gradient of loss(params).mean() in some leaves against difference quotients along a random direction."""
    grads = tree.flatten(torch.func.grad(lambda params: loss(params).mean())(params))
    rng = np.random.default_rng(3)
    for name in names:
        direction = torch.from_numpy(rng.standard_normal(grads[name].shape))

        def moved(h, name=name, direction=direction):
            flat = dict(tree.flatten(params))
            flat[name] = flat[name] + h * direction
            return loss(tree.unflatten(flat)).mean()

        torch.testing.assert_close((grads[name] * direction).sum(), slope(moved), rtol=1e-7, atol=1e-9)


LEAVES = ("img_in.weight", "time_in.in_layer.weight", "single_blocks.0.linear1.weight")


# Flow matching and its weights.


def test_flow_matching_is_path_loss_by_sample():
    batch = tiny_model.batch(3)
    each = losses.flow_matching(PARAMS, CFG, batch)
    torch.testing.assert_close(each.mean(), path.loss(PARAMS, CFG, batch))
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        torch.testing.assert_close(each[i], path.loss(PARAMS, CFG, one))


def test_flow_matching_towards_another_target():
    batch, other = tiny_model.batch(), tiny_model.batch(seed=1)["latents"]
    x, _ = on_path(batch)
    expected = mean_square(call(PARAMS, CFG, x, batch["timesteps"], batch) - other)
    torch.testing.assert_close(losses.flow_matching(PARAMS, CFG, batch, target=other), expected)
    with pytest.raises(ValueError, match=r"target has shape \(1, 16, 4, 6\), it should be \(2, 16, 4, 6\)"):
        losses.flow_matching(PARAMS, CFG, batch, target=other[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_float32_or_wider(dtype):
    params = tree.map(lambda leaf: leaf.to(dtype), PARAMS)
    batch = {name: value.to(torch.float32) for name, value in tiny_model.batch().items()}
    assert losses.flow_matching(params, CFG, batch).dtype == torch.float32
    assert losses.consistency(params, CFG, batch, NAIVE).dtype == torch.float32


def test_weighted_is_the_weighted_mean():
    batch = tiny_model.batch(3)
    expected = (batch["timesteps"].square() * losses.flow_matching(PARAMS, CFG, batch)).mean()
    torch.testing.assert_close(losses.weighted(PARAMS, CFG, batch, torch.square), expected)


# Guidance distillation.


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_guided_velocity_is_what_the_sampler_follows(scale):
    batch, uncond = tiny_model.batch(), tiny_model.no_prompt()
    start = {**batch, "timesteps": torch.ones(2, dtype=torch.float64)}
    v = losses.guided_velocity(PARAMS, CFG, start, scale, **uncond)
    given = dict(noise=batch["noise"], txt=batch["txt"], y=batch["y"], steps=1, cfg_scale=scale, **uncond)
    torch.testing.assert_close(batch["noise"] - v, sampler.sample(PARAMS, CFG, **given))


def test_guidance_distillation_is_the_distance_from_the_guided_teacher():
    batch, uncond = (
        {**tiny_model.batch(), "guidance": torch.tensor([1.5, 4.0], dtype=torch.float64)},
        tiny_model.no_prompt(),
    )
    x, _ = on_path(batch)
    t, w = batch["timesteps"], batch["guidance"].view(-1, 1, 1, 1)
    nothing = {"txt": uncond["uncond_txt"].expand(2, 3, 16), "y": uncond["uncond_y"].expand(2, 8)}
    with_prompt, without = call(PARAMS, CFG, x, t, batch), call(PARAMS, CFG, x, t, nothing)
    guided = without + w * (with_prompt - without)
    expected = mean_square(call(STUDENT, GUIDED, x, t, batch, batch["guidance"]) - guided)

    def loss(params, teacher=PARAMS):
        return losses.guidance_distillation(params, GUIDED, batch, NAIVE, teacher=teacher, teacher_cfg=CFG, **uncond)

    torch.testing.assert_close(loss(STUDENT), expected)
    check_gradient(loss, STUDENT, (*LEAVES, "guidance_in.in_layer.weight"))
    # The teacher is a constant.
    grads = torch.func.grad(lambda teacher: loss(STUDENT, teacher).sum())(PARAMS)
    assert all(leaf.count_nonzero() == 0 for leaf in tree.leaves(grads))


def test_a_student_that_cannot_be_told_is_refused():
    batch, uncond = tiny_model.batch(), tiny_model.no_prompt()
    with pytest.raises(ValueError, match="guidance_embed is False of the student and False of the teacher"):
        losses.guidance_distillation(PARAMS, CFG, batch, teacher=PARAMS, teacher_cfg=CFG, **uncond)
    with pytest.raises(ValueError, match="guidance"):
        losses.guidance_distillation(STUDENT, GUIDED, batch, teacher=PARAMS, teacher_cfg=CFG, **uncond)
    with pytest.raises(ValueError, match=r"uncond_txt has shape \(1, 2, 16\), it should be \(1 or 2, 3, 16\)"):
        losses.guided_velocity(
            PARAMS, CFG, batch, 2.0, uncond_txt=uncond["uncond_txt"][:, 1:], uncond_y=uncond["uncond_y"]
        )


# Consistency.


@pytest.mark.parametrize("warmup, normalizer, taught", [(1.0, None, False), (0.3, 0.1, False), (1.0, 0.1, True)])
def test_consistency_is_the_distance_from_no_change_along_the_path(warmup, normalizer, taught):
    batch = tiny_model.batch()
    (x, dx), t = on_path(batch), column(batch["timesteps"])
    dx = tiny_model.batch(seed=5)["noise"] if taught else dx

    def model(params, s):
        return call(params, CFG, x + s * dx, batch["timesteps"] + s, batch)

    def reference(params, held):
        rate = slope(lambda h: model(held, h))
        change = dx - model(held, 0) - warmup * t * rate
        if normalizer is not None:
            change = change / (change.square().mean((1, 2, 3), keepdim=True).sqrt() + normalizer)
        return mean_square(model(params, 0) - model(held, 0) - change)

    def loss(params, held=None):
        return losses.consistency(
            params, CFG, batch, NAIVE, velocity=dx if taught else None, warmup=warmup, normalizer=normalizer
        )

    torch.testing.assert_close(loss(PARAMS), reference(PARAMS, PARAMS), rtol=1e-6, atol=1e-8)
    ours, expected = (torch.func.grad(lambda p, f=f: f(p, PARAMS).mean())(PARAMS) for f in (loss, reference))
    for name in LEAVES:
        torch.testing.assert_close(tree.flatten(ours)[name], tree.flatten(expected)[name], rtol=1e-5, atol=1e-8)


def test_consistency_without_warmup_is_flow_matching():
    batch = tiny_model.batch()
    torch.testing.assert_close(
        losses.consistency(PARAMS, CFG, batch, NAIVE, warmup=0.0, normalizer=None),
        losses.flow_matching(PARAMS, CFG, batch),
    )


def test_consistencys_gradient_is_that_of_f_times_its_change():
    # The continuous-time objective itself: mean over elements of f . df/dt, over t, df/dt held.
    batch = tiny_model.batch()
    (x, dx), t = on_path(batch), column(batch["timesteps"])

    def f(params, s):
        return x + s * dx - (t + s) * call(params, CFG, x + s * dx, batch["timesteps"] + s, batch)

    rate = slope(lambda h: f(PARAMS, h))
    expected = torch.func.grad(lambda params: (f(params, 0) * rate / t).mean((1, 2, 3)).sum())(PARAMS)
    ours = torch.func.grad(lambda params: losses.consistency(params, CFG, batch, NAIVE, normalizer=None).sum() / 2)(
        PARAMS
    )
    for name in LEAVES:
        torch.testing.assert_close(tree.flatten(ours)[name], tree.flatten(expected)[name], rtol=1e-5, atol=1e-8)


def test_discrete_consistency_is_the_distance_between_two_jumps():
    batch, average = tiny_model.batch(), tiny_model.params(seed=2)
    (x, dx), t = on_path(batch), column(batch["timesteps"])
    earlier = batch["timesteps"] * torch.tensor([0.5, 0.0], dtype=torch.float64)
    s = earlier.view(-1, 1, 1, 1)
    jump = x - t * call(PARAMS, CFG, x, batch["timesteps"], batch)
    before = x + (s - t) * dx
    before = before - s * call(average, CFG, before, earlier, batch)
    ours = losses.discrete_consistency(PARAMS, CFG, batch, earlier, NAIVE, average=average)
    torch.testing.assert_close(ours, mean_square(jump - before))
    # A jump from 0 is no jump: there the aim is the image.
    torch.testing.assert_close(before[1], batch["latents"][1])
    grads = torch.func.grad(
        lambda held: losses.discrete_consistency(PARAMS, CFG, batch, earlier, NAIVE, average=held).sum()
    )(average)
    assert all(leaf.count_nonzero() == 0 for leaf in tree.leaves(grads))


# Under torch.func.


@tiny_model.either_attention
@pytest.mark.parametrize("loss", [losses.flow_matching, losses.consistency])
def test_losses_under_vmap_are_themselves_by_sample(loss, ops):
    batch = tiny_model.batch(3)

    def one(params, sample):
        return loss(params, CFG, {name: value[None] for name, value in sample.items()}, ops)[0]

    values = torch.func.vmap(one, in_dims=(None, 0))(PARAMS, batch)
    torch.testing.assert_close(values, loss(PARAMS, CFG, batch, ops))
    grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(PARAMS, batch)
    mean = torch.func.grad(lambda params: loss(params, CFG, batch, ops).mean())(PARAMS)
    for name, grad in tree.flatten(mean).items():
        torch.testing.assert_close(tree.flatten(grads)[name].mean(0), grad)


@tiny_model.either_attention
def test_consistency_is_the_same_by_default_attention(ops):
    batch = tiny_model.batch()
    ours = losses.consistency(PARAMS, CFG, batch, ops)
    torch.testing.assert_close(ours, losses.consistency(PARAMS, CFG, batch, NAIVE))


def test_misuse_is_said():
    batch, uncond = tiny_model.batch(3), tiny_model.no_prompt()
    with pytest.raises(ValueError, match=r"density returned \[3, 1\], it should be a weight for each: \[3\]"):
        losses.weighted(PARAMS, CFG, batch, lambda t: t[:, None])
    two = {name: value.expand(2, *value.shape[1:]) for name, value in uncond.items()}
    with pytest.raises(ValueError, match=r"uncond_txt has shape \(2, 3, 16\), it should be \(1 or 3, 3, 16\)"):
        losses.guided_velocity(PARAMS, CFG, batch, 2.0, **two)
    with pytest.raises(ValueError, match="params are of a model whose guidance_embed is True, cfg's is False"):
        losses.flow_matching(STUDENT, CFG, batch)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), it should be a number or a tensor \(3,\)"):
        losses.guided_velocity(PARAMS, CFG, batch, torch.ones(2), **uncond)
    with pytest.raises(ValueError, match=r"earlier has shape \(2,\), it should be \(3,\)"):
        losses.discrete_consistency(PARAMS, CFG, batch, batch["timesteps"][:2])
    with pytest.raises(ValueError, match="earlier is a float, it should be"):
        losses.discrete_consistency(PARAMS, CFG, batch, 0.1)
    late = {name: value for name, value in batch.items() if name != "timesteps"}
    for ask in (
        lambda: losses.weighted(PARAMS, CFG, late, torch.ones_like),
        lambda: losses.guided_velocity(PARAMS, CFG, late, 2.0, **uncond),
        lambda: losses.consistency(PARAMS, CFG, late),
    ):
        with pytest.raises(ValueError, match="batch lacks timesteps"):
            ask()
