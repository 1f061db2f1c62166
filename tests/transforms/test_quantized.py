"""Float8 and MXFP8 linears against what their formats say, in float64, and in every way that a fold runs them."""

import dataclasses
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.layers import Ops
from flux_func.parallel import fold
from flux_func.parallel.sharding import ONE_PROCESS
from flux_func.train import adapt
from flux_func.transforms import compiled, lora, quantized

CFG = dataclasses.replace(
    flux.flavor("flux-tiny"),
    depth=1,
    depth_single_blocks=1,
    hidden_size=256,
    num_heads=2,
    axes_dim=(16, 56, 56),
    context_in_dim=32,
    vec_in_dim=16,
)
PATTERNS = ("double_blocks.*_attn.*", "double_blocks.*_mlp.*", "single_blocks.linear?")
PATHS = frozenset(name for name in flux.linears(CFG) if tree.match(PATTERNS, name))
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
# Half the distance of two neighbours, of a number's size: three and two digits behind the point.
HALF = {E4M3: 2**-4, E5M2: 2**-3}


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()


def ops(recipe, wrap_stage=None):
    linear = quantized.linear(recipe, PATHS, emulate=True) if recipe else Ops.linear
    return Ops(linear=linear, wrap_stage=wrap_stage or Ops.wrap_stage)


def draw(cfg=CFG):
    params = flux.init(cfg, scheme="nonzero", dtype=torch.bfloat16)
    draws = torch.Generator().manual_seed(0)
    shapes = {"latents": (2, 16, 8, 8), "noise": (2, 16, 8, 8), "txt": (2, 16, 32), "y": (2, 16)}
    batch = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return params, {**batch, "timesteps": torch.rand(2, generator=draws)}


def distances(found, expected):
    pairs = zip(tree.leaves(found), tree.leaves(expected), strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]


# By hand: a factor [rows, n] of a product is rounded, n being what is summed over.


def rounded(factor, recipe, kind):
    """Returns a factor as the recipe rounds it, float64."""
    largest = float(ml_dtypes.finfo(kind).max)
    if recipe == "mxfp8":
        blocks = factor.reshape(len(factor), -1, 32)
        scale = 2.0 ** -np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True) / largest))
        return ((blocks * scale).astype(kind).astype(np.float64) / scale).reshape(factor.shape)
    if recipe == "float8_rowwise":
        scale = 2.0 ** np.floor(np.log2(largest / np.abs(factor).max(-1, keepdims=True)))
    else:
        scale = np.float32(largest / np.abs(factor).max())
    scaled = factor.astype(np.float32) * scale.astype(np.float32)
    return scaled.astype(kind).astype(np.float64) / scale.astype(np.float64)


def by_hand(recipe, x, weight, grad):
    """Returns (output, gradients of x and weight), and for each the most that rounding can have changed it by."""
    of_grad = E5M2 if recipe == "float8_tensorwise" else E4M3
    factors = [(x, E4M3, weight, E4M3), (grad, of_grad, weight.T, E4M3), (grad.T, of_grad, x.T, E4M3)]
    for a, kind_a, b, kind_b in factors:
        relative = (1 + HALF[kind_a]) * (1 + HALF[kind_b]) - 1
        yield rounded(a, recipe, kind_a) @ rounded(b, recipe, kind_b).T, a @ b.T, relative * (np.abs(a) @ np.abs(b).T)


def taken(recipe, x, weight, grad):
    x, weight, grad = (torch.from_numpy(value).bfloat16() for value in (x, weight, grad))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    run = quantized.linear(recipe, frozenset({"one"}), emulate=True)
    y = run({"weight": weight}, x, "one")
    return [value.detach().double().numpy() for value in (y, *torch.autograd.grad(y, (x, weight), grad))]


sizes = st.integers(1, 3).map(lambda count: 32 * count)


