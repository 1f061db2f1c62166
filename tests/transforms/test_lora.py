"""LoRA: the adapted model is the merged one, its derivatives too, and no merged weight is ever held."""

import dataclasses
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import flux_func as ff
from flux_func import tree
from flux_func.models.layers import Ops
from flux_func.models.layers import linear as plain
from flux_func.parallel import fold
from flux_func.transforms import lora, precision

# No two of its widths that a linear joins are those of another tensor.
CFG = ff.FluxConfig(
    hidden_size=24,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4),
    vec_in_dim=20,
    context_in_dim=28,
)
BLOCKS = ("*_blocks.*",)
EVERY = ("*",)
F64 = torch.float64


def base(dtype=F64):
    return ff.init(CFG, dtype=dtype, scheme="nonzero")


def trained(params, patterns=EVERY, rank=3, alpha=4.5, seed=0):
    """A LoRA whose B is not zero."""
    rng = np.random.default_rng(seed)

    def draw(factor):
        return torch.from_numpy(0.2 * rng.standard_normal(factor.shape)).to(factor.dtype)

    return tree.map(draw, lora.init(params, patterns, rank, alpha, seed))


def batch(size=2, dtype=F64):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    return dict(
        latents=normal(size, 16, 4, 4),
        noise=normal(size, 16, 4, 4),
        timesteps=torch.from_numpy(rng.random(size)).to(dtype),
        txt=normal(size, 3, CFG.context_in_dim),
        y=normal(size, CFG.vec_in_dim),
    )


def assert_same(ours, theirs, bound=1e-12):
    ours, theirs = tree.flatten(ours), tree.flatten(theirs)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= bound * expected.norm(), name


adapted_loss = lora.apply(ff.loss)


@pytest.mark.parametrize("patterns", [EVERY, BLOCKS, ("single_blocks.1.linear1",)])
def test_adapted_model_is_the_merged_one(patterns):
    params, data = base(), batch()
    adapter = trained(params, patterns)
    merged = by_hand(params, [(adapter, 1.0)])
    assert_same(lora.merge(params, adapter), merged)
    ours, plain_loss = adapted_loss(params, adapter, CFG, data), ff.loss(params, CFG, data)
    torch.testing.assert_close(ours, ff.loss(merged, CFG, data), rtol=1e-12, atol=0)
    assert abs(ours - plain_loss) > 1e-6 * plain_loss


def by_hand(params, loras):
    """The merged weights, by numpy."""
    flat = tree.flatten(params)
    for adapter, weight in loras:
        factors = tree.flatten(adapter)
        for path in {name.rpartition(".")[0] for name in factors}:
            a, b = factors[f"{path}.A"].numpy(), factors[f"{path}.B"].numpy()
            flat[f"{path}.weight"] = flat[f"{path}.weight"] + torch.from_numpy(weight * 4.5 / 3 * (b @ a))
    return tree.unflatten(flat)


def test_apply_and_sample_with_several_weighted():
    params, data = base(), batch()
    loras = [(trained(params, BLOCKS, seed=1), 0.7), (trained(params, ("*img*",), seed=2), -0.4)]
    merged = by_hand(params, loras)
    inputs = dict(
        img=torch.from_numpy(np.random.default_rng(3).standard_normal((2, 4, 64))),
        img_ids=ff.models.flux.image_ids(4, 4),
        txt=data["txt"],
        txt_ids=ff.models.flux.text_ids(3),
        timesteps=data["timesteps"],
        y=data["y"],
    )
    ours = lora.apply(ff.apply)(params, loras, CFG, **inputs)
    torch.testing.assert_close(ours, ff.apply(merged, CFG, **inputs), rtol=1e-10, atol=1e-11)
    drawn = dict(noise=data["noise"], txt=data["txt"], y=data["y"], steps=2)
    torch.testing.assert_close(
        lora.apply(ff.sample)(params, loras, CFG, **drawn), ff.sample(merged, CFG, **drawn), rtol=1e-10, atol=1e-11
    )


