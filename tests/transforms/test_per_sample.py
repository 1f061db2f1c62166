"""Per-sample quantities against a loop over the samples, closed forms, and averages over all draws there are."""

import dataclasses
import functools
import inspect
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad

import flux_func as ff
from flux_func import tree
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.transforms import lora, per_sample, remat, weights

CFG = flux.FluxConfig(
    hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), vec_in_dim=8, context_in_dim=16
)
LOSS = per_sample.one(ff.loss, CFG)
SIZE = 5


def draw(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    batch = dict(latents=draw(rng, SIZE, 16, 4, 4), noise=draw(rng, SIZE, 16, 4, 4))
    batch |= dict(timesteps=torch.from_numpy(rng.random(SIZE)), txt=draw(rng, SIZE, 3, 16), y=draw(rng, SIZE, 8))
    return flux.init(CFG, scheme="nonzero", dtype=torch.float64), batch


def sample(batch, i):
    return {name: value[i : i + 1] for name, value in batch.items()}


@functools.cache
def loop():
    """Each sample's gradient, norm and loss, one by one."""
    params, batch = problem()
    pairs = [torch.func.grad_and_value(ff.loss)(params, CFG, sample(batch, i)) for i in range(SIZE)]
    grads = [g for g, _ in pairs]
    norms = [torch.cat([leaf.flatten() for leaf in tree.leaves(g)]).norm() for g in grads]
    return grads, torch.stack(norms), torch.stack([value for _, value in pairs])


def assert_same(ours, theirs, rtol=1e-10):
    for (name, a), b in zip(tree.flatten(ours).items(), tree.leaves(theirs), strict=True):
        assert (a - b).norm() <= rtol * b.norm() + 1e-14, name


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, None])
def test_losses_gradients_and_norms_are_those_of_a_loop(chunk):
    params, batch = problem()
    grads, norms, losses = loop()
    torch.testing.assert_close(per_sample.losses(LOSS, params, batch, chunk), losses)
    found = per_sample.norms(LOSS, params, batch, chunk)
    torch.testing.assert_close(found, (norms, losses))
    assert_same(per_sample.gradients(LOSS, params, batch, chunk), tree.map(lambda *leaves: torch.stack(leaves), *grads))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("ops", [Ops(), Ops(wrap_stage=remat.stages())])
def test_ghost_norms_are_the_norms(chunk, ops):
    params, batch = problem()
    _, norms, losses = loop()
    torch.testing.assert_close(per_sample.ghost_norms(LOSS, params, batch, chunk, ops), (norms, losses))


@given(
    st.lists(st.integers(1, 6), max_size=2), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 1000)
)
@settings(max_examples=20, deadline=None)
def test_ghost_norms_of_a_linear_whatever_its_rows_and_sizes(rows, fan_in, out, bias, seed):
    rng = np.random.default_rng(seed)
    params = {"layer": {"weight": draw(rng, out, fan_in)}, "scale": draw(rng, out)}
    if bias:
        params["layer"]["bias"] = draw(rng, out)
    batch = {"x": draw(rng, 3, *rows, fan_in)}

    def loss(params, sample, ops=Ops()):
        return (ops.linear(params["layer"], sample["x"], "layer").sin() * params["scale"]).square().sum()

    each = [grad(loss)(params, {"x": x}) for x in batch["x"]]
    expected = torch.stack([torch.cat([leaf.flatten() for leaf in tree.leaves(g)]).norm() for g in each])
    torch.testing.assert_close(per_sample.ghost_norms(loss, params, batch, 2)[0], expected)


def test_a_linear_that_is_not_computed_once_by_ops_is_refused():
    params, batch = {"a": {"weight": torch.eye(3)}}, {"x": torch.ones(2, 3)}

    def twice(params, sample, ops=Ops()):
        return ops.linear(params["a"], ops.linear(params["a"], sample["x"], "a"), "a").sum()

    def never(params, sample, ops=Ops()):
        return sample["x"].sum()

    for loss, count in ((twice, 2), (never, 0)):
        with pytest.raises(ValueError, match=f"a was computed {count} times by ops.linear"):
            per_sample.ghost_norms(loss, params, batch, 1)


