"""MeanFlow against flows whose mean velocity is known, and its loss against difference quotients in float64."""

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.flow import losses, meanflow, path, timesteps
from flux_func.models import flux
from tests.helpers import tiny_model
from tests.helpers.tiny_model import CFG, GUIDED, NAIVE, call, column, either_attention, mean_square, on_path, slope

PARAMS = tiny_model.params(GUIDED)
LEAVES = ("img_in.weight", "time_in.in_layer.weight", "guidance_in.in_layer.weight", "single_blocks.0.linear1.weight")


def earlier(batch):
    return batch["timesteps"] * torch.linspace(0.3, 0.8, len(batch["timesteps"]), dtype=torch.float64)


def reference_target(params, batch, r, dx=None):
    """dx/dt - (t - r) du/dt, the derivative along the path by central differences."""
    x, straight = on_path(batch)
    dx, t = straight if dx is None else dx, batch["timesteps"]

    def u(s):
        return call(params, GUIDED, x + s * dx, t + s, batch, t + s - r)

    return dx - column(t - r) * slope(u)


# Flows that are known.


@given(st.floats(0, 0.95), st.floats(0.05, 1), st.floats(0.1, 3))
@settings(max_examples=20, deadline=None)
def test_the_mean_velocity_of_gaussian_data_is_its_own_target(share, t, std):
    # Data N(0, std^2): every point moves as s(t) = sqrt((1 - t)^2 std^2 + t^2), so u is (1 - s(r) / s(t)) / (t - r) x.
    def spread(t):
        return ((1 - t) ** 2 * std**2 + t**2).sqrt()

    def u(x, r, t):
        return x * ((1 - spread(r) / spread(t)) / (t - r))[:, None]

    t = torch.tensor([t], dtype=torch.float64)
    r, x = share * t, torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    velocity = x * ((t - (1 - t) * std**2) / spread(t) ** 2)[:, None]
    torch.testing.assert_close(meanflow.target_of(u, x, r, t, velocity), u(x, r, t), rtol=1e-8, atol=1e-8)


def test_the_mean_velocity_towards_one_image_is_the_velocity():
    image = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    x, t = torch.tensor([[2.0, 1.0]], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)

    def u(x, r, t):
        return (x - image) / t[:, None]

    torch.testing.assert_close(meanflow.target_of(u, x, 0.25 * t, t, u(x, t, t)), u(x, t, t))


# The loss.


