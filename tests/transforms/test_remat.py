"""Rematerialized functions are the functions, under every nesting of transforms, and keep what they are told to."""

import dataclasses
import functools
import types
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux, layers
from flux_func.models.layers import Ops
from flux_func.parallel import fold
from flux_func.transforms import precision, remat
from tests.helpers import tiny_batch

TINY = flux.flavor("flux-tiny")
BOTH = remat.keep("attention", "linear")


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def sine(x):
    return x.sin()


def kept_sine(x):
    return (x.sin(),)


SINE = remat.named(sine, "sine", kept_sine, lambda grad, kept, x: (grad * x.cos(),))


def scalar(x):
    return (SINE(x * x) * x.flip(0).exp()).sum().exp()


# Functions of [3] to a number, and what makes another such function of one.
DIRECTION, SAMPLES = draw(3, seed=1), draw(2, 3, seed=2)
TRANSFORMS = {
    "grad": lambda fn: lambda x: (grad(fn)(x) * DIRECTION).sum(),
    "jvp": lambda fn: lambda x: jvp(fn, (x,), (DIRECTION,))[1],
    "vmap": lambda fn: lambda x: vmap(lambda s: fn(x * s))(SAMPLES).sum(),
}


@given(st.lists(st.sampled_from(["grad", "jvp", "vmap", "remat"]), max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_nesting_of_transforms_gives_the_same_number(names, policy):
    plain, found = scalar, remat.remat(scalar, remat.keep("sine") if policy else None)
    for name in names:
        plain = plain if name == "remat" else TRANSFORMS[name](plain)
        found = remat.remat(found) if name == "remat" else TRANSFORMS[name](found)
    torch.testing.assert_close(found(draw(3)), plain(draw(3)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", [None, remat.keep("sine")])
def test_autograd_has_both_derivatives(policy):
    def fn(x, y):
        return {"sum": SINE(x) * y, "same": x, "view": y.reshape(-1)}

    def flat(x, y):
        return tuple(remat.remat(fn, policy)(x, y).values())

    inputs = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(flat, inputs)
    assert torch.autograd.gradgradcheck(flat, inputs)


def test_trees_go_in_and_out_and_what_is_no_tensor_is_a_constant():
    def fn(params, index, name, *, scale):
        assert name == "cubes"
        return {"cubes": scale * params["w"][0][index] ** 3, "next": index + 1, "name": name, "none": None}

    params, index = {"w": [draw(4)]}, torch.tensor([0, 2])
    out = remat.remat(fn)(params, index, "cubes", scale=2.0)
    assert out["next"].tolist() == [1, 3] and out["name"] == "cubes" and out["none"] is None
    found = grad(lambda p: remat.remat(fn)(p, index, "cubes", scale=2.0)["cubes"].sum())(params)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[index] = 6 * params["w"][0][index] ** 2
    torch.testing.assert_close(found["w"][0], expected)


@dataclasses.dataclass
class Scaled:
    weight: torch.Tensor

    def __call__(self, x):
        return (self.weight * x).sum()

    def method(self, x):
        return (self.weight * x).sum()


def through(held):
    return lambda x: (held.w[0] * x).sum()


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight):
        self.weight = weight

    def method(self, x):
        return (self.weight * x).sum()


class Shared:
    """A tensor of its class, which a method reads by itself."""

    def __init__(self, weight):
        type(self).weight = weight

    def method(self, x):
        return (self.weight * x).sum()


GLOBAL = None


def named_global(x):
    return (GLOBAL["w"][0] * x).sum()


HOLDERS = {
    "a closure": lambda w: lambda x: (w * x).sum(),
    "a nested closure": lambda w: lambda x, ops=Ops(linear=lambda p, x, path: w * x): ops.linear(None, x, "").sum(),
    "a partial": lambda w: functools.partial(lambda w, x: (w * x).sum(), w),
    "a default": lambda w: lambda x, w={"w": [w]}: (w["w"][0] * x).sum(),  # noqa: B006
    "an object": Scaled,
    "a method": lambda w: Scaled(w).method,
    "an object's attribute": lambda w: through(types.SimpleNamespace(w=[w])),
    "a slot": lambda w: Slotted(w).method,
    "an attribute of the class": lambda w: type("Fresh", (Shared,), {})(w).method,
    "a class": lambda w: through(type("Fresh", (), {"w": [w]})),
    "what a builtin is bound to": lambda w: w.dot,
    "a deque": lambda w: lambda x, w=deque([w]): (w[0] * x).sum(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tensor_that_is_no_argument_is_refused_where_it_would_have_no_gradient(holder):
    x, w = draw(3), draw(3, seed=1)
    with pytest.raises(ValueError, match=r"holds a tensor \[3\] .* should be an argument"):
        grad(lambda w: remat.remat(HOLDERS[holder](w))(x))(w)
    with pytest.raises(ValueError, match="should be an argument"):
        vmap(lambda w: remat.remat(HOLDERS[holder](w))(x))(draw(2, 3))
    with pytest.raises(ValueError, match="should be an argument"):
        remat.remat(HOLDERS[holder](w.requires_grad_()))(x)
    with torch.no_grad():
        remat.remat(HOLDERS[holder](w))(x)
    torch.testing.assert_close(remat.remat(HOLDERS[holder](w.detach()))(x), (w * x).sum().detach())


def test_a_global_and_a_constant_argument_are_looked_into(monkeypatch):
    w = draw(3).requires_grad_()
    monkeypatch.setitem(globals(), "GLOBAL", {"w": [w]})
    for fn in (named_global, lambda x: sum((GLOBAL["w"][0] * part).sum() for part in x)):
        with pytest.raises(ValueError, match="holds .*variable GLOBAL"):
            remat.remat(fn)(draw(3))
    monkeypatch.setitem(globals(), "GLOBAL", types.SimpleNamespace(w=w))
    with pytest.raises(ValueError, match="holds .*attribute w"):
        remat.remat(lambda x: (GLOBAL.w * x).sum())(draw(3))
    monkeypatch.setitem(globals(), "GLOBAL", {"w": [w]})
    with pytest.raises(ValueError, match="a constant|variable w"):
        remat.remat(lambda fn, x: fn(x))(lambda x: w * x, draw(3))


def counted(calls):
    def count(name, fn):
        def run(*args):
            calls.append(name)
            return fn(*args)

        return run

    return remat.named(
        count("op", sine), "sine", count("forward", kept_sine), count("backward", lambda g, kept, x: (g * x.cos(),))
    )


def test_what_is_kept_is_not_computed_again():
    calls = []
    op = counted(calls)

    def fn(x):
        return op(x.exp()).sum() + op(x).prod()

    grad(remat.remat(fn))(draw(3))
    assert calls == ["op"] * 4
    calls.clear()
    found = grad(remat.remat(fn, remat.keep("sine")))(draw(3))
    assert calls == ["forward"] * 2 + ["backward"] * 2
    torch.testing.assert_close(found, grad(fn)(draw(3)))
    calls.clear()
    # A policy of something else, and an operation within a transform of its own, which has to differentiate it.
    grad(lambda x: remat.remat(lambda x: op(x).sum() + grad(fn)(x).sum(), remat.keep("sine"))(x))(draw(3))
    assert calls[:3] == ["forward", "op", "op"]


def test_a_policy_that_cannot_be_honoured_is_refused():
    fn = remat.remat(scalar, remat.keep("sine", "attention"))
    with pytest.raises(ValueError, match="policy keeps 'attention': scalar should run .* it runs 'sine'"):
        fn(draw(3))
    for policy in ("attention", ["attention"], remat.keep()):
        with pytest.raises(ValueError, match="should be None or what remat.keep returns"):
            remat.remat(scalar, policy)
        with pytest.raises(ValueError, match="should be None or what remat.keep returns"):
            remat.stages(policy)


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_a_kept_linear_has_the_gradients_of_those_that_are_asked_for(length, size, bias, wanted):
    values = [draw(5, size), draw(5, seed=1), draw(2, length, size, seed=2)]
    if not any(wanted):
        return

    def fn(op, moving):
        moving = iter(moving)
        w, b, x = (next(moving) if yes else value for yes, value in zip(wanted, values, strict=True))
        return op({"weight": w, "bias": b} if bias else {"weight": w}, x, "some.path")

    moving = [value for yes, value in zip(wanted, values, strict=True) if yes]

    def kept(moving):
        held = [None if yes else value for yes, value in zip(wanted, values, strict=True)]

        def inner(moving, held):
            moving = iter(moving)
            w, b, x = (next(moving) if value is None else value for value in held)
            return remat.linear({"weight": w, "bias": b} if bias else {"weight": w}, x, "some.path")

        return remat.remat(inner, remat.keep("linear"))(moving, held)

    found = grad(lambda moving: kept(moving).pow(3).sum())(moving)
    expected = grad(lambda moving: fn(layers.linear, moving).pow(3).sum())(moving)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_kept_attention_has_the_gradients_of_attention(batch, heads, length):
    q, k, v = (draw(batch, heads, length, 4, seed=i) for i in range(3))
    weights = draw(batch, length, heads * 4, seed=3)

    def value(op, *qkv):
        return (op(*qkv) * weights).sum()

    kept = remat.remat(functools.partial(value, remat.attention), remat.keep("attention"))
    found, expected = (
        grad(fn, argnums=(0, 1, 2))(q, k, v) for fn in (kept, functools.partial(value, layers.attention))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_stages_without_parameters_are_left_alone():
    wrap, fn = remat.stages(), lambda params, carry, const: carry
    left = [stage.name for stage in path.chain(TINY) if wrap(fn, stage) is fn]
    assert left == ["join", "loss"]


OPS = {
    "nothing": remat.ops(),
    "attention": remat.ops("attention"),
    "products": remat.ops("attention", "linear"),
}


def test_ops_of_another_name_are_refused():
    with pytest.raises(ValueError, match="'atention' should be one of 'attention', 'linear'"):
        remat.ops("atention")


@pytest.mark.parametrize("kept", OPS)
def test_the_training_fold_goes_through_it(kept):
    params, batch = flux.init(TINY, scheme="nonzero"), tiny_batch.batch(size=2)
    expected, loss = fold.grad_and_value(params, TINY, batch)
    grads, value = fold.grad_and_value(params, TINY, batch, OPS[kept])
    torch.testing.assert_close(value, loss)
    for (name, a), b in zip(tree.flatten(grads).items(), tree.leaves(expected), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm(), name


def test_it_goes_around_another_wrapper_of_stages():
    half = precision.compute_in(torch.bfloat16)
    params, batch = flux.init(TINY, scheme="nonzero"), tiny_batch.batch(size=2)
    ops = Ops(wrap_stage=lambda fn, stage: remat.stages()(half(fn, stage), stage))
    found = grad(path.loss)(params, TINY, batch, ops)
    expected = grad(path.loss)(params, TINY, batch, Ops(wrap_stage=half))
    for (name, a), b in zip(tree.flatten(found).items(), tree.leaves(expected), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 2e-2 * b.norm(), name


def peak_bytes(run):
    """The most bytes that were allocated at once while `run` ran, by torch's own record of its allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return int(np.max(np.cumsum(sizes)))


def test_memory_is_that_of_inputs_and_of_what_is_kept():
    # Many tokens, so that activations outweigh the weights.
    cfg = dataclasses.replace(TINY, depth=0, depth_single_blocks=8, context_in_dim=64)
    params = flux.init(cfg, scheme="nonzero")
    batch = tiny_batch.batch(size=4, height=32, width=32)
    batch["txt"] = batch["txt"][..., :64]

    def peak(ops):
        return peak_bytes(lambda: grad(path.loss)(params, cfg, batch, ops))

    plain, nothing, attention, products = map(peak, (Ops(), *OPS.values()))
    assert nothing <= 0.3 * plain
    # What is kept is let go of stage by stage, while the gradients' own graph grows.
    assert nothing <= attention < products <= 0.4 * plain
