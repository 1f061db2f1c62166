"""Weights in and out of every format bit for bit, loaded by the tools whose formats they are."""

import dataclasses
import itertools
import logging
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import flux_func as ff
from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import recognize, stored, weights
from flux_func.models import autoencoder, flux

SMALL = dataclasses.replace(
    flux.flavor("flux-tiny"), depth=1, depth_single_blocks=2, vec_in_dim=8, context_in_dim=8, guidance_embed=True
)
KL = autoencoder.AutoencoderConfig(kind="kl", ch=32, ch_mult=(1, 2), num_res_blocks=1)
NAMES = {"bfl": "x.safetensors", "diffusers": "folder", "torchtitan": "t.safetensors"}
CONFIGS = st.builds(
    lambda heads, axes, **fields: flux.FluxConfig(
        hidden_size=heads * sum(axes), num_heads=heads, axes_dim=axes, vec_in_dim=8, context_in_dim=12, **fields
    ),
    heads=st.integers(1, 3),
    axes=st.sampled_from([(2, 2, 4), (4, 4, 4)]),
    depth=st.integers(1, 2),
    depth_single_blocks=st.integers(1, 3),
    guidance_embed=st.booleans(),
    in_channels=st.sampled_from([4, 64, 384]),
    qk_norm_eps=st.sampled_from([1e-5, 1e-6]),
)


def same(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype and torch.equal(found[path], leaf), path


@given(CONFIGS, st.permutations(list(NAMES)), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=15, deadline=None)
def test_the_way_through_all_formats_returns_every_byte(tmp_path_factory, cfg, order, dtype):
    folder = tmp_path_factory.mktemp("round")
    params = flux.init(cfg, seed=1, dtype=dtype, scheme="nonzero")
    ff.save(folder / "first.safetensors", params, cfg)
    source = recognize.find(folder / "first.safetensors")
    for format in order:
        written = []
        weights.write(source, folder / NAMES[format], format, progress=written.append)
        assert sum(written) == weights.bytes_needed(source) == sum(leaf.nbytes for leaf in tree.leaves(params))
        source = recognize.find(folder / NAMES[format])
        assert source.format == format and source.cfg == cfg
    weights.write(source, folder / "last.safetensors", "bfl")
    assert (folder / "last.safetensors").read_bytes() == (folder / "first.safetensors").read_bytes()
    found, found_cfg = ff.load(folder / "last.safetensors")
    assert found_cfg == cfg
    same(found, params)


@pytest.mark.parametrize("format", NAMES)
def test_the_autoencoder_in_every_format(tmp_path, format):
    params = autoencoder.init(KL, seed=1)
    ff.save(tmp_path / NAMES[format], params, KL, format)
    found, cfg = ff.load(tmp_path / NAMES[format], part="autoencoder")
    assert cfg == KL
    same(found, params)


@pytest.mark.parametrize("format", ["torchtitan", "orbax"])
def test_checkpoint_folders(tmp_path, format):
    params = flux.init(SMALL, scheme="nonzero", dtype=torch.bfloat16)
    ff.save(tmp_path / "folder", params, SMALL, format)
    found, cfg = ff.load(tmp_path / "folder")
    assert cfg == SMALL and recognize.find(tmp_path / "folder").format == format
    same(found, params)
    ff.save(tmp_path / "folder", params, SMALL, format, dtype=torch.float32, overwrite=True)
    same(ff.load(tmp_path / "folder", torch.bfloat16)[0], params)


# The tools whose formats they are.


def inputs(cfg, batch=2, height=4, width=6, text=5):
    def normal(*shape):
        return torch.randn(shape, generator=torch.manual_seed(math.prod(shape)))

    tokens = height * width // 4
    return dict(
        img=normal(batch, tokens, cfg.in_channels),
        img_ids=flux.image_ids(height, width),
        txt=normal(batch, text, cfg.context_in_dim),
        txt_ids=flux.text_ids(text),
        timesteps=torch.tensor([0.3, 0.9]),
        y=normal(batch, cfg.vec_in_dim),
        guidance=torch.tensor([1.5, 4.0]) if cfg.guidance_embed else None,
    )


def diffusers_output(module, given):
    return module(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["y"],
        timestep=given["timesteps"],
        guidance=given["guidance"],
        img_ids=given["img_ids"][0],
        txt_ids=given["txt_ids"][0],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_loads_our_folder_and_computes_the_same(tmp_path, guidance):
    cfg = dataclasses.replace(SMALL, guidance_embed=guidance)
    params = flux.init(cfg, scheme="nonzero")
    ff.save(tmp_path / "transformer", params, cfg, "diffusers")
    module, info = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    stored = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())
    given = inputs(cfg)
    with torch.no_grad():
        ours, theirs = ff.apply(params, cfg, **given), diffusers_output(module, given)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-6


@pytest.mark.parametrize("sharded", [True, False])
def test_we_load_diffusers_folder(tmp_path, sharded):
    params = flux.init(SMALL, scheme="nonzero")
    ff.save(tmp_path / "ours", params, SMALL, "diffusers")
    module = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    module.save_pretrained(tmp_path / "theirs", max_shard_size="300KB" if sharded else "10GB")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == sharded
    found, cfg = ff.load(tmp_path / "theirs")
    assert cfg == SMALL
    same(found, params)


def test_diffusers_loads_our_autoencoder_and_computes_the_same(tmp_path):
    params = autoencoder.init(KL, seed=1, dtype=torch.float64)
    ff.save(tmp_path / "vae", params, KL, "diffusers")
    module = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float64).eval()
    shift, scale = module.config.shift_factor, module.config.scaling_factor
    images = torch.rand(2, 3, 16, 24, generator=torch.manual_seed(0), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = (module.encode(images).latent_dist.mean - shift) * scale
        torch.testing.assert_close(ff.autoencoder.encode(params, KL, images), latents)
        decoded = module.decode(latents / scale + shift).sample
        torch.testing.assert_close(ff.autoencoder.decode(params, KL, latents), decoded)
    module.save_pretrained(tmp_path / "theirs")
    same(ff.load(tmp_path / "theirs")[0], params)


def test_diffusers_loads_our_shards(tmp_path, monkeypatch):
    params = flux.init(SMALL, scheme="nonzero")
    limited = weights.safetensors_io.write_sharded
    monkeypatch.setattr(weights.safetensors_io, "write_sharded", lambda *a, **k: limited(*a, max_bytes=300_000, **k))
    ff.save(tmp_path / "folder", params, SMALL, "diffusers")
    assert len(list((tmp_path / "folder").glob("*-of-*.safetensors"))) > 3
    module = FluxTransformer2DModel.from_pretrained(tmp_path / "folder")
    found, _ = ff.load(tmp_path / "folder")
    same(found, params)
    assert torch.equal(module.x_embedder.weight, params["img_in"]["weight"])


# Types.


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_types_are_converted_on_the_way_in_and_out(tmp_path, format, dtype):
    params = flux.init(SMALL, scheme="nonzero")
    wanted = tree.map(lambda leaf: leaf.to(dtype), params)
    ff.save(tmp_path / "32.safetensors", params, SMALL)
    for source, kwargs in ((params, {"dtype": dtype}), (wanted, {})):
        ff.save(tmp_path / NAMES[format], source, SMALL, format, overwrite=True, **kwargs)
        found, _ = ff.load(tmp_path / NAMES[format])
        same(
            tree.map(lambda leaf: leaf.view(torch.uint8), found), tree.map(lambda leaf: leaf.view(torch.uint8), wanted)
        )
    found, _ = ff.load(tmp_path / "32.safetensors", dtype)
    same(tree.map(lambda leaf: leaf.float(), found), tree.map(lambda leaf: leaf.float(), wanted))
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(ff.load(tmp_path / NAMES[format], torch.float32)[0]))


