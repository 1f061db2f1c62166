"""The model: its tree is BFL's state dict, its numbers are BFL's, and every transform of torch.func works on it."""

import dataclasses

import numpy as np
import pytest
import torch
from fluxbfl.model import Flux, FluxParams
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.models import flux, layers
from flux_func.models.layers import Ops

TINY = flux.flavor("flux-tiny")


def reference(cfg, params=None):
    """BFL's module of the same shape, with these weights."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(cfg).items() if k != "qk_norm_eps"}
    with torch.device("cpu" if params else "meta"):
        module = Flux(FluxParams(**fields))
    if params:
        module.load_state_dict(tree.flatten(params), assign=True)
    return module


def draw_inputs(cfg, batch=2, height=4, width=6, text=5, dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    tokens = height * width // 4
    inputs = dict(
        img=normal(batch, tokens, cfg.in_channels),
        img_ids=flux.image_ids(height, width).expand(batch, -1, -1),
        txt=normal(batch, text, cfg.context_in_dim),
        txt_ids=flux.text_ids(text).expand(batch, -1, -1),
        timesteps=torch.from_numpy(rng.random(batch)).to(dtype),
        y=normal(batch, cfg.vec_in_dim),
    )
    if cfg.guidance_embed:
        inputs["guidance"] = torch.linspace(1, 4, batch, dtype=dtype)
    return inputs


@pytest.mark.parametrize(
    "name, count, tensors",
    [("flux-dev", 11_901_408_320, 780), ("flux-schnell", 11_891_178_560, 776), ("flux-debug", 258_286_144, None)],
)
def test_the_tree_is_bfls_state_dict(name, count, tensors):
    cfg = flux.flavor(name)
    ours = {path: tuple(leaf.shape) for path, leaf in tree.flatten(flux.abstract(cfg)).items()}
    theirs = {path: tuple(leaf.shape) for path, leaf in reference(cfg).state_dict().items()}
    assert ours == theirs
    assert sum(int(np.prod(shape)) for shape in ours.values()) == count
    assert tensors is None or len(ours) == tensors


CHANGES = [{}, {"guidance_embed": True}, {"in_channels": 384}, {"qkv_bias": False}]
CHANGES += [{"depth": 0}, {"depth_single_blocks": 0}, {"depth_single_blocks": 1}]


@pytest.mark.parametrize("change", CHANGES)
def test_forward_and_gradients_are_bfls(change):
    cfg = dataclasses.replace(TINY, **change)
    params, inputs = flux.init(cfg, scheme="nonzero"), draw_inputs(cfg, batch=3)
    module = reference(cfg, params)
    expected = module(**inputs)
    out = flux.apply(params, cfg, **inputs)
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    expected.square().mean().backward()
    grads = torch.func.grad(lambda p: flux.apply(p, cfg, **inputs).square().mean())(params)
    for path, weight in module.named_parameters():
        assert (tree.flatten(grads)[path] - weight.grad).norm() <= 3e-6 * weight.grad.norm(), path


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_any_shape_gives_bfls_numbers(batch, rows, columns, text):
    params = flux.init(TINY, scheme="nonzero")
    inputs = draw_inputs(TINY, batch, 2 * rows, 2 * columns, text)
    expected = reference(TINY, params)(**inputs)
    out = flux.apply(params, TINY, **inputs)
    assert (out - expected).norm() <= 1e-6 * expected.norm()


def test_text_comes_before_image_and_order_matters():
    seen = []

    def attention(q, k, v):
        seen.append(v)
        return flux.layers.attention(q, k, v)

    params, inputs = flux.init(TINY, scheme="nonzero"), draw_inputs(TINY, text=5)
    flux.apply(params, TINY, **inputs, ops=Ops(attention=attention))
    assert len(seen) == TINY.depth + TINY.depth_single_blocks
    changed = {**inputs, "txt": inputs["txt"] + 1}
    first = seen[0]
    flux.apply(params, TINY, **changed, ops=Ops(attention=attention))
    moved = (seen[4] - first).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert moved.tolist() == [True] * 5 + [False] * 6


def test_what_nobody_reads_of_the_text_is_not_computed():
    tokens = {}

    def linear(params, x, path):
        tokens.setdefault(path, []).append(x.shape[1])
        return layers.linear(params, x, path)

    cfg = dataclasses.replace(TINY, depth_single_blocks=3)
    flux.apply(flux.init(cfg), cfg, **draw_inputs(cfg, text=5), ops=Ops(linear=linear))
    assert tokens["single_blocks.linear1"] == [5 + 6] * 3
    assert tokens["single_blocks.linear2"] == [5 + 6, 5 + 6, 6]


def test_guidance_is_each_samples_own_and_not_scaled_twice():
    cfg = dataclasses.replace(TINY, guidance_embed=True)
    params, inputs = flux.init(cfg, scheme="nonzero"), draw_inputs(cfg, batch=3)
    together = flux.apply(params, cfg, **inputs)
    for i in range(3):
        alone = flux.apply(params, cfg, **{name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    other = flux.apply(params, cfg, **{**inputs, "guidance": inputs["guidance"] + 1})
    assert (other - together).abs().max() > 1e-3


def test_misfit_inputs_are_named():
    params, inputs = flux.init(TINY), draw_inputs(TINY)
    cases = {
        "img has shape": {"img": inputs["img"][..., :3]},
        "txt has shape": {"txt": inputs["txt"][:1]},
        "timesteps has shape": {"timesteps": inputs["timesteps"][:1]},
        "y has shape": {"y": inputs["y"][:, :5]},
        "takes no guidance": {"guidance": torch.ones(2)},
        "img_ids has shape": {"img_ids": inputs["img_ids"][:, :2]},
        "txt_ids has shape": {"txt_ids": inputs["img_ids"], "img_ids": inputs["txt_ids"]},
        "img_ids has shape \\(3, ": {"img_ids": inputs["img_ids"][:1].expand(3, -1, -1)},
        "should be \\[B, L, C\\]": {"img": inputs["img"][0]},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            flux.apply(params, TINY, **{**inputs, **change})
    guided = dataclasses.replace(TINY, guidance_embed=True)
    with pytest.raises(ValueError, match="guidance \\[B\\] is needed"):
        flux.apply(flux.init(guided), guided, **inputs)


def test_wrong_shapes_of_a_config_are_named():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        dataclasses.replace(TINY, num_heads=7)
    with pytest.raises(ValueError, match="axes_dim"):
        dataclasses.replace(TINY, axes_dim=(4, 4, 4))
    for change in ({"axes_dim": (-4, 10, 10)}, {"mlp_ratio": -1.0}, {"qk_norm_eps": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} .* should"):
            dataclasses.replace(TINY, **change)
    for name, value in (("num_heads", 0), ("hidden_size", 128.0), ("depth", -1), ("qk_norm_eps", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} {value} should be a"):
            dataclasses.replace(TINY, **{name: value})
    with pytest.raises(ValueError, match="flux-schnell"):
        flux.flavor("flux-schnel")


def test_pretraining_starts_as_torchtitan_does():
    params = tree.flatten(flux.init(TINY, seed=1))
    size = TINY.hidden_size
    for path, leaf in params.items():
        if path.startswith("final_layer") or "_mod." in path or ".modulation." in path or path.endswith("bias"):
            assert leaf.count_nonzero() == 0, path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        elif path.startswith(("time_in", "vector_in")):
            assert leaf.std().item() == pytest.approx(0.02, rel=0.05), path
        else:
            bound = (6 / sum(leaf.shape)) ** 0.5
            assert leaf.abs().max().item() == pytest.approx(bound, rel=0.02), path
            assert leaf.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), path
    weight = params["double_blocks.0.img_attn.qkv.weight"]
    assert weight.shape == (3 * size, size)
    assert not torch.equal(weight, params["double_blocks.1.img_attn.qkv.weight"])


def test_init_is_a_function_of_the_seed_alone():
    first, again, other = (tree.flatten(flux.init(TINY, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(leaf, again[path]) for path, leaf in first.items())
    assert not torch.equal(first["img_in.weight"], other["img_in.weight"])
    half = tree.flatten(flux.init(TINY, seed=1, dtype=torch.bfloat16))
    assert all(torch.equal(leaf.bfloat16(), half[path]) for path, leaf in first.items())


def test_nonzero_scheme_leaves_nothing_out():
    for path, leaf in tree.flatten(flux.init(TINY, scheme="nonzero")).items():
        assert leaf.count_nonzero() == leaf.numel() and leaf.std() > 0.01, path
    with pytest.raises(ValueError, match="scheme"):
        flux.init(TINY, scheme="zero")


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_patches_are_bfls_and_come_back(batch, rows, columns):
    latents = torch.randn(batch, 16, 2 * rows, 2 * columns)
    patches = flux.patchify(latents)
    # BFL: channels outermost within a patch, then its rows, then its columns.
    assert patches.shape == (batch, rows * columns, 64)
    torch.testing.assert_close(patches[0, -1].view(16, 2, 2), latents[0, :, -2:, -2:])
    torch.testing.assert_close(flux.unpatchify(patches, 2 * rows, 2 * columns), latents)
    assert flux.image_ids(2 * rows, 2 * columns)[0, -1].tolist() == [0, rows - 1, columns - 1]


def test_float64_is_kept_and_bfloat16_is_close():
    params = flux.init(TINY, scheme="nonzero", dtype=torch.float64)
    exact = flux.apply(params, TINY, **draw_inputs(TINY, dtype=torch.float64))
    assert exact.dtype == torch.float64
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-2)):
        cast = tree.map(lambda leaf, dtype=dtype: leaf.to(dtype), params)
        out = flux.apply(cast, TINY, **draw_inputs(TINY, dtype=torch.float64))
        assert out.dtype == dtype
        assert (out.double() - exact).norm() <= bound * exact.norm()


def test_ids_may_be_of_each_sample_or_of_all():
    params, inputs = flux.init(TINY, scheme="nonzero"), draw_inputs(TINY)
    expected = flux.apply(params, TINY, **inputs)
    for name in ("img_ids", "txt_ids"):
        one = {**inputs, name: inputs[name][:1]}
        torch.testing.assert_close(flux.apply(params, TINY, **one), expected, rtol=0, atol=0)


def test_a_config_from_a_list_can_be_looked_up():
    assert hash(dataclasses.replace(TINY, axes_dim=list(TINY.axes_dim))) == hash(TINY)


def test_linears_are_what_ops_are_told():
    told, cfg = [], dataclasses.replace(TINY, guidance_embed=True)

    def linear(params, x, path):
        told.append(path)
        return layers.linear(params, x, path)

    given = {**draw_inputs(cfg), "guidance": torch.ones(2)}
    flux.apply(flux.init(cfg), cfg, **given, ops=Ops(linear=linear))
    assert sorted({*told}) == sorted(flux.linears(cfg))


@pytest.mark.parametrize("changes", [{"depth": 1}, {"depth_single_blocks": 3}, {"guidance_embed": True}])
def test_parameters_of_another_model_are_refused(changes):
    other = dataclasses.replace(TINY, **changes)
    name = next(iter(changes))
    said = f"params are of a model whose {name} is {getattr(other, name)}, cfg's is {getattr(TINY, name)}"
    given = draw_inputs(TINY)
    with pytest.raises(ValueError, match=said):
        flux.apply(flux.init(other), TINY, **given)
    with pytest.raises(ValueError, match="params have nothing: they should be a tree"):
        flux.apply({}, TINY, **given)


@pytest.mark.parametrize(
    "changes, leaf",
    [
        ({"num_heads": 4, "axes_dim": (8, 12, 12)}, "double_blocks.0.img_attn.norm.key_norm.scale"),
        ({"mlp_ratio": 2.0}, "double_blocks.0.img_mlp.0.bias"),
        ({"out_channels": 4}, "final_layer.linear.bias"),
        ({"vec_in_dim": 32}, "vector_in.in_layer.weight"),
    ],
    ids=str,
)
def test_parameters_of_other_widths_are_refused(changes, leaf):
    other, given = dataclasses.replace(TINY, **changes), draw_inputs(TINY)
    with pytest.raises(ValueError, match=f"params are of another model than cfg: .*{leaf} is"):
        flux.apply(flux.init(other), TINY, **given)