OUTSIDE = {
    "product": lambda params, sample: F.linear(sample["x"], params["b"]["weight"]).sum(),
    "penalty": lambda params, sample: 10 * sum(leaf.square().sum() for leaf in tree.leaves(params["b"])),
    "bias": lambda params, sample: params["b"]["bias"].square().sum(),
    "input": lambda params, sample: (sample["x"] * params["b"]["weight"][0]).exp().sum(),
}


def twice_ruled(outside, params, sample, ops=Ops()):
    """A loss in which both linears are computed by ops.linear, once, and one is used outside of it."""
    hidden = ops.linear(params["b"], ops.linear(params["a"], sample["x"], "a").sin() * params["scale"], "b")
    return hidden.square().sum() + outside(params, sample)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("again", [False, True])
def test_a_weight_used_outside_of_ops_linear_is_refused(outside, again):
    rng = np.random.default_rng(0)
    params = {"a": {"weight": draw(rng, 3, 3)}, "b": {"weight": draw(rng, 2, 3), "bias": draw(rng, 2)}}
    params, batch = {**params, "scale": draw(rng, 3)}, {"x": draw(rng, 2, 3)}

    def loss(outside, params, sample, ops=Ops()):
        run = functools.partial(twice_ruled, outside, ops=ops)
        return remat.remat(run)(params, sample) if again else run(params, sample)

    name = "bias" if outside == "bias" else "(weight|bias)"
    with torch.no_grad(), pytest.raises(ValueError, match=rf"the loss depends on b\.{name} outside ops.linear"):
        per_sample.ghost_norms(functools.partial(loss, OUTSIDE[outside]), params, batch, 2)
    # What is no linear's may be used as one likes.
    fine = functools.partial(loss, lambda params, sample: (params["scale"] * sample["x"]).square().sum())
    torch.testing.assert_close(per_sample.ghost_norms(fine, params, batch, 2), per_sample.norms(fine, params, batch, 2))


def test_ghost_norms_in_a_lora_are_the_norms():
    params, batch = problem()
    adapter = lora.init(params, ["double_blocks.*", "img_in"], rank=2)
    adapter = tree.map(lambda leaf: leaf + 0.1, adapter)

    def loss(adapter, sample, ops=Ops()):
        return per_sample.one(lora.apply(ff.loss), adapter, CFG)(params, sample, ops=ops)

    found = per_sample.ghost_norms(loss, adapter, batch, 2)
    grads = [torch.func.grad(loss)(adapter, tree.map(lambda x, i=i: x[i], batch)) for i in range(SIZE)]
    expected = torch.stack([torch.cat([leaf.flatten() for leaf in tree.leaves(g)]).norm() for g in grads])
    torch.testing.assert_close(found[0], expected)


def test_ghost_norms_of_a_tree_with_holes_are_refused_where_norms_are_not():
    params, batch = problem()
    trained, frozen = weights.partition(params, ["img_in.*"])

    def loss(trained, sample, ops=Ops()):
        return LOSS(weights.combine(trained, frozen), sample, ops=ops)

    with pytest.raises(ValueError, match="params has holes, as weights.partition leaves them: norms should be used"):
        per_sample.ghost_norms(loss, trained, batch, 2)
    norms, _ = per_sample.norms(loss, trained, batch, 2)
    expected = [torch.cat([leaf.flatten() for leaf in tree.leaves(g["img_in"])]).norm() for g in loop()[0]]
    torch.testing.assert_close(norms, torch.stack(expected))


def test_ghost_norms_of_tuples_are_the_norms():
    params, batch = {"layers": ({"weight": torch.eye(3)}, {"weight": 2 * torch.eye(3)})}, {"x": torch.ones(2, 3)}

    def loss(params, sample, ops=Ops()):
        assert isinstance(params["layers"], tuple)
        return functools.reduce(lambda x, layer: ops.linear(layer, x, "layer"), params["layers"], sample["x"]).sum()

    # The gradients are 2 and 1 in all nine places.
    norms, _ = per_sample.ghost_norms(loss, params, batch)
    torch.testing.assert_close(norms, torch.full((2,), (9 * 5) ** 0.5))


def test_norms_of_half_precision_are_added_up_in_float32():
    params = {"w": torch.full((300,), 2.0, dtype=torch.bfloat16)}
    norms, _ = per_sample.norms(lambda p, s: (p["w"] * s).sum(), params, torch.ones(2, 300, dtype=torch.bfloat16), 2)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((2,), 300**0.5))