def test_gradient_by_the_chain_rule():
    params, data = base(), batch()
    adapter = trained(params)
    grads = torch.func.grad(adapted_loss, argnums=1)(params, adapter, CFG, data)
    of_weights = tree.flatten(torch.func.grad(ff.loss)(by_hand(params, [(adapter, 1.0)]), CFG, data))
    expected = {}
    for path, update in lora.updates(adapter).items():
        of_weight = of_weights[f"{path}.weight"]
        expected[f"{path}.A"] = 1.5 * update.B.T @ of_weight
        expected[f"{path}.B"] = 1.5 * of_weight @ update.A.T
    flat = tree.flatten(grads)
    assert flat.keys() == expected.keys()
    assert_same(flat, {name: expected[name] for name in flat}, 1e-10)


@pytest.mark.parametrize("transform", ["jvp", "jvp(grad)", "grad(grad)"])
def test_derivatives_against_finite_differences(transform):
    params, data = base(), batch(1)
    adapter, along = trained(params), trained(params, seed=5)
    step = 1e-4

    def attention(q, k, v):
        return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)

    def loss(adapter):
        return adapted_loss(params, adapter, CFG, data, ops=Ops(attention=attention))

    def at(fn, shift):
        return fn(tree.map(lambda leaf, direction: leaf + shift * direction, adapter, along))

    def slope(fn):  # of fourth order
        pairs = [(8, 1), (-1, 2)]
        return sum(c * (at(fn, n * step) - at(fn, -n * step)) for c, n in pairs) / (12 * step)

    def along_gradient(adapter):
        grads = torch.func.grad(loss)(adapter)
        return sum((g * d).sum() for g, d in zip(tree.leaves(grads), tree.leaves(along), strict=True))

    if transform == "jvp":
        _, ours = torch.func.jvp(loss, (adapter,), (along,))
        expected = slope(loss)
    elif transform == "jvp(grad)":
        _, ours = torch.func.jvp(along_gradient, (adapter,), (along,))
        expected = slope(along_gradient)
    else:
        # jvp(grad) and grad(grad . v) are each other's transpose, so v^T H v of either is the same.
        hv = torch.func.grad(along_gradient)(adapter)
        ours = sum((h * d).sum() for h, d in zip(tree.leaves(hv), tree.leaves(along), strict=True))
        expected = slope(along_gradient)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def test_ensemble_by_vmap():
    params, data = base(), batch()
    adapters = [trained(params, BLOCKS, seed=seed) for seed in range(3)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *adapters)
    fn = torch.func.grad_and_value(adapted_loss, argnums=1)
    grads, losses = torch.func.vmap(fn, in_dims=(None, 0, None, None))(params, stacked, CFG, data)
    for i, adapter in enumerate(adapters):
        expected, value = fn(params, adapter, CFG, data)
        torch.testing.assert_close(losses[i], value, rtol=1e-12, atol=0)
        assert_same(tree.map(lambda leaf, i=i: leaf[i], grads), expected, 1e-9)


def test_per_sample_gradients_by_vmap():
    params, data = base(), batch(3)
    adapter = trained(params, BLOCKS)

    def of_one(sample):
        one = {name: value[None] for name, value in sample.items()}
        return torch.func.grad(adapted_loss, argnums=1)(params, adapter, CFG, one)

    each = torch.func.vmap(of_one)(data)
    whole = torch.func.grad(adapted_loss, argnums=1)(params, adapter, CFG, data)
    assert_same(tree.map(lambda leaf: leaf.mean(0), each), whole, 1e-9)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("vjp", [fold.autograd_vjp, torch.func.vjp])
def test_training_fold(remat, vjp):
    params, data = base(), batch()
    adapter = trained(params)
    expected, value = torch.func.grad_and_value(adapted_loss, argnums=1)(params, adapter, CFG, data)
    ops = lora.over(lambda stage: stage.select(params))
    grads, loss = ff.grad_and_value(adapter, CFG, data, ops, remat, vjp=vjp)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
    assert_same(grads, expected, 1e-10)


