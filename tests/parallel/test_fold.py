"""The training fold gives the numbers of torch.func and of plain autograd, and keeps no more than autograd does."""

import dataclasses

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.parallel import fold
from flux_func.transforms import precision
from flux_func.transforms.remat import keep

TINY = flux.flavor("flux-tiny")


def draw_batch(batch=3, height=4, width=6, dtype=torch.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    return dict(
        latents=normal(batch, 16, height, width),
        noise=normal(batch, 16, height, width),
        timesteps=torch.from_numpy(rng.random(batch)).to(dtype),
        txt=normal(batch, 3, 4096),
        y=normal(batch, 768),
    )


def assert_same(ours, theirs, bound):
    ours, theirs = tree.flatten(ours), tree.flatten(theirs)
    assert list(ours) == list(theirs)
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= bound * grad.norm(), name


def by_autograd(params, batch):
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    loss = path.loss(leaves, TINY, batch)
    grads = iter(torch.autograd.grad(loss, tree.leaves(leaves)))
    return tree.map(lambda leaf: next(grads), leaves), loss.detach()


@pytest.mark.parametrize("remat", [*fold.REMAT, keep("*_attn.qkv", "*.linear1"), keep("attention", "*")])
@pytest.mark.parametrize("vjp", [fold.autograd_vjp, torch.func.vjp])
def test_fold_is_grad_and_value(remat, vjp):
    params, batch = flux.init(TINY, scheme="nonzero"), draw_batch()
    expected, loss = by_autograd(params, batch)
    for grads, value in (
        fold.grad_and_value(params, TINY, batch, remat=remat, vjp=vjp),
        torch.func.grad_and_value(path.loss)(params, TINY, batch),
    ):
        assert_same(grads, expected, 2e-6)
        torch.testing.assert_close(value, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("double", "single"), [(3, 5), (0, 2), (2, 0), (1, 1)])
def test_every_block_has_its_own_gradient(double, single):
    # More than two of a kind: the fold meets them from the last to the first.
    cfg = dataclasses.replace(TINY, depth=double, depth_single_blocks=single)
    params, batch = flux.init(cfg, scheme="nonzero"), draw_batch()
    expected, _ = torch.func.grad_and_value(path.loss)(params, cfg, batch)
    grads, _ = fold.grad_and_value(params, cfg, batch)
    assert_same(grads, expected, 2e-6)
    twice, _ = fold.grad_and_value(params, cfg, batch, into=grads)
    assert_same(twice, tree.map(lambda leaf: 2 * leaf, expected), 2e-6)


def test_no_two_gradients_share_memory():
    # Of one sample a bias's gradient is its linear's output's; what is added up in place may not be.
    params = flux.init(TINY, scheme="nonzero")
    grads, _ = fold.grad_and_value(params, TINY, draw_batch(1))
    places = [leaf.untyped_storage().data_ptr() for leaf in tree.leaves(grads)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("remat", ["full", "selective"])
def test_remat_gives_the_same_bits(remat):
    params, batch = flux.init(TINY, scheme="nonzero"), draw_batch()
    plain, loss = fold.grad_and_value(params, TINY, batch)
    again, same = fold.grad_and_value(params, TINY, batch, remat=remat)
    assert torch.equal(loss, same)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(plain), tree.leaves(again), strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_average_to_the_batchs():
    params, batch = flux.init(TINY, scheme="nonzero"), draw_batch()

    def one(params, sample):
        return path.loss(params, TINY, {name: value[None] for name, value in sample.items()})

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(params, batch)
    expected, _ = by_autograd(params, batch)
    assert_same(tree.map(lambda leaf: leaf.mean(0), each), expected, 2e-6)


@pytest.mark.parametrize("remat", fold.REMAT)
def test_accumulated_micro_batches_are_the_whole_batch(remat):
    params, batch, grads, total = flux.init(TINY, scheme="nonzero"), draw_batch(batch=4), None, 0
    for start in (0, 2):
        micro = {name: value[start : start + 2] for name, value in batch.items()}
        grads, loss = fold.grad_and_value(
            params, TINY, micro, remat=remat, denominator=batch["latents"].numel(), into=grads
        )
        total = total + loss
    expected, loss = by_autograd(params, batch)
    assert_same(grads, expected, 2e-6)
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)


def test_a_step_can_be_differentiated_through():
    params = flux.init(TINY, scheme="nonzero", dtype=torch.float64)
    batch = draw_batch(dtype=torch.float64)
    direction = tree.map(torch.randn_like, params)

    def inner(vjp):
        def norm(scale):
            moved = tree.map(lambda p, d: p + scale * d, params, direction)
            return sum(g.square().sum() for g in tree.leaves(vjp(moved)))

        return norm

    norm = inner(lambda p: fold.grad_and_value(p, TINY, batch, vjp=torch.func.vjp)[0])
    zero, h = torch.zeros((), dtype=torch.float64), 1e-6
    slope = torch.func.jvp(norm, (zero,), (torch.ones_like(zero),))[1]
    numeric = (norm(zero + h) - norm(zero - h)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-8)


def test_a_function_of_nothing_has_gradients_of_zero():
    out, pull = fold.autograd_vjp(lambda params, x: {"out": torch.ones(2)}, {}, torch.ones(3))
    assert torch.equal(out["out"], torch.ones(2)) and torch.equal(pull({"out": torch.ones(2)})[1], torch.zeros(3))


def peak_bytes(run):
    """The most bytes that were allocated at once while `run` ran, by torch's own record of its allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return int(np.max(np.cumsum(sizes)))


def test_fold_takes_no_more_memory_than_autograd_and_remat_less():
    # Many tokens, so that activations outweigh the weights.
    params, batch = flux.init(TINY, scheme="nonzero"), draw_batch(batch=4, height=32, width=32)
    gradients = sum(leaf.nbytes for leaf in tree.leaves(params))
    plain = peak_bytes(lambda: by_autograd(params, batch))
    assert gradients < plain
    assert peak_bytes(lambda: fold.grad_and_value(params, TINY, batch)) <= plain
    assert peak_bytes(lambda: fold.grad_and_value(params, TINY, batch, remat="full")) <= 0.6 * plain


def test_precision_wrapper_computes_in_bfloat16_and_keeps_the_gradients_type():
    params, batch = flux.init(TINY, scheme="nonzero"), draw_batch()
    seen = []

    def linear(layer, x, name):
        seen.append((name.rpartition(".")[2], layer["weight"].dtype, x.dtype))
        return flux.layers.linear(layer, x, name)

    ops = Ops(linear=linear, wrap_stage=precision.compute_in(torch.bfloat16))
    grads, loss = fold.grad_and_value(params, TINY, batch, ops)
    expected, exact = by_autograd(params, batch)
    # The embedders of a sample's conditioning stay at float32.
    wide = {name for name, *types in seen if types == [torch.float32, torch.float32]}
    assert wide == {"in_layer", "out_layer"}
    assert all(types == [torch.bfloat16, torch.bfloat16] for name, *types in seen if name not in wide)
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(grads))
    assert abs(loss - exact) <= 1e-2 * exact
    for name, grad in tree.flatten(expected).items():
        assert (tree.flatten(grads)[name] - grad).norm() <= 4e-2 * grad.norm(), name


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="remat 'half'"):
        fold.grad_and_value({}, TINY, {}, remat="half")
