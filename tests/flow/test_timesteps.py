import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import random
from flux_func.flow import timesteps

fast = settings(max_examples=50, deadline=None)


def draws(count=4000):
    values = [random.uniform(5, "timestep", position) for position in range(count)]
    return torch.tensor(values, dtype=torch.float64)


def test_logit_normal_is_scipys_quantile():
    u = torch.linspace(0.001, 0.999, 201, dtype=torch.float64)
    for mean, std in ((0.0, 1.0), (-0.5, 1.5), (1.0, 0.3)):
        expected = 1 / (1 + np.exp(-scipy.stats.norm.ppf(u.numpy(), mean, std)))
        np.testing.assert_allclose(timesteps.logit_normal(u, mean, std), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1.0, 50.0])
def test_logit_normal_stays_inside_even_at_the_ends(dtype, std):
    u = torch.tensor([0.0, torch.finfo(dtype).tiny, 0.5, 1 - torch.finfo(dtype).eps / 2, 1.0], dtype=dtype)
    t = timesteps.logit_normal(u, 0.0, std)
    assert t.dtype == dtype and (t > 0).all() and (t < 1).all()
    assert (t.diff() >= 0).all() and t[2] == 0.5


@given(st.floats(-1, 1), st.floats(0.5, 2), st.floats(0.02, 0.98))
@settings(max_examples=20, deadline=None)
def test_logit_normal_density_is_that_of_its_draws(mean, std, u):
    # Where the quantile function has slope s, the density is 1 / s.
    h = 1e-6
    points = timesteps.logit_normal(torch.tensor([u - h, u, u + h], dtype=torch.float64), mean, std)
    density = timesteps.logit_normal_density(points[1], mean, std)
    assert density.item() == pytest.approx((2 * h / (points[2] - points[0])).item(), rel=1e-6)


@given(st.floats(-1, 2 / (math.pi - 2) - 1e-2), st.floats(0.02, 0.98))
@settings(max_examples=20, deadline=None)
def test_mode_density_is_that_of_its_draws(scale, u):
    h = 1e-6
    points = timesteps.mode(torch.tensor([u - h, u, u + h], dtype=torch.float64), scale)
    density = timesteps.mode_density(points[1], scale)
    assert density.item() == pytest.approx((2 * h / (points[0] - points[2])).item(), rel=1e-6)


@pytest.mark.parametrize("density", [timesteps.logit_normal_density, timesteps.mode_density])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_are_finite_and_add_up_to_one(density, dtype):
    t = torch.linspace(0, 1, 2001, dtype=dtype)
    values = density(t)
    assert values.dtype == dtype and values.isfinite().all()
    assert torch.trapezoid(values.double(), t.double()).item() == pytest.approx(1, abs=2e-4)


def test_mode_has_both_ends_and_refuses_what_is_not_monotonic():
    ends = timesteps.mode(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="scale 1.8 should be from -1 to"):
        timesteps.mode(ends, 1.8)


def test_a_density_weights_as_its_draws_would():
    # The mean of any f(t) over draws from p is that of p f over uniform ones.
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for draws, density in (
        (timesteps.logit_normal(u), timesteps.logit_normal_density),
        (timesteps.mode(u), timesteps.mode_density),
    ):
        assert torch.exp(draws).mean().item() == pytest.approx((density(u) * torch.exp(u)).mean().item(), rel=1e-6)


def test_counted_draws_have_the_distributions_asked_for():
    u = draws()
    uniform = timesteps.sample("uniform", u)
    logit = torch.logit(timesteps.sample("logit_normal", u))
    assert torch.equal(uniform, u)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(logit, "norm").pvalue > 0.01
    assert scipy.stats.kstest(torch.logit(timesteps.logit_normal(u, 0.3, 2.0)), "norm", args=(0.3, 2.0)).pvalue > 0.01
    # P(t < t(u)) is 1 - u: the mode's timesteps descend in u.
    t = timesteps.sample("mode", u)
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    below = np.interp(np.sort(t), timesteps.mode(grid).flip(0), (1 - grid).flip(0))
    assert scipy.stats.kstest(below, "uniform").pvalue > 0.01


