"""Updates by gradients that are scaled on the way: what clipping comes to in a training step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.train import optimizer

KINDS = {"adamw": optimizer.adamw(0.1), "SGD": optimizer.from_torch(torch.optim.SGD, 0.1, momentum=0.9)}


def draw(rng, dtype):
    leaves = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in ((5, 3), (7,), ())]
    return {"a": leaves[0], "b": {"c": leaves[1], "d": leaves[2]}}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.floats(1e-3, 10))
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_by_scaled_gradients_is_one_by_gradients_that_were_scaled(kind, dtype, max_norm):
    opt, rng = KINDS[kind], torch.Generator().manual_seed(0)
    one = draw(rng, dtype)
    other = tree.map(torch.clone, one)
    of_one, of_other = opt.init(one), opt.init(other)
    for _ in range(3):
        grads = draw(rng, dtype)
        scale = optimizer.clip_scale(optimizer.global_norm(grads), max_norm)
        one, of_one = opt.update(tree.map(torch.clone, grads), of_one, one, scale)
        other, of_other = opt.update(optimizer.clip(grads, max_norm)[0], of_other, other)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize(("norm", "largest", "factor"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0)])
def test_the_scale_brings_a_norm_down_and_never_up(norm, largest, factor):
    assert float(optimizer.clip_scale(torch.tensor(norm), largest)) == pytest.approx(factor, rel=1e-5)


def test_a_largest_norm_of_zero_means_not_scaled():
    assert optimizer.clip_scale(torch.tensor(3.0), 0.0) is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_is_not_finite_shows_in_the_parameters(kind, bad):
    opt, params = KINDS[kind], {"a": torch.ones(3)}
    grads = {"a": torch.tensor([1.0, bad, 2.0])}
    params, _ = opt.update(grads, opt.init(params), params, optimizer.clip_scale(optimizer.global_norm(grads), 1.0))
    assert params["a"].isnan().any()