def test_fold_computes_in_another_type():
    params, data = base(torch.float32), batch(dtype=torch.float32)
    adapter = trained(params)
    ops = lora.over(lambda stage: stage.select(params), Ops(wrap_stage=precision.compute_in(torch.bfloat16)))
    grads, loss = ff.grad_and_value(adapter, CFG, data, ops)
    exact, value = torch.func.grad_and_value(adapted_loss, argnums=1)(params, adapter, CFG, data)
    assert {leaf.dtype for leaf in tree.leaves(grads)} == {torch.float32}
    assert 0 < abs(loss - value) < 0.02 * value
    assert_same(grads, exact, 0.2)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen |= {tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(leaf)}
        return out


def test_nothing_of_a_weights_shape_is_made():
    params, data = base(), batch()
    adapter = trained(params)
    of_weights = {tuple(weight.shape) for weight in lora.linears(params).values()}
    of_weights |= {shape[::-1] for shape in of_weights}
    for leaf in tree.leaves(adapter):
        leaf.requires_grad_()
    with Shapes() as found:
        adapted_loss(params, adapter, CFG, data).backward()
    assert len(found.seen) > 20
    assert not of_weights & found.seen
    assert all(leaf.grad is None for leaf in tree.leaves(params))


def test_fresh_lora_changes_nothing():
    params, data = base(torch.float32), batch(dtype=torch.float32)
    adapter = lora.init(params, EVERY, rank=4, alpha=8)
    assert torch.equal(adapted_loss(params, adapter, CFG, data), ff.loss(params, CFG, data))


def test_init():
    params = ff.init(ff.flavor("flux-tiny"))
    adapter = lora.init(params, BLOCKS, rank=4, alpha=8, seed=3)
    assert lora.updates(adapter).keys() == {path for path in lora.linears(params) if "_blocks." in path}
    assert adapter.keys() == params.keys()
    assert [len(adapter[name]) for name in tree.LISTS] == [len(params[name]) for name in tree.LISTS]
    for path, update in lora.updates(adapter).items():
        out, fan_in = tree.flatten(params)[f"{path}.weight"].shape
        assert update.A.shape == (4, fan_in) and update.B.shape == (out, 4) and update.scale == 2
        assert not update.B.any()
        # Uniform within 1 / sqrt(in): the standard deviation is that over sqrt(3).
        assert update.A.abs().max() <= 1 / math.sqrt(fan_in)
        assert abs(update.A.std() * math.sqrt(3 * fan_in) - 1) < 0.15 and abs(update.A.mean()) < 0.1
    again = lora.init(ff.abstract(ff.flavor("flux-tiny")), BLOCKS, rank=4, alpha=8, seed=3)
    assert all(map(torch.equal, tree.leaves(adapter), tree.leaves(again)))
    other = lora.init(params, BLOCKS, rank=4, alpha=8, seed=4)
    assert not torch.equal(tree.leaves(adapter)[0], tree.leaves(other)[0])


def test_types():
    bfloat16, double = base(torch.bfloat16), base()
    assert {leaf.dtype for leaf in tree.leaves(lora.init(bfloat16, EVERY, 2, 2))} == {torch.float32}
    assert {leaf.dtype for leaf in tree.leaves(lora.init(double, EVERY, 2, 2))} == {F64}
    meta = lora.init(bfloat16, EVERY, 2, 2, dtype=torch.bfloat16, device="meta")
    assert {(leaf.dtype, leaf.device.type) for leaf in tree.leaves(meta)} == {(torch.bfloat16, "meta")}
    # Wide factors on a narrow base: computed as they are, added in the base's type.
    loss = adapted_loss(bfloat16, trained(bfloat16), CFG, batch(dtype=torch.float32))
    exact = adapted_loss(double, trained(double), CFG, batch())
    assert abs(loss - exact) < 0.03 * exact


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-15), (torch.float32, 5e-7), (torch.bfloat16, 2e-2)])
def test_unmerge_is_the_inverse(dtype, bound):
    params = base(dtype)
    loras = [(trained(params, seed=1), 0.5), (trained(params, BLOCKS, seed=2), 2.0)]
    merged = lora.merge(params, loras)
    assert {leaf.dtype for leaf in tree.leaves(merged)} == {dtype}
    back, before = tree.flatten(lora.unmerge(merged, loras)), tree.flatten(params)
    for path, leaf in before.items():
        if path.endswith("weight"):
            scale = tree.flatten(merged)[path].abs().max()
            assert (back[path] - leaf).abs().max() <= bound * scale
        else:
            assert back[path] is leaf  # what is not adapted is shared


