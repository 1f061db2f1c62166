"""Curvature against explicit Hessians and Jacobians of small functions, in float64."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.transforms import curvature, per_sample

TYPE = torch.float64


def normal(seed, *shape):
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape), dtype=TYPE)


def network():
    """A tree of 24 parameters, inputs [5, 4] and targets [5, 2]."""
    layers = [{"k": normal(2, 2, 3)}, {"k": normal(3, 2)}]
    # Keys out of the alphabet's order, a list, and a leaf without dimensions.
    params = {"w": normal(0, 3, 4), "b": normal(1, 3), "layers": layers, "scale": normal(4)}
    return tree.map(lambda leaf: leaf / 2, params), normal(5, 5, 4), normal(6, 5, 2)


def model(params, x):
    hidden = torch.tanh(x @ params["w"].T + params["b"])
    return (hidden @ params["layers"][0]["k"].T + params["layers"][1]["k"]) * params["scale"].exp()


def loss(params, x, target):
    return (model(params, x) - target).square().mean()


def nonlinear(outputs):
    """Convex in the outputs, with a Hessian that depends on them."""
    return torch.logsumexp(outputs, dim=-1).sum()


def ravel(vector):
    return torch.cat([leaf.flatten() for leaf in tree.leaves(vector)])


def unravel(vector, like):
    parts = iter(vector.split([leaf.numel() for leaf in tree.leaves(like)]))
    return tree.map(lambda leaf: next(parts).reshape(leaf.shape), like)


def jacobian(fn, params):
    """d fn / d params [outputs, n] by central differences."""
    flat, h = ravel(params), 1e-6
    steps = h * torch.eye(len(flat), dtype=flat.dtype)
    value = lambda vector: ravel(fn(unravel(vector, params)))  # noqa: E731
    return torch.stack([(value(flat + step) - value(flat - step)) / (2 * h) for step in steps], dim=1)


def hessian(fn, params):
    """By reverse mode twice, explicitly: [n, n]."""
    return torch.autograd.functional.hessian(lambda flat: fn(unravel(flat, params)), ravel(params))


def places(params, patterns):
    """Where the chosen parameters are among all, in the order of the chosen tree."""
    numbers = unravel(torch.arange(ravel(params).numel()), params)
    return ravel(tree.select(numbers, patterns))


def columns(product, at):
    """The matrix of a product, column by column."""
    eye = torch.eye(ravel(at).numel(), dtype=TYPE)
    return torch.stack([ravel(product(unravel(column, at))) for column in eye], dim=1)


CHOSEN = ["layers.*", "b"]


def test_hvp_is_the_hessians_product():
    params, *data = network()
    expected = hessian(lambda p: loss(p, *data), params)
    found = columns(lambda v: curvature.hvp(loss, params, v, *data), params)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    numeric = jacobian(torch.func.grad(lambda p: loss(p, *data)), params)
    torch.testing.assert_close(found, numeric, rtol=1e-7, atol=1e-8)
    block = columns(lambda v: curvature.hvp(loss, params, v, *data, patterns=CHOSEN), tree.select(params, CHOSEN))
    at = places(params, CHOSEN)
    torch.testing.assert_close(block, expected[at][:, at], rtol=1e-12, atol=1e-14)


def test_products_are_trees_like_the_parameters_whatever_the_order_of_v():
    params, *data = network()
    v = tree.map(torch.ones_like, params)
    out = curvature.hvp(loss, params, dict(reversed(v.items())), *data)
    assert list(out) == list(params) and isinstance(out["layers"], list)
    assert all(tree.leaves(tree.map(torch.equal, out, curvature.hvp(loss, params, v, *data))))
    part = curvature.hvp(loss, params, {"b": v["b"]}, *data, patterns=["b"])
    assert {name: leaf.shape for name, leaf in part.items()} == {"b": (3,)}
    low = tree.map(torch.Tensor.bfloat16, params)
    product = curvature.hvp(loss, low, v, *(x.bfloat16() for x in data))
    assert {leaf.dtype for leaf in tree.leaves(product)} == {torch.bfloat16}


def test_gvp_is_jacobian_hessian_jacobian():
    params, x, _ = network()
    jac = jacobian(lambda p: model(p, x), params)
    outputs = model(params, x)
    outer = torch.autograd.functional.hessian(nonlinear, outputs).reshape(10, 10)
    expected = jac.T @ outer @ jac
    found = columns(lambda v: curvature.gvp(model, nonlinear, params, v, x), params)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    at, part = places(params, CHOSEN), tree.select(params, CHOSEN)
    block = columns(lambda v: curvature.gvp(model, nonlinear, params, v, x, patterns=CHOSEN), part)
    torch.testing.assert_close(block, expected[at][:, at], rtol=1e-7, atol=1e-8)
    assert torch.linalg.eigvalsh(found)[0] > -1e-12
    # A model of two outputs in a tree, and one that is linear: then it is the Hessian.
    linear = lambda p, x: {"a": x @ p["w"].T, "c": p["b"]}  # noqa: E731
    outer = lambda out: nonlinear(out["a"] + out["c"])  # noqa: E731
    v = unravel(normal(7, 24), params)
    whole = curvature.hvp(lambda p, x: outer(linear(p, x)), params, v, x)
    torch.testing.assert_close(curvature.gvp(linear, outer, params, v, x), whole, rtol=1e-12, atol=1e-14)


def test_trace_and_diagonal_of_a_diagonal_matrix_need_one_probe():
    weights = {"a": normal(0, 3, 2), "c": normal(1, 4)}
    params = tree.map(torch.ones_like, weights)
    quadratic = lambda p: sum((w * x**2).sum() / 2 for w, x in zip(tree.leaves(weights), tree.leaves(p), strict=True))  # noqa: E731
    found = curvature.trace(quadratic, params, seed=0, probes=2)
    torch.testing.assert_close(found.value, ravel(weights).sum(), rtol=1e-12, atol=1e-12)
    assert found.standard_error < 1e-12
    torch.testing.assert_close(curvature.diagonal(quadratic, params, seed=0, probes=1), weights, rtol=1e-12, atol=0)


def test_trace_has_the_variance_of_hutchinsons_estimate():
    params, *data = network()
    matrix, probes = hessian(lambda p: loss(p, *data), params), 250
    # Hutchinson 1990: the variance of z^T A z over signs is twice the sum of squares off the diagonal.
    deviation = (2 * (matrix - matrix.diag().diag()).square().sum()).sqrt()
    found = curvature.trace(loss, params, *data, seed=1, probes=probes)
    assert found.standard_error == pytest.approx((deviation / math.sqrt(probes)).item(), rel=0.2)
    assert abs(found.value - matrix.trace()) < 3 * found.standard_error
    diagonal = ravel(curvature.diagonal(loss, params, *data, seed=1, probes=probes))
    torch.testing.assert_close(diagonal.sum(), found.value, rtol=1e-10, atol=1e-12)
    errors = ((matrix.square().sum(1) - matrix.diag().square()) / probes).sqrt()
    scaled = (diagonal - matrix.diag()) / errors
    assert scaled.abs().max() < 4 and scaled.square().mean().sqrt() == pytest.approx(1, abs=0.4)
    again, other = (curvature.trace(loss, params, *data, seed=seed, probes=2).value for seed in (1, 2))
    assert torch.equal(again, curvature.trace(loss, params, *data, seed=1, probes=2).value) and again != other


def test_a_parameters_signs_are_its_own_in_any_sub_tree():
    params, *data = network()
    seen = []

    def product(loss, params, v, *args, patterns=None):
        seen.append(v)
        return v

    curvature.diagonal(loss, params, *data, seed=3, probes=1, product=product)
    curvature.diagonal(loss, params, *data, seed=3, probes=1, patterns=CHOSEN, product=product)
    whole, part = tree.flatten(seen[0]), seen[1]
    assert all(torch.equal(part[name], whole[name]) for name in part)
    assert set(ravel(whole).tolist()) == {-1.0, 1.0}


def test_estimates_are_of_the_matrix_of_product():
    params, x, _ = network()
    gauss_newton = functools.partial(curvature.gvp, model)
    at, part = places(params, CHOSEN), tree.select(params, CHOSEN)
    matrix = columns(lambda v: curvature.gvp(model, nonlinear, params, v, x), params)[at][:, at]
    chosen = dict(patterns=CHOSEN, product=gauss_newton)
    found = curvature.trace(nonlinear, params, x, seed=0, probes=200, **chosen)
    assert abs(found.value - matrix.trace()) < 3 * found.standard_error < matrix.trace()
    diagonal = curvature.diagonal(nonlinear, params, x, seed=0, probes=200, **chosen)
    assert list(diagonal) == list(part)
    assert (ravel(diagonal) - matrix.diag()).norm() < 0.2 * matrix.diag().norm()
    values = curvature.eigenpairs(nonlinear, params, x, seed=0, count=3, steps=11, **chosen).values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-10, atol=0)


@pytest.mark.parametrize("patterns", [None, CHOSEN])
def test_eigenpairs_are_those_of_the_explicit_matrix(patterns):
    params, *data = network()
    matrix = hessian(lambda p: loss(p, *data), params)
    if patterns:
        at = places(params, patterns)
        matrix = matrix[at][:, at]
    count = 4
    found = curvature.eigenpairs(loss, params, *data, seed=0, count=count, steps=24, patterns=patterns)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(found.values, expected[:count], rtol=1e-10, atol=1e-12)
    for i in range(count):
        v = tree.map(lambda leaf, i=i: leaf[i], found.vectors)
        assert ravel(v).norm() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(matrix @ ravel(v), found.values[i] * ravel(v), rtol=0, atol=1e-8)
    smallest = curvature.eigenpairs(lambda *args: -loss(*args), params, *data, seed=0, steps=24, patterns=patterns)
    torch.testing.assert_close(-smallest.values[0], expected[-1], rtol=1e-10, atol=1e-12)


def test_residuals_are_the_residuals():
    params, *data = network()
    matrix = hessian(lambda p: loss(p, *data), params)
    found = curvature.eigenpairs(loss, params, *data, seed=0, count=2, steps=5)
    vectors = torch.stack([ravel(tree.map(lambda leaf, i=i: leaf[i], found.vectors)) for i in range(2)])
    residuals = (vectors @ matrix - found.values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-8, atol=1e-12)
    nearest = (torch.linalg.eigvalsh(matrix)[:, None] - found.values).abs().min(0).values
    assert (nearest <= residuals).all() and residuals.max() > 1e-6


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_lanczos_goes_on_where_the_span_is_invariant(values, seed):
    # Eigenvalues of any multiplicity: each Krylov space ends early, and the next begins in what is left.
    n = len(values)
    turn, _ = torch.linalg.qr(normal(seed, n, n))
    matrix = turn @ torch.tensor(values, dtype=TYPE).diag() @ turn.T
    quadratic = lambda p: p["x"] @ matrix @ p["x"] / 2  # noqa: E731
    params = {"x": torch.zeros(n, dtype=TYPE)}
    found = curvature.eigenpairs(quadratic, params, seed=seed, count=n, steps=n)
    expected = torch.tensor(sorted(values, reverse=True), dtype=TYPE)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10)
    vectors = found.vectors["x"]
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(n, dtype=TYPE), rtol=0, atol=1e-10)
    # What the first span does not reach has no weight in the quadrature.
    nodes, weights = curvature.spectrum(quadratic, params, seed=seed, probes=1, steps=n)
    start = ravel(curvature._start(params, seed, 0, 0))
    moments = [(weights * nodes**k).sum() * start.square().sum() for k in range(4)]
    exact = [start @ torch.linalg.matrix_power(matrix, k) @ start for k in range(4)]
    torch.testing.assert_close(torch.stack(moments), torch.stack(exact), rtol=1e-9, atol=1e-9)


def test_spectrum_estimates_traces_of_polynomials_and_densities():
    params, *data = network()
    matrix, n, probes = hessian(lambda p: loss(p, *data), params), 24, 200

    def product(loss, params, v, patterns):
        return unravel(matrix @ ravel(v), params)

    run = functools.partial(curvature.spectrum, None, params, seed=0, probes=probes, product=product)
    found = run(steps=4)
    assert found.nodes.shape == found.weights.shape == (probes, 4)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(probes, dtype=TYPE))
    for power in range(1, 8):
        each = n * (found.weights * found.nodes**power).sum(1)
        exact = torch.linalg.matrix_power(matrix, power).trace()
        assert abs(each.mean() - exact) < 3.5 * each.std() / probes**0.5, power
    width, grid = 0.1, torch.linspace(-4, 12, 2001, dtype=TYPE)
    drawn = curvature.density(run(steps=n), grid, width)
    assert torch.trapezoid(drawn, grid) == pytest.approx(1, abs=1e-6)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    exact = torch.exp(-((grid[:, None] - eigenvalues) ** 2) / (2 * width**2)).mean(1) / (width * math.tau**0.5)
    assert torch.trapezoid((drawn - exact).abs(), grid) < 0.1


def test_fisher_diagonal_is_the_mean_of_squares():
    params, x, target = network()
    each = [torch.func.grad(loss)(params, x[i : i + 1], target[i : i + 1]) for i in range(5)]
    expected = torch.stack([ravel(grad).square() for grad in each]).mean(0)
    batch = {"x": x, "target": target}

    def one(params, sample):
        return loss(params, sample["x"][None], sample["target"][None])

    for chunk in (1, 2, 4, 5, 8, None):
        found = curvature.fisher_diagonal(one, params, batch, chunk=chunk)
        torch.testing.assert_close(ravel(found), expected, rtol=1e-12, atol=1e-15)
    part = curvature.fisher_diagonal(one, params, batch, chunk=4, patterns=CHOSEN)
    torch.testing.assert_close(ravel(part), expected[places(params, CHOSEN)], rtol=1e-12, atol=1e-15)
    low = tree.map(torch.Tensor.bfloat16, params)
    rough = curvature.fisher_diagonal(one, low, tree.map(torch.Tensor.bfloat16, batch), chunk=4)
    assert {leaf.dtype for leaf in tree.leaves(rough)} == {torch.float32}


# On FLUX itself.

CFG = flux.FluxConfig(
    hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 4, 4), vec_in_dim=8, context_in_dim=16
)
MLPS = ["*_blocks.*.img_mlp.2.*", "single_blocks.*.linear1.bias"]


@pytest.fixture(scope="module")
def tiny():
    params = flux.init(CFG, scheme="nonzero", dtype=TYPE)
    batch = dict(
        latents=normal(0, 3, 16, 4, 4),
        noise=normal(1, 3, 16, 4, 4),
        timesteps=torch.tensor([0.2, 0.5, 0.9], dtype=TYPE),
        txt=normal(2, 3, 2, 16),
        y=normal(3, 3, 8),
    )
    return params, batch


@pytest.mark.parametrize("patterns", [None, MLPS])
def test_hvp_of_flux_is_the_difference_of_gradients(tiny, patterns):
    params, batch = tiny
    at = tree.flatten(params) if patterns is None else tree.select(params, patterns)
    flat = {name: normal(i, *leaf.shape) for i, (name, leaf) in enumerate(at.items())}
    v = tree.unflatten(flat) if patterns is None else flat
    found = curvature.hvp(path.loss, params, v, CFG, batch, patterns=patterns)
    if patterns is None:
        assert tree.map(lambda leaf: leaf.shape, found) == tree.map(lambda leaf: leaf.shape, params)
    h, whole = 1e-5, tree.flatten(params)

    def gradient(sign):
        moved = tree.unflatten(whole | {name: leaf + sign * h * flat[name] for name, leaf in at.items()})
        return tree.flatten(torch.func.grad(path.loss)(moved, CFG, batch))

    plus, minus, found = gradient(1), gradient(-1), tree.flatten(found)
    norm = ravel(found).norm()
    for name in at:
        assert (found[name] - (plus[name] - minus[name]) / (2 * h)).norm() < 1e-7 * norm, name


def test_every_estimate_works_on_flux(tiny):
    params, batch = tiny
    args, bias = (path.loss, params, CFG, batch), ["double_blocks.0.img_attn.proj.bias"]
    product = lambda v: curvature.hvp(path.loss, params, v, CFG, batch, patterns=bias)  # noqa: E731
    matrix = columns(product, tree.select(params, bias))
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    top = curvature.eigenpairs(*args, seed=0, steps=24, patterns=bias)
    torch.testing.assert_close(top.values[0], torch.linalg.eigvalsh(matrix)[-1], rtol=1e-9, atol=0)
    found = curvature.trace(*args, seed=0, probes=10, patterns=bias)
    assert abs(found.value - matrix.trace()) < 3 * found.standard_error
    diagonal = curvature.diagonal(*args, seed=0, probes=1, patterns=MLPS)
    assert list(diagonal) == list(tree.select(params, MLPS))
    sampled = curvature.fisher_diagonal(per_sample.one(path.loss, CFG), params, batch, chunk=2, patterns=MLPS)
    one = lambda i: torch.func.grad(path.loss)(params, CFG, {k: v[i : i + 1] for k, v in batch.items()})  # noqa: E731
    expected = torch.stack([ravel(tree.select(one(i), MLPS)).square() for i in range(3)]).mean(0)
    torch.testing.assert_close(ravel(sampled), expected, rtol=1e-10, atol=1e-16)


def test_misuse_gives_a_sentence(tiny):
    params, *data = network()
    v = tree.map(torch.ones_like, params)
    with pytest.raises(ValueError, match=r"pattern 'layer.\*' fits no path .* layers.0.k"):
        curvature.hvp(loss, params, v, *data, patterns=["layer.*"])
    with pytest.raises(ValueError, match="patterns is empty"):
        curvature.trace(loss, params, *data, seed=0, patterns=[])
    with pytest.raises(ValueError, match=r"v does not fit the parameters: 1 tensor: b is \[2\] and should be \[3\]"):
        curvature.hvp(loss, params, {**v, "b": torch.ones(2, dtype=TYPE)}, *data)
    with pytest.raises(ValueError, match="v does not fit the parameters: .* missing b"):
        curvature.gvp(model, nonlinear, params, {}, data[0], patterns=["b"])
    with pytest.raises(ValueError, match="v does not fit .*: the leaves are the same, but layers is {'0.k'"):
        curvature.hvp(loss, params, {**v, "layers": tree.flatten(v["layers"])}, *data)

    def losses(params, x, target):
        return (model(params, x) - target).square().mean(1)

    says = r"losses returned a tensor \[5\], it should be a scalar tensor"
    for run in (
        lambda: curvature.hvp(losses, params, v, *data),
        lambda: curvature.hvp(functools.partial(losses, target=data[1]), params, v, data[0]),
        lambda: curvature.trace(losses, params, *data, seed=0, patterns=["b"]),
        lambda: curvature.eigenpairs(losses, params, *data, seed=0),
    ):
        with pytest.raises(ValueError, match=says):
            run()
    with pytest.raises(ValueError, match=r"<lambda> returned a tensor \[3\] for one sample, it should be a scalar"):
        curvature.fisher_diagonal(lambda params, x: params["b"] * x.sum(), params, data[0], chunk=4)
    with pytest.raises(ValueError, match="<lambda> returned a dict"):
        curvature.gvp(model, lambda out: {"loss": out.sum()}, params, v, data[0])
    with pytest.raises(ValueError, match="probes is 1: should be a whole number from 2 on"):
        curvature.trace(loss, params, *data, seed=0, probes=1)
    with pytest.raises(ValueError, match="probes is 0: should be a whole number from 1 on"):
        curvature.diagonal(loss, params, *data, seed=0, probes=0)
    with pytest.raises(ValueError, match="count is 25: should be at most 24"):
        curvature.eigenpairs(loss, params, *data, seed=0, count=25, steps=100)
    for wrong in ({"count": 0}, {"steps": 0}, {"count": 1.5}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is .*: should be a whole number from 1 on"):
            curvature.eigenpairs(loss, params, *data, seed=0, **wrong)
    for wrong in ({"probes": 0}, {"steps": 0}, {"probes": v}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} is (0|a dict): should be a whole number from 1 on"):
            curvature.spectrum(loss, params, *data, seed=0, **wrong)


def test_nothing_to_differentiate_in_is_refused():
    nothing = lambda params: torch.ones(())  # noqa: E731
    for run in (
        lambda: curvature.hvp(nothing, {}, {}),
        lambda: curvature.eigenpairs(nothing, {}, seed=0),
        lambda: curvature.hvp(nothing, {}, {}, patterns=["*"]),
    ):
        with pytest.raises(ValueError, match="params has no leaves"):
            run()


@pytest.mark.parametrize("estimate", [curvature.eigenpairs, curvature.spectrum])
def test_a_matrix_that_is_not_finite_has_no_spectrum(estimate):
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="product 0 with the matrix has the norm .*: the loss's derivatives"):
            estimate(lambda w, factor: factor * w.square().sum(), torch.ones(3), weight, seed=0)