def test_norms_of_large_leaves_keep_their_digits():
    w = torch.randn(4000, 5000, generator=torch.Generator().manual_seed(0))
    found, _ = per_sample.norms(lambda p, s: (p["w"] * w).sum() * s + p["b"] * s, {"w": w, "b": w[0, 0]}, torch.ones(1))
    exact = (torch.dot(w.flatten().double(), w.flatten().double()) + 1).sqrt()
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=0)


def test_misuse_is_named():
    params, batch = problem()

    def vector(params, sample):
        return sample["latents"].mean((1, 2))

    for fn in (per_sample.losses, per_sample.norms, per_sample.gradients, per_sample.ghost_norms):
        name = vector if fn is not per_sample.ghost_norms else lambda params, sample, ops: vector(params, sample)
        with pytest.raises(ValueError, match=r"returned a tensor \[16\] for one sample, it should be a scalar"):
            fn(name, params, batch, 2)
        with pytest.raises(ValueError, match="chunk is 0"):
            fn(LOSS, params, batch, 0)
        with pytest.raises(ValueError, match=r"first dimensions .*'txt': 3"):
            fn(LOSS, params, {**batch, "txt": batch["txt"][:3]}, 2)
        if fn is not per_sample.losses:
            with pytest.raises(ValueError, match="params has no leaves"):
                fn(lambda params, sample, **ops: sample["y"].sum(), {}, batch, 2)
    with pytest.raises(ValueError, match="number returned a float"):
        per_sample.losses(number, params, batch, 1)
    with pytest.raises(ValueError, match="clip_norm is 0"):
        per_sample.clipped_sum(LOSS, params, batch, 0, 2)
    with pytest.raises(ValueError, match="second should have more"):
        per_sample.noise_scale(LOSS, params, {name: value[:1] for name, value in batch.items()}, 1)


def number(params, sample):
    return 1.0


def test_a_loss_of_one_has_its_own_signature_and_the_name_of_the_loss():
    assert list(inspect.signature(LOSS).parameters) == ["params", "sample", "kwargs"]
    assert LOSS.__name__ == "loss" and per_sample.one(functools.partial(ff.loss, ops=Ops()), CFG).__name__ == "loss"


# The gradient noise scale.