@pytest.mark.parametrize("recipe", quantized.RECIPES)
@settings(max_examples=15, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_products_are_those_of_rounded_factors(recipe, rows, outputs, inputs, seed, exponent):
    rng = np.random.default_rng(seed)

    def draws(*shape):
        # Of a range that the formats have, but for a few numbers; bfloat16 of them is themselves.
        spread = np.exp(0.7 * rng.standard_normal(shape)) * 10**exponent
        return (rng.standard_normal(shape) * spread).astype(ml_dtypes.bfloat16).astype(np.float64)

    x, weight, grad = draws(rows, inputs), draws(outputs, inputs), draws(rows, outputs)
    products = by_hand(recipe, x, weight, grad)
    for found, (expected, exact, most) in zip(taken(recipe, x, weight, grad), products, strict=True):
        # The result is bfloat16, the sum was float32.
        slack = 2**-8 * np.abs(expected) + 1e-5 * most
        assert (np.abs(found - expected) <= slack).all()
        # What is too small for a format loses more than its share: at most 2^-10 of the largest's 448.
        assert (np.abs(found - exact) <= most + slack + 1e-4 * np.abs(exact).max()).all()


@pytest.mark.parametrize("recipe", quantized.RECIPES)
def test_the_bias_is_added_and_other_linears_are_the_inner_ones(recipe):
    rng = np.random.default_rng(0)
    x, weight = (torch.from_numpy(rng.standard_normal((32, 32))).bfloat16() for _ in range(2))
    run = quantized.linear(recipe, frozenset({"one"}), lambda params, x, path: path, emulate=True)
    plain = run({"weight": weight}, x[None], "one")
    torch.testing.assert_close(run({"weight": weight, "bias": x[0]}, x[None], "one"), plain + x[0], rtol=0, atol=0)
    assert plain.shape == (1, 32, 32) and run({"weight": weight}, x, "another") == "another"


@pytest.mark.parametrize(("recipe", "bound"), [("float8_tensorwise", 0.2), ("float8_rowwise", 0.15), ("mxfp8", 0.15)])
def test_gradients_are_near_those_of_bfloat16(recipe, bound):
    params, batch = draw()
    expected, loss = fold.grad_and_value(params, CFG, batch)
    grads, value = fold.grad_and_value(params, CFG, batch, ops=ops(recipe))
    found = distances(grads, expected)
    assert 0.02 < np.median(found) < 0.08 and max(found) < bound
    torch.testing.assert_close(value, loss, rtol=5e-3, atol=0)


@pytest.mark.parametrize("recipe", quantized.RECIPES)
def test_recomputed_it_is_the_same(recipe):
    params, batch = draw()
    expected, loss = fold.grad_and_value(params, CFG, batch, ops=ops(recipe))
    for remat in ("full", "selective"):
        grads, value = fold.grad_and_value(params, CFG, batch, ops=ops(recipe), remat=remat)
        assert torch.equal(value, loss) and max(distances(grads, expected)) == 0


def kept(cfg, params, batch, ops):
    """Returns the bytes that the backward pass keeps, parameters apart, and how many of those it keeps."""
    mine = {leaf.untyped_storage()._cdata for leaf in tree.leaves(params)}
    found, alive = {}, []

    def pack(saved):
        alive.append(saved)  # or its memory would be taken for another's
        found[saved.untyped_storage()._cdata] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        path.loss(tree.map(lambda leaf: leaf.detach().requires_grad_(), params), cfg, batch, ops)
    return sum(size for key, size in found.items() if key not in mine), len(mine & found.keys())


@pytest.mark.parametrize("recipe", quantized.RECIPES)
def test_nothing_is_kept_that_a_plain_linear_does_not_keep(recipe):
    assert kept(CFG, *draw(), ops(recipe)) == kept(CFG, *draw(), ops(""))


@pytest.mark.parametrize("recipe", quantized.RECIPES)
def test_compiled_it_is_the_same_and_no_casts_of_weights_are_kept(recipe):
    cfg, wrap = dataclasses.replace(CFG, depth=0), compiled.stages(backend="aot_eager")
    params, batch = draw(cfg=cfg)
    one = ops(recipe, lambda fn, stage: wrap(fn, stage) if "single_blocks" in stage.keys else fn)
    expected, loss = fold.grad_and_value(params, cfg, batch, ops=ops(recipe))
    grads, value = fold.grad_and_value(params, cfg, batch, ops=one)
    # Another order of the same operations: here and there a number of bfloat16 is its neighbour.
    assert max(distances(grads, expected)) < 1e-3
    torch.testing.assert_close(value, loss, rtol=1e-5, atol=0)
    (plain, of_plain), (found, places) = kept(cfg, params, batch, ops("")), kept(cfg, params, batch, one)
    assert found <= plain and places >= of_plain


def test_a_lora_over_frozen_linears_is_one_over_what_they_compute():
    params, batch = draw()
    adapter = lora.init(params, ["single_blocks.*.linear1", "double_blocks.*.img_attn.proj"], 4, 4, dtype=torch.float32)
    adapter = tree.map(lambda leaf: leaf + 0.01, adapter)

    def gradients(recipe):
        over, vjp = adapt.Base(params, ONE_PROCESS, CFG).training(ops(recipe))
        return fold.grad_and_value(adapter, CFG, batch, over, vjp=vjp)[0]

    grads = gradients("float8_rowwise")
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(grads))
    found = distances(grads, gradients(""))
    assert min(found) > 0.01 and max(found) < 0.15