def test_weights_of_loras_are_differentiated():
    params, data = base(), batch()
    adapters = [trained(params, BLOCKS, seed=seed) for seed in (1, 2)]

    def loss(weights):
        return adapted_loss(params, list(zip(adapters, weights, strict=True)), CFG, data)

    weights = torch.tensor([0.3, 0.6], dtype=F64)
    ours = torch.func.grad(loss)(weights)
    for i, direction in enumerate(torch.eye(2, dtype=F64)):
        slope = (loss(weights + 1e-5 * direction) - loss(weights - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close(ours[i], slope, rtol=1e-6, atol=1e-9)
    as_numbers = adapted_loss(params, [(adapters[0], 0.3), (adapters[1], 0.6)], CFG, data)
    torch.testing.assert_close(loss(weights), as_numbers, rtol=1e-12, atol=0)


def test_inner_linear_sees_the_base_alone():
    params, seen = base(), {}

    def inner(params, x, path):
        seen[path] = set(params)
        return plain(params, x, path)

    adapted_loss(params, trained(params), CFG, batch(), ops=Ops(linear=inner))
    assert {"double_blocks.img_attn.qkv", "single_blocks.linear1", "img_in", "final_layer.linear"} <= seen.keys()
    assert all(names == {"weight", "bias"} for names in seen.values())


def test_stages_share_their_code():
    # The path has no index, and the factors come with the parameters: one traced stage serves every block.
    params = base()
    adapter = trained(params)
    stages = [stage for stage in ff.chain(CFG) if "single_blocks" in stage.keys]
    parts = [lora.combine(stage.select(params), stage.select(adapter)) for stage in stages]
    specs = [torch.utils._pytree.tree_structure(part) for part in parts]
    assert specs[0] == specs[1] and len(specs) == 2


def test_any_function_of_params():
    params = {"layer": {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}}
    update = lora.LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]]), 3.0)
    adapter = lora.place({"layer": update}, params)

    def fn(params, x, ops=Ops()):
        return ops.linear(params["layer"], x, "layer")

    # W + 3 B A = [[1, 2], [6, 4]].
    assert lora.apply(fn)(params, adapter, torch.tensor([1.0, 10.0])).tolist() == [21.0, 46.0]


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 9),
    alpha=st.floats(-20, 20),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    bias=st.booleans(),
    weight=st.floats(-2, 2),
)
def test_linear_is_the_formula(rank, alpha, sizes, bias, weight):
    rng = np.random.default_rng(0)
    out, fan_in = sizes
    w, x = rng.standard_normal((out, fan_in)), rng.standard_normal((5, fan_in))
    a, b, c = rng.standard_normal((rank, fan_in)), rng.standard_normal((out, rank)), rng.standard_normal(out)
    params = {"weight": torch.from_numpy(w), **({"bias": torch.from_numpy(c)} if bias else {})}
    update = lora.LowRank(torch.from_numpy(a), torch.from_numpy(b), alpha)
    expected = x @ w.T + (c if bias else 0) + weight * alpha / rank * (x @ a.T) @ b.T
    for factor in (weight, torch.tensor(weight, dtype=F64)):
        ours = lora.linear()(lora.combine(params, [(update, factor)]), torch.from_numpy(x), "")
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(sorted(lora.linears(ff.abstract(CFG))))), st.integers(1, 4))
def test_place_is_the_inverse_of_updates(paths, rank):
    params = ff.abstract(CFG)
    found = {
        path: lora.LowRank(torch.empty(rank, weight.shape[1]), torch.empty(weight.shape[0], rank), 1.0)
        for path, weight in lora.linears(params).items()
        if path in paths
    }
    assert lora.updates(lora.place(found, params)) == found