def test_each_tensor_keeps_its_own_type_and_joined_ones_take_the_widest(tmp_path):
    params = flux.init(SMALL, scheme="nonzero", dtype=torch.bfloat16)
    params["img_in"]["weight"] = params["img_in"]["weight"].float()
    ff.save(tmp_path / "folder", params, SMALL, "diffusers")
    same(ff.load(tmp_path / "folder")[0], params)
    path = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn.to_q.bias"] = tensors["transformer_blocks.0.attn.to_q.bias"].half()
    save_file(tensors, path)
    found, _ = ff.load(tmp_path / "folder")
    bias = found["double_blocks"][0]["img_attn"]["qkv"]["bias"]
    assert bias.dtype == torch.float32  # neither float16 nor bfloat16 holds the other
    assert torch.equal(bias[:128].half().float(), tensors["transformer_blocks.0.attn.to_q.bias"].float())


def test_a_value_beyond_the_type_is_an_error_not_infinity(tmp_path):
    params = flux.init(SMALL, scheme="nonzero")
    params["img_in"]["bias"][3] = -70000.0
    ff.save(tmp_path / "x.safetensors", params, SMALL)
    for attempt in (
        lambda: ff.load(tmp_path / "x.safetensors", torch.float16),
        lambda: ff.save(tmp_path / "y.safetensors", params, SMALL, dtype=torch.float16),
    ):
        with pytest.raises(UserError, match="dtype is float16: img_in.bias reaches 7e.04, beyond 6.55e.04"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert float(ff.load(tmp_path / "x.safetensors", torch.bfloat16)[0]["img_in"]["bias"][3]) == -70144


@pytest.mark.parametrize(
    "value, kind, dtype, use",
    [
        (1e300, torch.float64, torch.float32, "float64"),
        (1e39, torch.float64, torch.bfloat16, "float64"),
        (3.4e38, torch.float32, torch.bfloat16, "float32"),
        (-500.0, torch.bfloat16, torch.float8_e4m3fn, "bfloat16"),
        (-1e5, torch.bfloat16, torch.float16, "bfloat16"),
    ],
)
def test_the_type_that_reaches_is_named(value, kind, dtype, use):
    with pytest.raises(UserError, match=f"x reaches .*; use {use}$"):
        stored.cast(torch.tensor([0, value], dtype=kind), dtype, "x")
    kept = stored.cast(torch.tensor([math.inf, -math.inf, math.nan], dtype=kind), torch.float16, "x")
    assert torch.equal(kept[:2], torch.tensor([math.inf, -math.inf]).half()) and kept[2].isnan()


# What cannot be saved.


def test_a_format_that_cannot_say_the_model_is_refused(tmp_path):
    for change in ({"mlp_ratio": 2.0}, {"qkv_bias": False}, {"theta": 5000}):
        cfg = dataclasses.replace(SMALL, **change)
        params = flux.init(cfg)
        with pytest.raises(UserError, match=f"computes with {next(iter(change))} .*; use bfl"):
            ff.save(tmp_path / "folder", params, cfg, "diffusers")
        for name, format in itertools.product(("bfl", "torchtitan"), ("safetensors",)):
            path = tmp_path / f"{name}-{next(iter(change))}.{format}"
            ff.save(path, params, cfg, name)
            assert ff.load(path)[1] == cfg
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("format, eps, warns", [("diffusers", 1e-5, True), ("bfl", 1e-5, True), ("bfl", 1e-6, False)])
def test_another_epsilon_is_said(tmp_path, caplog, format, eps, warns):
    cfg = dataclasses.replace(SMALL, qk_norm_eps=eps)
    with caplog.at_level(logging.WARNING, logger="flux_func"):
        ff.save(tmp_path / NAMES[format], flux.init(cfg), cfg, format)
    assert ("this model has qk_norm_eps 1e-05; readers of format" in caplog.text) == warns


def test_paths_and_parameters_that_do_not_fit(tmp_path):
    params = flux.init(SMALL)
    for format, name, words in (
        ("bfl", "folder", "should end in .safetensors"),
        ("diffusers", "x.safetensors", "is a folder"),
        ("orbax", "x.safetensors", "is a folder"),
        ("comfy", "x.safetensors", "should be one of bfl, diffusers, torchtitan, orbax"),
    ):
        with pytest.raises(UserError, match=words):
            ff.save(tmp_path / name, params, SMALL, format)
    with pytest.raises(UserError, match="params: do not fit cfg: 4 tensors: not expected guidance_in"):
        ff.save(tmp_path / "x.safetensors", params, dataclasses.replace(SMALL, guidance_embed=False))
    with pytest.raises(UserError, match="kind 'dct' has no weights"):
        ff.save(tmp_path / "x.safetensors", {}, autoencoder.AutoencoderConfig())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_what_is_there_already(tmp_path, monkeypatch):
    params = flux.init(SMALL)
    ff.save(tmp_path / "x.safetensors", params, SMALL)
    before = (tmp_path / "x.safetensors").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        ff.save(tmp_path / "x.safetensors", params, SMALL)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for format, name in NAMES.items():
        with pytest.raises(UserError, match="has 0.00 GB free"):
            ff.save(tmp_path / name, params, SMALL, format, overwrite=True)
    assert (tmp_path / "x.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_is_left_out_is_said(tmp_path, caplog):
    params = flux.init(SMALL)
    ff.save(tmp_path / "x.safetensors", params, SMALL)
    tensors = {f"model.diffusion_model.{name}": leaf for name, leaf in load_file(tmp_path / "x.safetensors").items()}
    save_file(tensors | {"vae.decoder.conv_in.bias": torch.zeros(3)}, tmp_path / "all.safetensors")
    for name, said in (("x.safetensors", ""), ("all.safetensors", "left out: vae (1 tensors)")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="flux_func"):
            found, cfg = ff.load(tmp_path / name)
        assert cfg == SMALL and said in caplog.text and bool(said) == bool(caplog.text)
        same(found, params)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, 3])
def test_a_type_that_is_none_of_floats(tmp_path, dtype):
    for attempt in (
        lambda: ff.save(tmp_path / "x.safetensors", flux.init(SMALL), SMALL, dtype=dtype),
        lambda: ff.load(tmp_path, dtype=dtype),
    ):
        with pytest.raises(UserError, match="should be a torch.dtype of floats, such as torch.bfloat16"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", [torch.Tensor.int, torch.Tensor.numpy, lambda leaf: leaf.to("meta")])
def test_leaves_that_are_no_weights(tmp_path, spoil):
    params = flux.init(SMALL)
    params["img_in"]["bias"] = spoil(params["img_in"]["bias"])
    with pytest.raises(UserError, match=r"params: img_in\.bias is a .*; should be a tensor of floats with values"):
        ff.save(tmp_path / "x.safetensors", params, SMALL)
    assert not list(tmp_path.iterdir())


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ff.save("~/x.safetensors", flux.init(SMALL), SMALL)
    assert ff.load("~/x.safetensors")[1] == SMALL and [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
