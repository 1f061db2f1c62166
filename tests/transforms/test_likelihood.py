"""Densities and ODE maps of flows whose marginals are known in closed form, and of a small FLUX."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.flow import sampler, timesteps
from flux_func.models import flux
from flux_func.transforms import likelihood

TYPE = torch.float64
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=TYPE)
ROOT = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.4, 0.2, 1.5]], dtype=TYPE)
COVARIANCE = ROOT @ ROOT.T
VALUES, VECTORS = torch.linalg.eigh(COVARIANCE)


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def schedule(steps, end=0.0):
    return torch.linspace(1, end, steps + 1, dtype=TYPE)


def velocity(x, t, mean=MEAN):
    """E[eps - x_0 | x_t = x] where x_0 is normal: linear in x."""
    gain = (t - (1 - t) * VALUES) / ((1 - t) ** 2 * VALUES + t**2)
    return (x - (1 - t) * mean.to(x)) @ ((VECTORS * gain) @ VECTORS.T).to(x) - mean.to(x)


def data(samples=4):
    return MEAN + normal(0, samples, 3) @ ROOT.T


def exact(x):
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(x)


def test_log_prob_of_a_gaussian_is_known():
    x = data()
    found = likelihood.log_prob(velocity, x, schedule(20), probes=None)
    torch.testing.assert_close(found, exact(x), rtol=0, atol=1e-4)
    single = likelihood.log_prob(velocity, x.float(), schedule(20), probes=None)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact(x), rtol=0, atol=2e-4)


# Errors fall by 2^order as steps double; on this flow the midpoint rule's by more.
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_errors_are_of_the_methods_order(method, order):
    x = data()
    noise = (x - MEAN) @ (VECTORS * VALUES.rsqrt()) @ VECTORS.T
    errors = []
    for steps in (60, 120):
        log_p = likelihood.log_prob(velocity, x, schedule(steps), probes=None, method=method)
        found = likelihood.encode(velocity, x, schedule(steps), method)
        back = likelihood.decode(velocity, noise, schedule(steps), method)
        errors.append([(log_p - exact(x)).abs().max(), (found - noise).abs().max(), (back - x).abs().max()])
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) > order - 0.1 and fine < 0.05


def mixture(x, t, shift, deviation=0.3):
    """The velocity of two equal normals at +shift and -shift: not linear in x."""
    variance = (1 - t) ** 2 * deviation**2 + t**2
    side = torch.tanh((1 - t) * (x @ shift) / variance)[..., None] * shift
    x0 = side + (1 - t) * deviation**2 / variance * (x - (1 - t) * side)
    noise = t / variance * (x - (1 - t) * side)
    return noise - x0


def test_log_prob_and_score_of_a_mixture_are_known():
    shift = torch.tensor([1.0, 0.5], dtype=TYPE)
    x = torch.tensor([[1.0, 0.6], [0.1, 0.2], [-1.5, 0.4], [0.6, -0.3]], dtype=TYPE)
    parts = [torch.distributions.Normal(side * shift, 0.3) for side in (1, -1)]
    density = lambda x: torch.logsumexp(torch.stack([p.log_prob(x).sum(-1) for p in parts]), 0) - math.log(2)  # noqa: E731
    flow = functools.partial(mixture, shift=shift)
    log_p = lambda x: likelihood.log_prob(flow, x, schedule(48), probes=None)  # noqa: E731
    torch.testing.assert_close(log_p(x), density(x), rtol=0, atol=1e-3)
    score = torch.func.grad(lambda x: log_p(x).sum())(x)
    torch.testing.assert_close(score, torch.func.grad(lambda x: density(x).sum())(x), rtol=1e-3, atol=1e-2)


def test_derivatives_of_log_prob_are_known():
    x, precision = data(), torch.linalg.inv(COVARIANCE)

    def total(x, mean):
        flow = functools.partial(velocity, mean=mean)
        return likelihood.log_prob(flow, x, schedule(40), probes=None).sum()

    score = -(x - MEAN) @ precision
    dx, dmean = torch.func.grad(total, argnums=(0, 1))(x, MEAN)
    torch.testing.assert_close(dx, score, rtol=0, atol=1e-4)
    torch.testing.assert_close(dmean, -score.sum(0), rtol=0, atol=1e-4)
    direction = normal(1, 4, 3)
    _, second = torch.func.jvp(lambda x: torch.func.grad(total)(x, MEAN), (x,), (direction,))
    torch.testing.assert_close(second, -direction @ precision, rtol=0, atol=1e-4)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(total(leaf, MEAN), leaf)[0], dx)


def test_hutchinsons_mean_over_all_signs_is_exact():
    x, shift = normal(2, 3, 2, 2), torch.tensor([0.7, -0.4, 0.2, 0.5], dtype=TYPE)
    flow = lambda x, t: mixture(x.flatten(1), t, shift).view(x.shape)  # noqa: E731
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=TYPE).view(16, 1, 2, 2)
    log_p = functools.partial(likelihood.log_prob, flow, x, schedule(3))
    true = log_p(probes=None)
    torch.testing.assert_close(log_p(probes=every.expand(16, *x.shape)), true, rtol=1e-12, atol=1e-12)
    # Each probe alone is an unbiased estimate of its own.
    probes = likelihood.signs(0, 200, x)
    each = torch.stack([log_p(probes=probe[None]) for probe in probes[:10]])
    torch.testing.assert_close(log_p(probes=probes[:10]), each.mean(0), rtol=1e-12, atol=1e-12)
    error = torch.stack([log_p(probes=part) for part in probes.split(20)])
    assert ((error.mean(0) - true).abs() < 3.5 * error.std(0) / 10**0.5).all() and error.std(0).min() > 1e-4


def test_an_exact_divergence_takes_the_basis_in_parts(monkeypatch):
    x = data()
    whole = likelihood.log_prob(velocity, x, schedule(3), probes=None)
    monkeypatch.setattr(likelihood, "DIRECTIONS_AT_ONCE", 2)
    torch.testing.assert_close(likelihood.log_prob(velocity, x, schedule(3), probes=None), whole, rtol=1e-13, atol=0)


def test_encoding_and_decoding_are_inverse_and_whiten():
    x = data(2000)
    noise = likelihood.encode(velocity, x, schedule(30))
    torch.testing.assert_close(noise.mean(0), torch.zeros(3, dtype=TYPE), rtol=0, atol=0.08)
    torch.testing.assert_close(torch.cov(noise.T), torch.eye(3, dtype=TYPE), rtol=0, atol=0.12)
    torch.testing.assert_close(likelihood.decode(velocity, noise, schedule(30)), x, rtol=0, atol=1e-4)
    # Part of the way there and back; from the middle on the density is that of noisy data.
    part = timesteps.schedule(40, 1024)[15:]
    assert 0.1 < part[0] < 1
    there = likelihood.encode(velocity, x, part)
    torch.testing.assert_close(likelihood.decode(velocity, there, part), x, rtol=0, atol=1e-4)
    t = 0.25
    noisy = torch.distributions.MultivariateNormal((1 - t) * MEAN, (1 - t) ** 2 * COVARIANCE + t**2 * torch.eye(3))
    found = likelihood.log_prob(velocity, x[:4], schedule(20, end=t), probes=None)
    torch.testing.assert_close(found, noisy.log_prob(x[:4]), rtol=0, atol=1e-4)


def test_types_are_the_inputs_own():
    x = data().bfloat16()
    assert likelihood.encode(velocity, x, schedule(2)).dtype == torch.bfloat16
    assert likelihood.log_prob(velocity, x, schedule(2), probes=None).dtype == torch.float32
    assert likelihood.log_prob(velocity, x, schedule(2), probes=likelihood.signs(0, 1, x)).dtype == torch.float32
    # float64 is float64 throughout: both ways, what is lost is not float32's rounding.
    x, fine = data(), schedule(400)
    torch.testing.assert_close(
        likelihood.decode(velocity, likelihood.encode(velocity, x, fine), fine), x, atol=1e-9, rtol=0
    )


def test_signs_are_counted_by_sample():
    like = torch.zeros(5, 2, 3, dtype=TYPE)
    whole = likelihood.signs(7, 3, like)
    assert whole.shape == (3, 5, 2, 3) and whole.dtype == TYPE and set(whole.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(likelihood.signs(7, 2, like[3:], position=3), whole[:2, 3:])
    assert not torch.equal(likelihood.signs(8, 3, like), whole)
    assert abs(likelihood.signs(0, 50, like).mean()) < 0.1


def test_bits_per_dimension_are_those_of_the_levels():
    # Levels of 0 to 255 with noise, as such and as images are scaled: the same code, the same bits.
    levels = torch.distributions.Normal(torch.tensor(100.0, dtype=TYPE), 20.0)
    x = torch.tensor([[90.5, 130.2], [60.1, 101.9]], dtype=TYPE)
    scaled = torch.distributions.Normal(levels.mean / 127.5 - 1, 20 / 127.5)
    bits = likelihood.bits_per_dimension(levels.log_prob(x).sum(1), 2)
    again = likelihood.bits_per_dimension(scaled.log_prob(x / 127.5 - 1).sum(1), 2, bin_width=1 / 127.5)
    torch.testing.assert_close(bits, again, rtol=1e-12, atol=0)
    # Uniform over 256 levels: 8 bits; over [0, 1) in units of its own: none.
    assert likelihood.bits_per_dimension(torch.tensor(-3 * math.log(256)), 3) == pytest.approx(8)
    assert likelihood.bits_per_dimension(torch.zeros(1), 3) == 0
    assert likelihood.bits_per_dimension(torch.zeros(1), 3, bin_width=1 / 256) == pytest.approx(8)


# FLUX itself.

CFG = flux.FluxConfig(
    hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 4, 4), vec_in_dim=8, context_in_dim=16
)
GUIDED = dataclasses.replace(CFG, guidance_embed=True)


@pytest.fixture(scope="module")
def params():
    return {cfg: flux.init(cfg, seed=3, scheme="nonzero", dtype=TYPE) for cfg in (CFG, GUIDED)}


def prompt(samples):
    return dict(txt=normal(1, samples, 3, 16), y=normal(2, samples, 8))


@pytest.mark.parametrize("cfg", [CFG, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_decoding_by_euler_is_the_sampler(params, cfg, prompts):
    noise, guidance = normal(0, 2, 16, 4, 6), 2.5 if cfg.guidance_embed else None
    given = dict(**prompt(prompts), guidance=guidance)
    expected = sampler.sample(params[cfg], cfg, noise=noise, steps=3, **given)
    flow = sampler.velocity(params[cfg], cfg, **given)
    found = likelihood.decode(flow, noise, timesteps.schedule(3, 6), method="euler")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    single = tree.map(torch.Tensor.float, params[cfg])
    low = sampler.velocity(single, cfg, **{k: v.float() if hasattr(v, "float") else v for k, v in given.items()})
    back = likelihood.decode(low, noise.float(), timesteps.schedule(3, 6), method="euler")
    assert back.dtype == torch.float32 and (back - expected).norm() < 1e-5 * expected.norm()


def test_an_image_is_encoded_and_edited_back(params):
    x, times = normal(0, 2, 16, 2, 4), timesteps.schedule(16, None)
    flow = sampler.velocity(params[CFG], CFG, **prompt(2))
    noise = likelihood.encode(flow, x, times)
    assert (noise - x).norm() > 0.1 * x.norm()
    torch.testing.assert_close(likelihood.decode(flow, noise, times), x, rtol=0, atol=1e-3)
    other = sampler.velocity(params[CFG], CFG, txt=normal(5, 1, 3, 16), y=normal(6, 1, 8))
    edited = [
        (likelihood.decode(other, likelihood.encode(flow, x, part), part) - x).norm() for part in (times, times[8:])
    ]
    assert edited[0] > edited[1] > 1e-2


def test_flux_log_prob_is_that_of_the_explicit_jacobian(params):
    x, times = normal(0, 2, 16, 2, 2) / 2, schedule(2)
    flow = sampler.velocity(params[CFG], CFG, **prompt(2))
    found = likelihood.log_prob(flow, x, times, probes=None, method="midpoint")
    state, gained = x.clone(), torch.zeros(2, dtype=TYPE)
    for t in (0.25, 0.75):
        middle = state + 0.25 * flow(state, torch.tensor(t - 0.25, dtype=TYPE))
        at = torch.tensor(t, dtype=TYPE)
        jacobian = torch.autograd.functional.jacobian(lambda x, at=at: flow(x, at), middle).reshape(2, 64, 2, 64)
        gained += 0.5 * torch.stack([jacobian[b, :, b].trace() for b in range(2)])
        assert jacobian[0, :, 1].abs().max() == 0
        state = state + 0.5 * flow(middle, at)
    expected = gained + torch.distributions.Normal(0, 1).log_prob(state).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_flux_log_prob_is_differentiable_in_x_and_in_the_parameters(params):
    x, times, p = normal(0, 1, 16, 2, 2), schedule(2), params[CFG]
    probes = likelihood.signs(0, 2, x)

    def log_p(p, x):
        flow = sampler.velocity(p, CFG, **prompt(1))
        return likelihood.log_prob(flow, x, times, probes=probes, method="heun").sum()

    flat = {name: normal(i, *leaf.shape) / 10 for i, (name, leaf) in enumerate(tree.flatten(p).items())}
    along, dx = tree.unflatten(flat), normal(9, *x.shape)
    grads, dlog = torch.func.grad(log_p, argnums=(0, 1))(p, x)
    slope = sum((a * b).sum() for a, b in zip(tree.leaves(grads), tree.leaves(along), strict=True)) + (dlog * dx).sum()
    h = 1e-5
    ends = [log_p(tree.map(lambda q, d, s=s: q + s * h * d, p, along), x + s * h * dx) for s in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_misuse_gives_a_sentence(params):
    x, noise = data(), normal(0, 2, 16, 4, 4)
    with pytest.raises(ValueError, match="method 'rk45' should be one of 'euler', 'midpoint', 'heun', 'rk4'"):
        likelihood.encode(velocity, x, schedule(2), method="rk45")
    for wrong in (schedule(2).flip(0), schedule(2)[:1], schedule(2)[None]):
        with pytest.raises(ValueError, match="should be times .* that descend"):
            likelihood.decode(velocity, x, wrong)
    with pytest.raises(ValueError, match="schedule starts at 0.5, it should start at 1"):
        likelihood.log_prob(velocity, x, schedule(4)[2:], probes=None)
    with pytest.raises(ValueError, match=r"probes have shape \(4, 3\), they should be \('K', 4, 3\)"):
        likelihood.log_prob(velocity, x, schedule(2), probes=torch.ones(4, 3))
    with pytest.raises(ValueError, match="^probes are 4: should be a tensor, such as likelihood.signs gives"):
        likelihood.log_prob(velocity, x, schedule(2), probes=4)
    with pytest.raises(ValueError, match=r"^schedule is \[1.0, 0.0\]: should be a tensor"):
        likelihood.encode(velocity, x, [1.0, 0.0])

    def halves(x, t):
        return x[:, :1]

    for run in (likelihood.encode, functools.partial(likelihood.log_prob, probes=None)):
        with pytest.raises(ValueError, match=r"halves returned a tensor \[4, 1\], it should be shaped as x, \[4, 3\]"):
            run(halves, x, schedule(2))
    flow = functools.partial(sampler.velocity, params[CFG], CFG)
    with pytest.raises(ValueError, match="this model takes no guidance"):
        likelihood.encode(flow(**prompt(2), guidance=1.0), noise, schedule(2))
    with pytest.raises(ValueError, match=r"txt has shape \(3, 3, 16\)"):
        likelihood.encode(flow(**prompt(3)), noise, schedule(2))
    with pytest.raises(ValueError, match=r"x has shape \(2, 16, 3, 4\)"):
        likelihood.encode(flow(**prompt(2)), noise[:, :, :3], schedule(2))
