"""What AdamW keeps in fewer bits: against torchao's own optimizer, float64, and itself in other parts and processes."""

import sys

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.parallel.mesh import AXES, Mesh
from flux_func.parallel.placements import Placement
from flux_func.train import moments, optimizer

HYPER = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SHAPES = {"a.weight": (6, 512), "a.bias": (6,), "b.weight": (4, 96), "b.scale": (16,), "c.weight": (32, 12)}
POLICIES = [(kind, rounding) for kind in moments.KINDS for rounding in moments.ROUNDINGS]


def draw(seed, dtype=torch.bfloat16):
    rng = torch.Generator().manual_seed(seed)
    return tree.unflatten({path: torch.randn(shape, generator=rng).to(dtype) for path, shape in SHAPES.items()})


def run(opt, params, steps, state=None, first=0, dtype=torch.bfloat16):
    state = opt.init(params) if state is None else state
    for step in range(first, first + steps):
        params, state = opt.update(draw(100 + step, dtype), state, params)
    return params, state


def copy(state):
    return tree.map(torch.clone, state)


def identical(one, other):
    one, other = tree.flatten(one), tree.flatten(other)
    same = (torch.equal(one[path], other[path]) and one[path].dtype == other[path].dtype for path in one)
    return one.keys() == other.keys() and all(same)


def value(kept, signed):
    """What is kept of a moment, float64, by the definition of codes and scales."""
    if isinstance(kept, torch.Tensor):
        return kept.double()
    values = moments._map(torch.device("cpu"), signed).double()[kept["codes"].long()]
    blocks = values.unflatten(-1, (kept["scale"].shape[-1], -1))
    return (blocks * kept["scale"].double()[..., None]).flatten(-2)


@pytest.mark.parametrize("kind", moments.KINDS)
def test_updates_are_adamws_in_float64_but_for_rounding(kind):
    params, state = draw(0, torch.float32), None
    opt = optimizer.adamw(**HYPER, moments=kind)
    for step in range(4):
        grads, before = draw(100 + step, torch.float32), copy(params)
        kept = copy(state) if state else opt.init(params)
        params, state = opt.update(grads, copy(kept), params)
        for path, leaf in tree.flatten(params).items():
            layer, name = path.split(".")
            x, g = before[layer][name].double(), grads[layer][name].double()
            m = 0.9 * value(kept["exp_avg"][layer][name], True) + 0.1 * g
            v = 0.95 * value(kept["exp_avg_sq"][layer][name], False) + 0.05 * g * g
            x = x - 1e-2 * 0.1 * x
            x = x - 1e-2 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            torch.testing.assert_close(leaf.double(), x, rtol=1e-5, atol=1e-6)
            for moment, exact, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
                found = state[moment][layer][name]
                narrow = isinstance(found, dict)
                # Codes are up to 1/14 apart, of the largest of a block; bfloat16 has 8 bits.
                near = {"rtol": 0.036, "atol": 0.015} if narrow else {"rtol": 2**-8, "atol": 1e-7}
                if not narrow and kind != "bfloat16":
                    near = {"rtol": 1e-5, "atol": 1e-7}
                torch.testing.assert_close(value(found, signed), exact, **near)