def test_stratified_puts_one_sample_in_each_stratum_and_is_uniform():
    batch, u = 8, draws()
    index = torch.arange(len(u)) % batch
    t = timesteps.sample("stratified", u, index, batch)
    assert torch.equal((t * batch).floor().long(), index)
    assert t.dtype == torch.float64 and scipy.stats.kstest(t, "uniform").pvalue > 0.01
    # The mean of a stratified batch varies less than that of independent draws, by the factor batch squared.
    assert t.view(-1, batch).mean(1).var() * 30 < u.view(-1, batch).mean(1).var()
    assert timesteps.stratified(torch.tensor([0.5]), 3, 4).item() == 0.875


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'beta' should be 'uniform'"):
        timesteps.sample("beta", draws(2))


def test_mu_is_the_line_through_fluxs_two_points(bfl_sampling):
    assert timesteps.shift_mu(256) == 0.5
    assert timesteps.shift_mu(4096) == pytest.approx(1.15, abs=1e-15)
    line = bfl_sampling.get_lin_function()
    for tokens in (16, 1024, 16384):
        assert timesteps.shift_mu(tokens) == pytest.approx(line(tokens), abs=1e-12)


@fast
@given(st.floats(1e-6, 1.0), st.floats(-2.0, 3.0))
def test_shift_is_the_closed_form(t, mu):
    expected = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    value = timesteps.shift(torch.tensor([t], dtype=torch.float64), mu)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    # Two shifts add up, and the negative one undoes it.
    assert timesteps.shift(value, -mu).item() == pytest.approx(t, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_keeps_the_ends_exactly_and_has_derivatives_there(dtype):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=dtype, requires_grad=True)
    shifted = timesteps.shift(t, 1.15)
    assert shifted[0] == 0 and shifted[2] == 1 and shifted.dtype == dtype
    (slope,) = torch.autograd.grad(shifted.sum(), t)
    expected = [math.exp(1.15), math.exp(-1.15) / (0.5 + 0.5 * math.exp(-1.15)) ** 2, math.exp(-1.15)]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize(("steps", "tokens"), [(1, 256), (4, 1024), (50, 4096), (20, 4 * 256)])
def test_schedule_is_bfls(bfl_sampling, steps, tokens):
    for shift in (True, False):
        ours = timesteps.schedule(steps, tokens if shift else None)
        assert ours.shape == (steps + 1,) and ours[0] == 1 and ours[-1] == 0 and (ours.diff() < 0).all()
        expected = torch.tensor(bfl_sampling.get_schedule(steps, tokens, shift=shift), dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)  # BFL computes in float32


def test_schedule_is_diffusers():
    steps, tokens = 12, 1024
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    # As FluxPipeline does: sigmas without the last zero, which the scheduler appends. Sigmas shift, not 0..1000.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=timesteps.shift_mu(tokens))
    ours = timesteps.schedule(steps, tokens)
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=2e-6, atol=0)
    torch.testing.assert_close(1000 * ours[:-1].float(), scheduler.timesteps, rtol=2e-6, atol=0)


def test_schedule_needs_a_step():
    with pytest.raises(ValueError, match="steps 0 should be a whole number from 1 on"):
        timesteps.schedule(0, 256)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 0.81, 1.29])
def test_mode_density_has_its_derivatives(scale):
    t = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)

    def density(t):
        return timesteps.mode_density(t, scale)

    h = 1e-4
    first = torch.func.vmap(torch.func.grad(density))(t)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(density)))(t)
    below, at, above = density(t - h), density(t), density(t + h)
    torch.testing.assert_close(first, (above - below) / (2 * h), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, (above - 2 * at + below) / h**2, rtol=1e-4, atol=1e-4)


def test_shift_has_a_derivative_in_mu():
    t, mu = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    shifted = timesteps.shift(t, mu)
    assert shifted == timesteps.shift(t, 0.7)
    # logit(t') = logit(t) + mu
    torch.testing.assert_close(torch.func.grad(timesteps.shift, argnums=1)(t, mu), shifted * (1 - shifted))


def test_what_no_distribution_has_is_refused():
    u = torch.rand(4)
    for std in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="^std .* should be above 0$"):
            timesteps.logit_normal(u, std=std)
        with pytest.raises(ValueError, match="^std .* should be above 0$"):
            timesteps.logit_normal_density(u, std=std)
    with pytest.raises(ValueError, match="^batch_size 0 should be at least 1$"):
        timesteps.stratified(u, 0, 0)
    with pytest.raises(ValueError, match=r"index 5 should be in \[0, 2\)"):
        timesteps.stratified(u, 5, 2)
    with pytest.raises(ValueError, match="'stratified' need index and batch_size"):
        timesteps.sample("stratified", u)
    with pytest.raises(ValueError, match="^steps 2.5 should be a whole number from 1 on$"):
        timesteps.schedule(2.5, None)