def test_what_a_recipe_does_not_take_is_named():
    run = quantized.linear("mxfp8", frozenset({"double_blocks.img_attn.qkv"}), emulate=True)
    x = torch.zeros(32, 32, dtype=torch.bfloat16)

    def refused(rows, outputs, inputs, dtype=torch.bfloat16):
        given = torch.zeros(rows, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=torch.bfloat16)
        with pytest.raises(ValueError) as raised:
            run({"weight": given[1]}, given[0], "double_blocks.img_attn.qkv")
        return str(raised.value)

    said = "double_blocks.img_attn.qkv has 48 {}: mxfp8 takes multiples of 32"
    assert refused(48, 32, 32) == said.format("rows of input")
    assert refused(32, 48, 32) == said.format("outputs") and refused(32, 32, 48) == said.format("inputs")
    assert refused(32, 32, 32, torch.float32) == (
        "double_blocks.img_attn.qkv multiplies torch.float32 by torch.bfloat16: mxfp8 takes bfloat16 alone"
    )
    with pytest.raises(ValueError, match="recipe 'float8' should be one of 'float8_tensorwise', "):
        quantized.linear("float8", frozenset())
    assert run({"weight": x}, x, "double_blocks.img_attn.qkv").shape == (32, 32)


def test_a_cpu_emulates_and_no_other_device_does(monkeypatch):
    quantized.check_device("mxfp8", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Mercury")
    for recipe, has, needs in (
        ("float8_tensorwise", (8, 6), "8.9: L40S, H100, B200"),
        ("float8_rowwise", (8, 9), "9.0: H100, B200"),
        ("mxfp8", (9, 0), "10.0: B200"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=has: has)
        with pytest.raises(ValueError) as raised:
            quantized.check_device(recipe, torch.device("cuda"))
        have = ".".join(map(str, has))
        assert str(raised.value) == f"NVIDIA Mercury is of compute capability {have}, {recipe} takes {needs}"

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    with pytest.raises(ValueError, match="float8_rowwise does not run on meta: no kernel image is available"):
        quantized.check_device("float8_rowwise", torch.device("meta"))


def test_without_torchao_it_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    quantized.linear.cache_clear()
    with pytest.raises(ImportError, match="torchao.float8"):
        quantized.linear("float8_rowwise", frozenset())