def test_target_is_the_difference_quotient():
    batch = tiny_model.batch()
    r, other = earlier(batch), tiny_model.batch(seed=5)["noise"]
    for velocity in (None, other):
        ours = meanflow.target(PARAMS, GUIDED, batch, r, NAIVE, velocity=velocity)
        torch.testing.assert_close(ours, reference_target(PARAMS, batch, r, velocity), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_loss_is_the_weighted_distance_from_a_target_that_is_held(power):
    batch, floor = tiny_model.batch(), 1e-2
    r, (x, _), t = earlier(batch), on_path(batch), batch["timesteps"]
    target = reference_target(PARAMS, batch, r)
    weight = (mean_square(call(PARAMS, GUIDED, x, t, batch, t - r) - target) + floor) ** -power

    def reference(params):
        return weight * mean_square(call(params, GUIDED, x, t, batch, t - r) - target)

    def loss(params):
        return meanflow.loss(params, GUIDED, batch, r, NAIVE, power=power, floor=floor)

    torch.testing.assert_close(loss(PARAMS), reference(PARAMS), rtol=1e-6, atol=1e-8)
    ours, expected = (torch.func.grad(lambda params, f=f: f(params).mean())(PARAMS) for f in (loss, reference))
    for name in LEAVES:
        torch.testing.assert_close(tree.flatten(ours)[name], tree.flatten(expected)[name], rtol=1e-5, atol=1e-8)


def test_where_r_is_t_it_is_flow_matching():
    batch = tiny_model.batch()
    ours = meanflow.loss(PARAMS, GUIDED, batch, batch["timesteps"], NAIVE, power=0.0)
    told = {**batch, "guidance": torch.zeros_like(batch["timesteps"])}
    torch.testing.assert_close(ours.mean(), path.loss(PARAMS, GUIDED, told))


def test_a_target_made_first_gives_the_same_gradients():
    # As a trainer does that takes gradients by torch.autograd.
    batch = tiny_model.batch()
    r = earlier(batch)
    with torch.no_grad():
        target = meanflow.target(PARAMS, GUIDED, batch, r, NAIVE)
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), PARAMS)
    told = {**batch, "guidance": batch["timesteps"] - r}
    value = losses.flow_matching(leaves, GUIDED, told, NAIVE, target=target).mean()
    grads = torch.autograd.grad(value, tree.leaves(leaves))
    expected = torch.func.grad(lambda p: meanflow.loss(p, GUIDED, batch, r, NAIVE, power=0.0).mean())(PARAMS)
    for ours, theirs in zip(grads, tree.leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@either_attention
def test_loss_under_vmap_is_itself_by_sample(ops):
    batch = tiny_model.batch(3)
    r = earlier(batch)

    def one(params, sample, r):
        sample = {name: value[None] for name, value in sample.items()}
        return meanflow.loss(params, GUIDED, sample, r[None], ops, power=0.5)[0]

    grads, values = torch.func.vmap(torch.func.grad_and_value(one), in_dims=(None, 0, 0))(PARAMS, batch, r)
    torch.testing.assert_close(values, meanflow.loss(PARAMS, GUIDED, batch, r, ops, power=0.5))
    mean = torch.func.grad(lambda p: meanflow.loss(p, GUIDED, batch, r, ops, power=0.5).mean())(PARAMS)
    for name, grad in tree.flatten(mean).items():
        torch.testing.assert_close(tree.flatten(grads)[name].mean(0), grad)


@either_attention
def test_in_float32_it_is_what_it_is_in_float64(ops):
    params, batch = (tree.map(torch.Tensor.float, tree_) for tree_ in (PARAMS, tiny_model.batch()))
    ours = meanflow.loss(params, GUIDED, batch, 0.5 * batch["timesteps"], ops, power=0.0)
    batch = tiny_model.batch()
    expected = meanflow.loss(PARAMS, GUIDED, batch, 0.5 * batch["timesteps"], NAIVE, power=0.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)


# Guidance.


def test_guided_velocity_is_the_papers_mixture():
    batch, uncond = tiny_model.batch(), tiny_model.no_prompt()
    (x, dx), t = on_path(batch), batch["timesteps"]
    omega, kappa = torch.tensor([1.5, 1.0]).double(), torch.tensor([0.25, 0.0]).double()
    nothing = {"txt": uncond["uncond_txt"].expand_as(batch["txt"]), "y": uncond["uncond_y"].expand_as(batch["y"])}
    cond, free = (call(PARAMS, GUIDED, x, t, prompts, torch.zeros_like(t)) for prompts in (batch, nothing))
    expected = column(omega) * dx + column(kappa) * cond + column(1 - omega - kappa) * free
    ours = meanflow.guided(PARAMS, GUIDED, batch, omega, kappa, **uncond)
    torch.testing.assert_close(ours, expected)
    # An omega of 1 without kappa is no guidance, as samples without a prompt need.
    torch.testing.assert_close(ours[1], dx[1])
    grads = torch.func.grad(lambda p: meanflow.guided(p, GUIDED, batch, 2.0, **uncond).square().sum())(PARAMS)
    assert all(leaf.count_nonzero() == 0 for leaf in tree.leaves(grads))


# Where training begins.


def test_from_flow_matching_begins_as_the_model_it_was():
    plain, batch = tiny_model.params(), tiny_model.batch()
    params, cfg = meanflow.from_flow_matching(plain, CFG, seed=3)
    assert cfg == GUIDED and {name: leaf.shape for name, leaf in tree.flatten(params).items()} == {
        name: leaf.shape for name, leaf in tree.flatten(PARAMS).items()
    }
    assert all(tree.flatten(params)[name] is leaf for name, leaf in tree.flatten(plain).items())
    (x, _), t = on_path(batch), batch["timesteps"]
    expected = call(plain, CFG, x, t, batch)
    for interval in (torch.zeros_like(t), t, earlier(batch)):
        torch.testing.assert_close(call(params, cfg, x, t, batch, interval), expected, rtol=0, atol=0)
    # The layer before is drawn as the seed says: that of zeros alone would never learn.
    drawn = flux.init(cfg, seed=3, dtype=torch.float64)["guidance_in"]["in_layer"]["weight"]
    assert drawn.any() and torch.equal(params["guidance_in"]["in_layer"]["weight"], drawn)


# Time.


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_times_are_in_order_and_where_they_should_be(ends, inner, still, seed):
    moving, u = ends + inner, torch.rand(2, ends + inner + still, generator=torch.Generator().manual_seed(seed))
    t, r = meanflow.times(u, moving, ends, mean=0.3, std=1.2)
    assert t.dtype == r.dtype == torch.float32 and (r >= 0).all() and (r <= t).all() and (t <= 1).all()
    assert torch.equal(r[moving:], t[moving:]) and (r[:moving] < t[:moving]).all()
    assert (t[:ends] > 0.98).all() and set(r[:ends].tolist()) <= {0.0, 0.5}
    torch.testing.assert_close(t[ends:], timesteps.logit_normal(u[0, ends:], 0.3, 1.2))
    torch.testing.assert_close(r[ends:moving], t[ends:moving] * u[1, ends:moving])


def test_times_have_the_distributions_asked_for():
    u = torch.rand(2, 8000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = meanflow.times(u, moving=6000, ends=4000, mean=0.8, std=1.4)
    assert scipy.stats.kstest(t[:4000], "uniform", args=(0.98, 0.02)).pvalue > 0.01
    assert scipy.stats.binomtest(int((r[:4000] == 0).sum()), 4000).pvalue > 0.01
    assert scipy.stats.kstest(torch.logit(t[4000:]), "norm", args=(0.8, 1.4)).pvalue > 0.01
    assert scipy.stats.kstest(r[4000:6000] / t[4000:6000], "uniform").pvalue > 0.01


def test_slow_models_do_not_see_time_features_above_a_speed():
    slow = tree.flatten(meanflow.slow(PARAMS, 50.0))
    speed = 1000 * 10000 ** -(torch.arange(256) % 128 / 128)
    for name, leaf in tree.flatten(PARAMS).items():
        if name in ("time_in.in_layer.weight", "guidance_in.in_layer.weight"):
            assert torch.equal(slow[name], leaf * (speed <= 50)) and not torch.equal(slow[name], leaf)
        else:
            assert slow[name] is leaf
    # Nothing of them is left in the model: a step of t that only they would notice makes the smooth change it should.
    batch = tiny_model.batch()
    (x, _), t = on_path(batch), batch["timesteps"]
    params, h = tree.unflatten(slow), 1e-3

    def rate(params):
        return call(params, GUIDED, x, t + h, batch, t + h) - call(params, GUIDED, x, t, batch, t)

    assert rate(params).norm() < 0.3 * rate(PARAMS).norm()


# Sampling.


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sampling_takes_steps_of_the_mean_velocity(steps):
    batch = tiny_model.batch()
    x = batch["noise"]
    for i in range(steps, 0, -1):
        t, h = (torch.full((2,), number / steps, dtype=torch.float64) for number in (i, 1))
        x = x - call(PARAMS, GUIDED, x, t, batch, h) / steps
    ours = meanflow.sample(PARAMS, GUIDED, noise=batch["noise"], txt=batch["txt"], y=batch["y"], steps=steps)
    torch.testing.assert_close(ours, x)
    one = meanflow.sample(PARAMS, GUIDED, noise=batch["noise"], txt=batch["txt"][:1], y=batch["y"][:1], steps=steps)
    torch.testing.assert_close(one[0], x[0])


def test_misuse_is_said():
    batch = tiny_model.batch()
    r = earlier(batch)
    with pytest.raises(ValueError, match="guidance_embed is False, it should be True: MeanFlow's second time"):
        meanflow.loss(tiny_model.params(), CFG, batch, r)
    with pytest.raises(ValueError, match="guidance_embed is False"):
        meanflow.sample(tiny_model.params(), CFG, noise=batch["noise"], txt=batch["txt"], y=batch["y"])
    with pytest.raises(ValueError, match="batch has guidance, it should have none"):
        meanflow.loss(PARAMS, GUIDED, {**batch, "guidance": r}, r)
    with pytest.raises(ValueError, match=r"r has shape \(1,\), it should be \(2,\)"):
        meanflow.loss(PARAMS, GUIDED, batch, r[:1])
    with pytest.raises(ValueError, match=r"velocity has shape \(1, 16, 4, 6\)"):
        meanflow.loss(PARAMS, GUIDED, batch, r, velocity=batch["noise"][:1])
    with pytest.raises(ValueError, match="guidance_embed is True, it should be False: t - r goes in where"):
        meanflow.from_flow_matching(PARAMS, GUIDED)
    for ends, moving in ((3, 2), (0, 3), (-1, 1)):
        with pytest.raises(ValueError, match=f"ends {ends} and moving {moving} should be in order from 0 to the batch"):
            meanflow.times(torch.rand(2, 2), moving, ends)
    with pytest.raises(ValueError, match="noise has shape"):
        meanflow.sample(PARAMS, GUIDED, noise=batch["noise"][..., 1:], txt=batch["txt"], y=batch["y"])
    with pytest.raises(ValueError, match="steps 0 should be a whole number from 1 on"):
        meanflow.sample(PARAMS, GUIDED, noise=batch["noise"], txt=batch["txt"], y=batch["y"], steps=0)
    with pytest.raises(ValueError, match=r"u has shape \(8,\), it should be \(2, B\)"):
        meanflow.times(torch.rand(8), 2)
    with pytest.raises(ValueError, match=r"near is 0.9, it should be in \[0, 0.5\)"):
        meanflow.times(torch.rand(2, 4), 2, 1, near=0.9)
    with pytest.raises(ValueError, match=r"omega has shape \(3,\)"):
        meanflow.guided(PARAMS, GUIDED, batch, torch.ones(3), **tiny_model.no_prompt())
    late = {name: value for name, value in batch.items() if name != "timesteps"}
    for ask in (meanflow.loss, meanflow.target):
        with pytest.raises(ValueError, match="batch lacks timesteps"):
            ask(PARAMS, GUIDED, late, r)
    with pytest.raises(ValueError, match="params are of a model whose depth is"):
        meanflow.from_flow_matching({**tiny_model.params(), "double_blocks": []}, CFG)
    with pytest.raises(ValueError, match="params have no guidance_in"):
        meanflow.slow(tiny_model.params())