@given(st.integers(2, 4), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_noise_scale_is_unbiased(size, seed):
    # Every batch there is of three samples drawn with replacement; the gradient of a sample is w - x.
    rng = np.random.default_rng(seed)
    params, data = {"w": draw(rng, 4)}, draw(rng, 3, 4)
    batches = torch.stack([data[list(which)] for which in itertools.product(range(3), repeat=size)])

    def loss(params, x):
        return (params["w"] - x).square().sum() / 2

    found = [per_sample.noise_scale(loss, params, batch, chunk=2) for batch in batches]
    square, trace = (sum(column) / len(found) for column in list(zip(*found, strict=True))[:2])
    torch.testing.assert_close(square, (params["w"] - data.mean(0)).square().sum())
    torch.testing.assert_close(trace, data.var(0, correction=0).sum())
    torch.testing.assert_close(found[1].scale, found[1].trace / found[1].grad_square)


def test_noise_scale_of_micro_batches_takes_their_norms():
    # |g|^2 is on average |G|^2 + tr / size.
    found = per_sample.noise_scale_from(4, torch.tensor(3.0 + 8 / 4), 32, torch.tensor(3.0 + 8 / 32))
    torch.testing.assert_close(torch.stack(list(found)), torch.tensor([3.0, 8.0, 8 / 3]))


# Statistics over the timestep.


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_statistics_by_timestep_are_those_of_a_histogram(size, bins, seed):
    rng = np.random.default_rng(seed)
    t, value = torch.from_numpy(rng.random(size)), draw(rng, size)
    t[0] = 1.0
    found = per_sample.by_timestep(t, {"loss": value}, bins)
    count, edges = np.histogram(t.numpy(), bins, (0, 1))
    np.testing.assert_allclose(found["edges"].numpy(), edges, atol=1e-12)
    np.testing.assert_allclose(found["centres"].numpy(), edges[:-1] + np.diff(edges) / 2, atol=1e-12)
    assert found["count"].tolist() == count.tolist()
    place = np.minimum(np.digitize(t.numpy(), edges) - 1, bins - 1)
    for i in range(bins):
        inside = value.numpy()[place == i]
        if len(inside):
            assert found["loss"]["mean"][i] == pytest.approx(inside.mean())
            assert found["loss"]["std"][i] == pytest.approx(inside.std(), abs=1e-12)
        else:
            assert found["loss"]["mean"][i].isnan()


def test_statistics_by_timestep_refuse_other_times_and_lengths():
    with pytest.raises(ValueError, match=r"should be \[B\] in \[0, 1\]"):
        per_sample.by_timestep(torch.tensor([0.5, 500.0]), {})
    with pytest.raises(ValueError, match=r"grad_norm is \[3\]: should be \[2\]"):
        per_sample.by_timestep(torch.tensor([0.5, 0.6]), {"grad_norm": torch.ones(3)})
    with pytest.raises(ValueError, match="bins is 0: should be a whole number from 1 on"):
        per_sample.by_timestep(torch.tensor([0.5, 0.6]), {}, bins=0)


# Differential privacy.


@pytest.mark.parametrize("by_ghosts", [False, True])
@pytest.mark.parametrize("chunk", [2, 5, None])
def test_clipped_sum_is_that_of_a_loop(by_ghosts, chunk):
    params, batch = problem()
    grads, norms, _ = loop()
    clip_norm = norms.median().item()
    known = per_sample.ghost_norms(LOSS, params, batch, chunk)[0] if by_ghosts else None
    total, found = per_sample.clipped_sum(LOSS, params, batch, clip_norm, chunk, known)
    torch.testing.assert_close(found, norms)
    scale = [min(1.0, clip_norm / norm.item()) for norm in norms]
    assert_same(total, tree.map(lambda *leaves: sum(s * leaf for s, leaf in zip(scale, leaves, strict=True)), *grads))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_clipped_sum_where_leaves_share_a_gradient(known, chunk):
    params, batch = (
        {name: draw(np.random.default_rng(i), 3) for i, name in enumerate("ab")},
        draw(np.random.default_rng(2), 4, 3),
    )

    def loss(params, sample):
        return ((params["a"] + params["b"]) * sample).sum() + params["a"].sum() * sample[0]

    norms = per_sample.norms(loss, params, batch)[0]
    total, _ = per_sample.clipped_sum(loss, params, batch, 0.5, chunk, norms if known else None)
    each = per_sample.gradients(loss, params, batch)
    scale = 0.5 / norms.clamp(min=0.5)
    for name, leaf in total.items():
        torch.testing.assert_close(leaf, (scale[:, None] * each[name]).sum(0))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, None])
def test_sums_of_bfloat16_are_taken_in_float32(known, chunk):
    params, batch = {"w": torch.zeros((), dtype=torch.bfloat16)}, torch.ones(1024, dtype=torch.bfloat16)

    def loss(params, sample):
        return params["w"] * sample

    total, norms = per_sample.clipped_sum(loss, params, batch, 2.0, chunk, torch.ones(1024) if known else None)
    assert total["w"].item() == 1024 and total["w"].dtype == torch.bfloat16 and norms.dtype == torch.float32
    found = per_sample.noise_scale(loss, params, batch, chunk)
    assert found.trace.item() == 0 and found.grad_square.item() == 1


@pytest.mark.parametrize("size", [(), (1,), (2,), (SIZE + 1,), (SIZE, 1)])
@pytest.mark.parametrize("chunk", [2, SIZE])
def test_norms_that_are_not_one_a_sample_are_refused(size, chunk):
    params, batch = problem()
    with pytest.raises(ValueError) as error:
        per_sample.clipped_sum(LOSS, params, batch, 1.0, chunk, torch.ones(size))
    assert str(error.value) == f"norms is {list(size)}: should be [{SIZE}], one for each sample of the batch"


def private(**changes):
    options = dict(clip_norm=0.5, noise_multiplier=2.0, batch_size=4, seed=1) | changes
    return per_sample.private(ff.optimizer.from_torch(torch.optim.SGD, lr=1.0), **options)


def run(opt, params, state, total, updates):
    for _ in range(updates):
        params, state = opt.update(total, state, params)
    return params, state