def test_in_8_bits_it_is_torchaos_adamw8bit():
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    rng = torch.Generator().manual_seed(0)
    param, opt = torch.randn(8, 512, generator=rng), optimizer.adamw(**HYPER, moments="8bit")
    params, theirs = {"w": param.clone()}, param.clone()
    kept = [OptimState8bit.zeros(param.shape, signed, 256) for signed in (True, False)]
    state = opt.init(params)
    for step in range(1, 11):
        grad = torch.randn(8, 512, generator=rng)
        params, state = opt.update({"w": grad}, state, params)
        hyper = (torch.tensor(HYPER["lr"]), *HYPER["betas"], HYPER["weight_decay"], HYPER["eps"], True, False)
        single_param_adam(theirs, grad, torch.tensor(float(step)), *kept, None, *hyper)
    torch.testing.assert_close(params["w"], theirs, rtol=1e-4, atol=1e-5)
    for name, other in zip(("exp_avg", "exp_avg_sq"), kept, strict=True):
        torch.testing.assert_close(state[name]["w"]["scale"].flatten(), other.scale, rtol=1e-5, atol=0)
        apart = (state[name]["w"]["codes"].int() - other.codes.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


def test_what_is_kept_takes_the_bits_that_it_says():
    params = draw(0)
    for kind, types in (("", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        kept = tree.leaves(optimizer.adamw(1e-3, moments=kind).init(params)["exp_avg"])
        assert {leaf.dtype for leaf in kept} == {types}
    state = optimizer.adamw(1e-3, moments="8bit").init(params)
    forms = {path: (leaf.dtype, tuple(leaf.shape)) for path, leaf in tree.flatten(state["exp_avg"]).items()}
    assert forms == {
        "a.weight.codes": (torch.uint8, (6, 512)),
        "a.weight.scale": (torch.float32, (6, 2)),
        "a.bias": (torch.float32, (6,)),
        "b.weight.codes": (torch.uint8, (4, 96)),
        "b.weight.scale": (torch.float32, (4, 3)),
        "b.scale": (torch.float32, (16,)),
        "c.weight": (torch.float32, (32, 12)),
    }
    meta = optimizer.adamw(1e-3, moments="8bit").init(tree.map(lambda leaf: leaf.to("meta"), params))
    assert {path: (leaf.dtype, tuple(leaf.shape)) for path, leaf in tree.flatten(meta["exp_avg"]).items()} == forms


@pytest.mark.parametrize(("kind", "rounding"), POLICIES)
def test_a_resumed_run_is_the_same_bit_for_bit(kind, rounding):
    opt = optimizer.adamw(**HYPER, moments=kind, rounding=rounding, seed=3)
    half, state = run(opt, draw(0), 3)
    saved = {path: leaf.clone() for path, leaf in tree.flatten({"params": half, "opt": state}).items()}
    restored = tree.unflatten(saved)
    out = run(opt, restored["params"], 3, restored["opt"], first=3)
    assert identical(out, run(opt, draw(0), 6))


@pytest.mark.parametrize(("kind", "rounding"), POLICIES)
@pytest.mark.parametrize(("dim", "count"), [(0, 2), (0, 3), (1, 2)])
def test_the_parts_of_a_leaf_are_those_of_the_whole_bit_for_bit(kind, rounding, dim, count):
    opt = optimizer.adamw(**HYPER, moments=kind, rounding=rounding, seed=3)
    shape = (6, 1024)
    rng = torch.Generator().manual_seed(0)
    param, *grads = (torch.randn(shape, generator=rng).bfloat16() for _ in range(4))

    def after(part, span):
        params = {"w": param[part].clone()}
        state = opt.init(params)
        for grad in grads:
            params, state = opt.update({"w": grad[part].clone()}, state, params, torch.tensor(0.5), {"w": span})
        return params["w"]

    parts, place = [], Placement(shape, torch.bfloat16, ("shard",), dim)
    for rank in range(count):
        over = Mesh(dict(zip(AXES, (1, count, 1), strict=True)), rank)
        parts.append(after(place.local(over), place.span(over)))
    whole = after(slice(None), (0, 6 * 1024, 0))
    assert torch.equal(torch.cat(parts, dim), whole)
    assert torch.equal(whole, after(slice(None), None))


@pytest.mark.parametrize("kind", moments.KINDS)
def test_a_leaf_is_updated_in_parts(kind, monkeypatch):
    opt = optimizer.adamw(**HYPER, moments=kind, rounding="stochastic")
    whole = run(opt, draw(0), 2)
    monkeypatch.setattr(moments, "PART_CPU", 256)
    assert identical(run(opt, draw(0), 2), whole)


@pytest.mark.parametrize("kind", ["", "8bit"])
def test_compiled_it_is_the_same(kind):
    torch.compiler.reset()
    settings = dict(**HYPER, moments=kind, rounding="stochastic", seed=1)
    params, state = run(optimizer.adamw(**settings), draw(0), 3)
    found, kept = run(optimizer.adamw(**settings, compiled={"backend": "aot_eager"}), draw(0), 3)
    for one, other in ((params, found), (state["exp_avg"], kept["exp_avg"])):
        for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True):
            # Of rounding there may be a number here and there that is the neighbour.
            assert (a != b).float().mean() < 0.01


def test_stochastic_rounding_moves_where_the_nearest_number_does_not():
    rates = {}
    for rounding in moments.ROUNDINGS:
        opt = optimizer.adamw(2e-5, weight_decay=0.0, rounding=rounding)
        params = {"w": torch.ones(4096, dtype=torch.bfloat16)}
        state = opt.init(params)
        for _ in range(100):
            params, state = opt.update({"w": torch.ones(4096, dtype=torch.bfloat16)}, state, params)
        rates[rounding] = params["w"].double()
    # Of a gradient that is always the same the update is the learning rate; bfloat16's numbers below 1 are 2^-8 apart.
    assert (rates["nearest"] == 1).all()
    moved = 1 - rates["stochastic"]
    error = (100 * 2e-5 * 2**-8 / 4096) ** 0.5
    assert abs(float(moved.mean()) - 100 * 2e-5) < 4 * error


def test_draws_are_of_the_seed_and_of_the_leaf():
    def rounded(seed, path="w"):
        params = tree.unflatten({path: torch.ones(1024, dtype=torch.bfloat16)})
        opt = optimizer.adamw(1e-3, rounding="stochastic", seed=seed)
        params, _ = opt.update(tree.map(torch.ones_like, params), opt.init(params), params)
        return tree.leaves(params)[0]

    assert torch.equal(rounded(0), rounded(0))
    assert not torch.equal(rounded(0), rounded(1)) and not torch.equal(rounded(0), rounded(0, "v"))


def test_scales_and_clipping():
    # Half of a gradient that is twice as large.
    for kind in moments.KINDS:
        opt = optimizer.adamw(**HYPER, moments=kind, rounding="stochastic")
        params, other = draw(0), draw(0)
        params, state = opt.update(draw(1), opt.init(params), params)
        twice = tree.map(lambda leaf: 2 * leaf, draw(1))
        other, kept = opt.update(twice, opt.init(other), other, torch.tensor(0.5))
        assert identical((params, state), (other, kept))


def test_spans_of_any_split_name_each_number_once():
    shape = (4, 6, 10)
    index = np.arange(240).reshape(shape)
    for dim in range(3):
        place = Placement(shape, torch.float32, ("replicate", "context"), dim)
        for rank in range(4):
            over = Mesh(dict(zip(AXES, (2, 1, 1), strict=True)), rank % 2)
            start, run_length, gap = place.span(over)
            at = np.arange(120)
            found = start + at + at // run_length * gap
            assert np.array_equal(found, index[place.local(over)].reshape(-1))


def test_what_there_is_not():
    with pytest.raises(ValueError, match="moments is '4bit': should be one of '', 'float32', 'bfloat16', '8bit'"):
        optimizer.adamw(1e-3, moments="4bit")
    with pytest.raises(ValueError, match="rounding is 'up': should be one of 'nearest', 'stochastic'"):
        optimizer.adamw(1e-3, rounding="up")


def test_8_bits_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    moments._map.cache_clear()
    with pytest.raises(ImportError, match="torchao.optim"):
        optimizer.adamw(1e-3, moments="8bit")
    optimizer.adamw(1e-3, moments="bfloat16")