def test_peft_computes_the_same():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)).double()
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "1"], init_lora_weights=False), module
    )
    layers = {name: model[int(name)] for name in ("0", "1")}
    params = {name: {"weight": layer.weight, "bias": layer.bias} for name, layer in layers.items()}
    params = tree.map(torch.Tensor.detach, params)
    adapter = {
        name: lora.LowRank(layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), 7.0)
        for name, layer in layers.items()
    }
    x = torch.randn(2, 6, dtype=F64)

    def fn(params, x, ops=Ops()):
        return ops.linear(params["1"], ops.linear(params["0"], x, "0"), "1").square().sum()

    grads, value = torch.func.grad_and_value(lora.apply(fn), argnums=1)(params, adapter, x)
    theirs = model(x).square().sum()
    theirs.backward()
    torch.testing.assert_close(value, theirs.detach(), rtol=1e-12, atol=0)
    for name, layer in layers.items():
        torch.testing.assert_close(grads[name].A, layer.lora_A["default"].weight.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grads[name].B, layer.lora_B["default"].weight.grad, rtol=1e-10, atol=1e-12)


def test_a_bias_beside_the_factors():
    """As of PEFT's lora_bias: the linear's own formula, merged and not, weighted by a number and by a tensor."""
    rng = np.random.default_rng(2)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape))

    weight, own, A, B, bias, x = (draw(*shape) for shape in ((5, 4), (5,), (2, 4), (5, 2), (5,), (3, 4)))
    params = {"layer": {"weight": weight, "bias": own}}
    adapter = lora.place({"layer": lora.LowRank(A, B, 3.0, bias)}, params)
    assert list(tree.flatten(adapter)) == ["layer.A", "layer.B", "layer.bias"]
    expected = x @ weight.T + own + 0.4 * 1.5 * (x @ A.T @ B.T + bias)

    def run(params, ops=Ops()):
        return ops.linear(params["layer"], x, "layer")

    for scale in (0.4, torch.tensor(0.4, dtype=F64)):
        torch.testing.assert_close(lora.apply(run)(params, [(adapter, scale)]), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(run(lora.merge(params, [(adapter, scale)])), expected, rtol=1e-12, atol=1e-12)
    back = lora.unmerge(lora.merge(params, adapter), adapter)
    torch.testing.assert_close(back["layer"]["bias"], own, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"has a bias \[5\] for layer, and the base has none"):
        lora.merge({"layer": {"weight": weight}}, adapter)


def test_a_pattern_that_fits_nothing():
    with pytest.raises(
        ValueError, match=r"'double_blocks\.\*\.attn\.qkv' fits no path.*double_blocks\.0\.\w+_attn\.qkv"
    ):
        lora.init(base(), ["double_blocks.*.attn.qkv"], 2, 2)
    with pytest.raises(
        ValueError,
        match=r"'\*\.qkv\.weight' .* are double_blocks\.0\.img_attn\.qkv, .*\(linears are named without \.weight\)",
    ):
        lora.init(base(), ["*.qkv.weight"], 2, 2)
    with pytest.raises(ValueError, match="patterns is empty"):
        lora.init(base(), [], 2, 2)
    # A norm is no linear.
    with pytest.raises(ValueError, match="fits no path"):
        lora.init(base(), ["*.query_norm"], 2, 2)


@pytest.mark.parametrize(
    ("rank", "alpha", "says"), [(0, 1, "rank is 0"), (1.5, 1, "rank is 1.5"), (2, math.nan, "alpha is nan")]
)
def test_numbers_that_cannot_be(rank, alpha, says):
    with pytest.raises(ValueError, match=says):
        lora.init(base(), EVERY, rank, alpha)


def test_an_alpha_of_zero_is_the_rank_as_in_the_configuration():
    params = ff.abstract(CFG)
    for device in ("cpu", "meta"):
        for alpha in ({}, {"alpha": 0}, {"alpha": 3}):
            adapter = lora.init(params, BLOCKS, 3, device=device, **alpha)
            assert {update.scale for update in lora.updates(adapter).values()} == {1.0}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_factors_are_of_a_floating_type(dtype):
    with pytest.raises(ValueError, match=f"dtype is {dtype}: should be a floating type"):
        lora.init(base(), EVERY, 2, 2, dtype=dtype)


def test_forms_in_which_loras_are_given():
    params = base()
    one, other = trained(params, BLOCKS, seed=1), trained(params, ("*img*",), seed=2)
    half = by_hand(params, [(one, 0.5)])
    for form in ((one, 0.5), [one, 0.5], [(one, 0.5)], (one, torch.tensor(0.5, dtype=F64)), ([one, 0.5],)):
        assert_same(lora.merge(params, form), half)
    for form in ([one], (one,), one, [(one, 1)]):
        assert_same(lora.merge(params, form), by_hand(params, [(one, 1.0)]))
    for form in ([one, other], (one, other), [one, (other, 1.0)]):
        assert_same(lora.merge(params, form), by_hand(params, [(one, 1.0), (other, 1.0)]))
    assert_same(lora.unmerge(half, (one, 0.5)), params, 1e-10)
    assert lora.merge(params, []).keys() == params.keys()


def test_what_is_no_lora_is_refused():
    params = base()
    adapter = trained(params, BLOCKS)
    for use in (lora.merge, lora.unmerge, lora.combine):
        for one, other in ((adapter, params), (params, params)):
            with pytest.raises(ValueError, match="a Tensor at '.*', where a LowRank should be: is it the base"):
                use(one, other)
        with pytest.raises(ValueError, match="the LoRA is of paths, such as '.*': lora.place makes a tree"):
            use(params, lora.updates(adapter))
        with pytest.raises(ValueError, match=r"weight of a LoRA is a tensor \[2\]: should be a number or a scalar"):
            use(params, (adapter, torch.ones(2)))


def test_gradients_of_base_and_lora_in_one_tree_are_refused():
    params, data = base(), batch()
    adapter = trained(params, BLOCKS)
    for fn in (ff.grad_and_value, torch.func.grad(ff.loss)):
        with pytest.raises(ValueError, match=r"gradients of the base and the LoRA in one tree: .*ops=lora.over"):
            lora.apply(fn)(params, adapter, CFG, data)
    with pytest.raises(ValueError, match="grad_and_value returned gradients"):
        lora.apply(functools.partial(ff.grad_and_value, remat="full"))(params, adapter, CFG, data)


def test_an_adapted_function_has_its_own_signature_and_the_name_of_the_function():
    assert list(inspect.signature(adapted_loss).parameters) == ["base", "loras", "args", "ops", "kwargs"]
    assert adapted_loss.__name__ == "loss"
    with pytest.raises(ValueError, match="loss of a LoRA takes its ops by name: ops=..."):
        adapted_loss(base(), trained(base()), CFG, batch(), Ops())


def test_a_lora_of_another_base():
    params, other = base(), ff.init(ff.flavor("flux-tiny"))
    for use in (lora.combine, lora.merge):
        with pytest.raises(
            ValueError,
            match=r"A \[3, 128\] and B \[384, 3\] for double_blocks\.0\.img_attn\.qkv, whose "
            r"weight is \[72, 24\] in the base",
        ):
            use(params, trained(other, ("*.0.img_attn.qkv",)))
    deeper = ff.init(dataclasses.replace(CFG, depth=2), dtype=F64)
    with pytest.raises(ValueError, match=r"double_blocks\.1\.\S+, a linear \[\d+, \d+\] that the base has not"):
        adapted_loss(params, trained(deeper), CFG, batch())
    with pytest.raises(ValueError, match=r"img_in\.nothing, a linear \[5, 6\] that the base has not"):
        lora.place({"img_in.nothing": lora.LowRank(torch.ones(2, 6), torch.ones(5, 2), 1.0)}, params)
