"""The loss under every composition of torch.func's transforms, plain and rematerialized, against finite differences.

The differences are of the loss's values alone, in float64, so that nothing is compared with itself.
"""

import functools

import numpy as np
import pytest
import torch
from torch.func import grad, jvp, vmap

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.transforms import remat

CFG = flux.FluxConfig(
    hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), vec_in_dim=8, context_in_dim=16
)
OPS = {
    "plain": Ops(),
    "remat": remat.ops(),
    "remat, attention kept": remat.ops("attention"),
    "remat, all products kept": remat.ops("attention", "linear"),
}
STEP = 1e-2


def draw(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


@functools.cache
def problem():
    """A batch of two, a point (parameters and timesteps), and two directions at it."""
    rng = np.random.default_rng(0)
    batch = dict(
        latents=draw(rng, 2, 16, 4, 4), noise=draw(rng, 2, 16, 4, 4), txt=draw(rng, 2, 3, 16), y=draw(rng, 2, 8)
    )
    params = flux.init(CFG, scheme="nonzero", dtype=torch.float64)
    point = {"params": params, "timesteps": torch.tensor([0.3, 0.6], dtype=torch.float64)}
    # Time is multiplied by 1000 in the model.
    directions = [
        {"params": tree.map(lambda leaf: 0.02 * draw(rng, *leaf.shape), params), "timesteps": 1e-3 * draw(rng, 2)}
        for _ in range(2)
    ]
    return batch, point, directions


def moved(point, *steps):
    for size, direction in steps:
        point = tree.map(lambda x, d, size=size: x + size * d, point, direction)
    return point


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def loss(point, ops):
    return path.loss(point["params"], CFG, {**problem()[0], "timesteps": point["timesteps"]}, ops=ops)


def loss_of_one(point, sample, ops):
    batch = {name: value[None] for name, value in sample.items()}
    return path.loss(point["params"], CFG, {**batch, "timesteps": point["timesteps"][:1]}, ops=ops)


def first_difference(fn, point, u):
    """Of fourth order in the step."""
    f = [fn(moved(point, (size * STEP, u))) for size in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * STEP)


@functools.cache
def differences():
    """The loss's first and second difference, and each sample's first; by values of the plain loss."""
    batch, point, (u, v) = problem()
    whole = functools.partial(loss, ops=Ops())
    each = [functools.partial(loss_of_one, sample={k: x[i] for k, x in batch.items()}, ops=Ops()) for i in range(2)]
    return {
        1: first_difference(whole, point, u),
        2: first_difference(lambda p: first_difference(whole, p, v), point, u),
        "each": torch.stack([first_difference(fn, point, u) for fn in each]),
    }


def grad_(fn, point, u, v):
    return dot(grad(fn)(point), u)


def jvp_(fn, point, u, v):
    return jvp(fn, (point,), (u,))[1]


def jvp_grad(fn, point, u, v):
    return dot(jvp(grad(fn), (point,), (u,))[1], v)


def grad_grad(fn, point, u, v):
    return dot(grad(lambda p: dot(grad(fn)(p), v))(point), u)


def grad_jvp(fn, point, u, v):
    return dot(grad(lambda p: jvp(fn, (p,), (v,))[1])(point), u)


def jvp_jvp(fn, point, u, v):
    return jvp(lambda p: jvp(fn, (p,), (v,))[1], (point,), (u,))[1]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(
    "order, form", [(1, grad_), (1, jvp_), (2, jvp_grad), (2, grad_grad), (2, grad_jvp), (2, jvp_jvp)]
)
def test_derivatives_are_those_of_finite_differences(ops, order, form):
    _, point, (u, v) = problem()
    found = form(functools.partial(loss, ops=OPS[ops]), point, u, v)
    torch.testing.assert_close(found, differences()[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("form", [grad_, jvp_])
def test_derivatives_of_each_sample_are_those_of_finite_differences(ops, form):
    batch, point, (u, v) = problem()

    def of_one(sample):
        return form(lambda p: loss_of_one(p, sample, OPS[ops]), point, u, v)

    torch.testing.assert_close(vmap(of_one)(batch), differences()["each"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ops", list(OPS)[1:])
def test_each_sample_has_a_hessian_vector_product(ops):
    batch, point, (u, v) = problem()

    def each(form, ops):
        return vmap(lambda sample: form(lambda p: loss_of_one(p, sample, ops), point, u, v))(batch)

    expected = each(jvp_grad, Ops())
    for form in (jvp_grad, grad_grad, grad_jvp, jvp_jvp):
        torch.testing.assert_close(each(form, OPS[ops]), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("ops", list(OPS)[1:])
def test_every_leaf_has_the_plain_gradient(ops):
    _, point, _ = problem()
    plain, found = (tree.flatten(grad(functools.partial(loss, ops=o))(point)) for o in (Ops(), OPS[ops]))
    for name, leaf in plain.items():
        assert (found[name] - leaf).norm() <= 1e-12 * leaf.norm(), name