def test_without_noise_the_private_step_is_the_step_of_the_clipped_mean():
    opt, total = private(noise_multiplier=0.0), {"w": torch.full((3,), 2.0)}
    params = {"w": torch.zeros(3)}
    params, state = run(opt, params, opt.init(params), total, 2)
    torch.testing.assert_close(params["w"], torch.full((3,), -1.0))
    assert int(state["step"]) == 2 and type(opt) is ff.optimizer.Optimizer
    assert total["w"].tolist() == [2.0] * 3


def test_what_else_an_update_is_given_is_handed_on():
    class Pair(NamedTuple):
        init: Any
        update: Any

    given = []
    plain = Pair(lambda params: {}, lambda grads, state, params: (params, state))
    wide = Pair(plain.init, lambda grads, state, params, *more, **named: (given.append((more, named)), (params, {}))[1])
    for pair, more, named in ((plain, (), {}), (wide, (torch.ones(()),), {"spans": {}})):
        opt = per_sample.private(pair, 1.0, 0.0, 4, 0)
        opt.update({"w": torch.ones(2)}, opt.init({}), {"w": torch.zeros(2)}, *more, **named)
    assert given == [((torch.ones(()),), {"spans": {}})]


def test_noise_has_its_deviation_and_is_counted():
    total, zeros = {"w": torch.zeros(20_000), "b": torch.zeros(())}, lambda: tree.map(torch.clone, total)
    opt = private()
    first, _ = run(opt, zeros(), opt.init(total), total, 1)
    # 2 * 0.5 / 4 to each number.
    assert first["w"].std().item() == pytest.approx(0.25, rel=0.02) and abs(first["w"].mean()) < 0.006
    both, _ = run(opt, zeros(), opt.init(total), total, 2)
    second = both["w"] - first["w"]
    assert abs((first["w"] * second).mean()) < 0.002 and second.std().item() == pytest.approx(0.25, rel=0.02)
    # A run that is taken up again goes on as it would have.
    params, state = run(opt, zeros(), opt.init(total), total, 1)
    again, _ = run(private(), params, tree.map(torch.clone, state), total, 1)
    assert torch.equal(again["w"], both["w"]) and torch.equal(again["b"], both["b"])
    other, _ = run(private(seed=2), zeros(), opt.init(total), total, 1)
    assert not torch.equal(other["w"], first["w"])


def test_private_training_learns():
    rng = np.random.default_rng(0)
    data, params = draw(rng, 64, 3) * 0.1 + 1, {"w": torch.zeros(3, dtype=torch.float64)}
    opt = per_sample.private(ff.optimizer.adamw(lr=0.1, weight_decay=0.0), 0.5, 1.0, batch_size=64, seed=0)
    state = opt.init(params)
    for _ in range(40):
        total, _ = per_sample.clipped_sum(lambda p, x: (p["w"] - x).square().sum(), params, data, 0.5, 16)
        params, state = opt.update(total, state, params)
    assert (params["w"] - 1).abs().max() < 0.1


@pytest.mark.parametrize("field, value", [("clip_norm", 0.0), ("noise_multiplier", -1.0), ("batch_size", 0)])
def test_private_refuses_numbers_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        private(**{field: value})


def peak_bytes(run):
    """The most bytes that were allocated at once while `run` ran, by torch's own record of its allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return int(np.max(np.cumsum(sizes)))


def test_memory_grows_with_the_chunk_and_not_with_the_batch():
    cfg, rng = dataclasses.replace(CFG, depth=1, depth_single_blocks=2), np.random.default_rng(0)
    params, loss = flux.init(cfg, scheme="nonzero"), per_sample.one(ff.loss, cfg)

    def batch(size):
        shapes = dict(latents=(16, 16, 16), noise=(16, 16, 16), txt=(3, 16), y=(8,))
        drawn = {name: draw(rng, size, *shape).float() for name, shape in shapes.items()}
        return {**drawn, "timesteps": torch.full((size,), 0.5)}

    small, big = batch(4), batch(16)
    whole = peak_bytes(lambda: grad(ff.loss)(params, cfg, big))
    for fn in (per_sample.norms, per_sample.ghost_norms):
        peak = peak_bytes(lambda fn=fn: fn(loss, params, big, 4))
        assert peak <= 1.1 * peak_bytes(lambda fn=fn: fn(loss, params, small, 4))
        assert peak <= 0.7 * whole
