"""The autoencoders: `kl` against black-forest-labs/flux's own module, `dct` through the same door."""

import dataclasses

import numpy as np
import pytest
import torch
from fluxbfl.modules.autoencoder import AutoEncoder, AutoEncoderParams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flux_func import tree
from flux_func.models import autoencoder
from flux_func.models.autoencoder import AutoencoderConfig

FULL = AutoencoderConfig(kind="kl")
SMALL = dataclasses.replace(FULL, ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
DCT = AutoencoderConfig(kind="dct")


def reference(cfg, dtype=torch.float64):
    fields = dict(resolution=256, in_channels=3, out_ch=3, ch=cfg.ch, ch_mult=list(cfg.ch_mult))
    fields |= dict(num_res_blocks=cfg.num_res_blocks, z_channels=cfg.z_channels)
    fields |= dict(scale_factor=cfg.scale_factor, shift_factor=cfg.shift_factor)
    return AutoEncoder(AutoEncoderParams(**fields)).to(dtype)


def weights(cfg, seed=0, dtype=torch.float64):
    """Weights under which no norm is the identity and activations stay of order one."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in autoencoder.shapes(cfg).items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values *= 1.5 * np.prod(shape[1:]) ** -0.5
        else:
            values = 0.3 * values + ("norm" in path and path.endswith("weight"))
        flat[path] = torch.from_numpy(values).to(dtype)
    return flat


def pair(cfg, seed=0, dtype=torch.float64):
    flat = weights(cfg, seed, dtype)
    model = reference(cfg, dtype)
    model.load_state_dict(flat)
    return model.requires_grad_(False), tree.unflatten(flat)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def test_full_size_tree_is_the_reference_state_dict():
    with torch.device("meta"):
        state = reference(FULL, torch.float32).state_dict()
    flat = tree.flatten(autoencoder.abstract(FULL))
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in state.items()}
    assert (len(flat), sum(leaf.numel() for leaf in flat.values())) == (244, 83_819_683)


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([(1,), (1, 2), (2, 1), (1, 1, 2)]),
    st.integers(1, 2),
    st.tuples(st.integers(1, 2), st.integers(2, 4), st.integers(2, 4)),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_kl_equals_reference(ch_mult, num_res_blocks, size, dtype, seed):
    cfg = dataclasses.replace(SMALL, ch_mult=ch_mult, num_res_blocks=num_res_blocks)
    model, params = pair(cfg, seed, dtype)
    batch, height, width = size
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    images = normal(batch, 3, cfg.downsampling * height, cfg.downsampling * width, seed=seed, dtype=dtype)
    latents = autoencoder.encode(params, cfg, images)
    torch.testing.assert_close(latents, model.encode(images), rtol=tolerance, atol=tolerance)
    decoded = autoencoder.decode(params, cfg, latents)
    torch.testing.assert_close(decoded, model.decode(latents), rtol=tolerance, atol=tolerance)
    assert decoded.shape == images.shape and decoded.dtype == dtype


def test_kl_draw_is_from_the_posterior():
    model, params = pair(SMALL)
    images, noise = normal(2, 3, 8, 12, seed=1), normal(2, 4, 4, 6, seed=2)
    mean, logvar = model.encoder(images).chunk(2, dim=1)
    expected = SMALL.scale_factor * (mean + logvar.exp().sqrt() * noise - SMALL.shift_factor)
    torch.testing.assert_close(autoencoder.encode(params, SMALL, images, noise), expected, rtol=1e-12, atol=1e-12)
    drawn = autoencoder.encode(params, SMALL, images, torch.zeros_like(noise))
    assert torch.equal(drawn, autoencoder.encode(params, SMALL, images))


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_samples_in_turn_are_the_batch(monkeypatch, at_once):
    params, images, seen = tree.unflatten(weights(SMALL)), normal(5, 3, 16, 8), []
    latents = autoencoder.encode(params, SMALL, images)
    pixels = autoencoder.decode(params, SMALL, latents)
    middle = autoencoder._middle
    monkeypatch.setattr(autoencoder, "_middle", lambda params, x: (seen.append(len(x)), middle(params, x))[1])
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", at_once * 16 * 8 + 1)
    torch.testing.assert_close(autoencoder.encode(params, SMALL, images), latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(autoencoder.decode(params, SMALL, latents), pixels, rtol=1e-12, atol=1e-12)
    assert max(seen) == at_once and sum(seen) == 10


def test_latents_are_scale_times_z_minus_shift():
    params = tree.unflatten(weights(SMALL))
    last = params["encoder"]["conv_out"]
    last["weight"], last["bias"] = torch.zeros_like(last["weight"]), torch.full((8,), 2.0, dtype=torch.float64)
    latents = autoencoder.encode(params, SMALL, normal(1, 3, 8, 8))
    assert torch.unique(latents).tolist() == pytest.approx([0.3611 * (2 - 0.1159)], rel=1e-12)


def test_gradients_equal_reference():
    model, params = pair(SMALL)
    latents, direction = normal(1, 4, 2, 3, seed=3), normal(1, 3, 4, 6, seed=4)

    def value(params, latents):
        return (autoencoder.decode(params, SMALL, latents) * direction).sum()

    by_params, by_latents = torch.func.grad(value, argnums=(0, 1))(params, latents)
    latents.requires_grad_(True)
    model.requires_grad_(True)
    (model.decode(latents) * direction).sum().backward()
    torch.testing.assert_close(by_latents, latents.grad, rtol=1e-10, atol=1e-12)
    for path, gradient in tree.flatten(by_params["decoder"]).items():
        expected = model.get_parameter(f"decoder.{path}").grad
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11, msg=lambda m, p=path: f"{p}: {m}")


def test_arithmetic_stays_in_the_type_that_came_in():
    params = tree.unflatten(weights(SMALL, dtype=torch.float32))
    images = normal(1, 3, 8, 8)
    exact = autoencoder.encode(params, SMALL, images)
    assert exact.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        latents = autoencoder.encode(params, SMALL, images.to(dtype), torch.zeros(1, 4, 4, 4))
        assert latents.dtype == autoencoder.decode(params, SMALL, latents).dtype == dtype
        torch.testing.assert_close(latents.double(), exact, rtol=tolerance, atol=tolerance)


def test_init_draws_as_torch_does_and_is_counted():
    flat = tree.flatten(autoencoder.init(SMALL, seed=3))
    again, other = (tree.flatten(autoencoder.init(SMALL, seed=seed, dtype=torch.float64)) for seed in (3, 4))
    assert {path: leaf.shape for path, leaf in flat.items()} == autoencoder.shapes(SMALL)
    for path, leaf in flat.items():
        assert leaf.dtype == torch.float32 and torch.equal(leaf.double(), again[path])
        if "norm" in path:
            assert leaf.unique().tolist() == [1.0 if path.endswith("weight") else 0.0]
        else:
            assert not torch.equal(again[path], other[path])
    torch.manual_seed(0)
    torchs = reference(SMALL, torch.float32).state_dict()
    for path in (path for path, leaf in flat.items() if leaf.numel() > 5000):
        assert float(flat[path].abs().max()) == pytest.approx(float(torchs[path].abs().max()), rel=1e-3)
        assert float(flat[path].std()) == pytest.approx(float(torchs[path].std()), rel=0.04)
        assert abs(float(flat[path].mean())) < 0.05 * float(flat[path].std())


def test_init_gives_finite_images():
    params = autoencoder.init(SMALL)
    latents = autoencoder.encode(params, SMALL, normal(1, 3, 16, 16, dtype=torch.float32).clamp(-1, 1))
    images = autoencoder.decode(params, SMALL, latents)
    assert images.shape == (1, 3, 16, 16) and float(images.abs().max()) < 10 and float(images.std()) > 1e-3


def test_load_gives_back_what_was_saved(tmp_path):
    flat = weights(SMALL, dtype=torch.float32)
    save_file(flat, tmp_path / "ae.safetensors")
    params, cfg = autoencoder.load(str(tmp_path / "ae.safetensors"), cfg=SMALL)
    assert cfg == SMALL and all(torch.equal(leaf, flat[path]) for path, leaf in tree.flatten(params).items())
    half, _ = autoencoder.load(str(tmp_path / "ae.safetensors"), dtype=torch.bfloat16, cfg=SMALL)
    assert all(torch.equal(leaf, flat[path].bfloat16()) for path, leaf in tree.flatten(half).items())


def test_load_lists_what_does_not_fit(tmp_path):
    flat = weights(SMALL, dtype=torch.float32)
    del flat["decoder.conv_in.weight"]
    flat["quant_conv.weight"] = torch.zeros(1)
    flat["encoder.conv_in.bias"] = torch.zeros(7)
    save_file(flat, tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as caught:
        autoencoder.load(str(tmp_path / "other.safetensors"), cfg=SMALL)
    message = str(caught.value)
    assert "missing decoder.conv_in.weight" in message and "not expected quant_conv.weight" in message
    assert "encoder.conv_in.bias is [7] and should be [32]" in message and "ae.safetensors" in message
    assert "\n" not in message


def test_load_of_no_file_and_of_a_truncated_one(tmp_path):
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for name in ("short.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match=r"cannot be read .*ae\.safetensors") as caught:
            autoencoder.load(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_dct_has_no_parameters_and_no_variance():
    assert autoencoder.init(DCT, seed=1) == autoencoder.abstract(DCT) == autoencoder.shapes(DCT) == {}
    images, noise = normal(2, 3, 16, 24), normal(2, 16, 2, 3)
    latents = autoencoder.encode({}, DCT, images)
    assert latents.shape == noise.shape and torch.equal(latents, autoencoder.encode({}, DCT, images, noise))
    again = autoencoder.encode({}, DCT, autoencoder.decode({}, DCT, latents))
    torch.testing.assert_close(again, latents, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cfg", [DCT, FULL])
def test_wrong_shapes_are_refused(cfg):
    for shape in ((1, 3, 12, 16), (1, 1, 16, 16), (3, 16, 16)):
        with pytest.raises(ValueError, match="multiples of 8"):
            autoencoder.encode({}, cfg, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"noise \(1, 16, 2, 2\) should be \(2, 16, 2, 3\)"):
        autoencoder.encode({}, cfg, torch.zeros(2, 3, 16, 24), torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match="images are torch.uint8, they should be floats in"):
        autoencoder.encode({}, cfg, torch.zeros(2, 3, 16, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="should be .B, 16, h, w"):
        autoencoder.decode({}, cfg, torch.zeros(1, 4, 2, 2))


def test_configs_that_cannot_be_are_refused():
    for fields, message in (
        ({"kind": "vq"}, "'vq'"),
        ({"kind": "kl", "ch": 48}, "48"),
        ({"z_channels": 4}, "4"),
        ({"ch": 0}, "ch 0 should be a whole number from 1 on"),
        ({"ch_mult": (1, 0)}, "ch_mult .1, 0. should be whole numbers"),
        ({"ch_mult": ()}, "ch_mult .. should be whole numbers"),
        ({"scale_factor": None}, "scale_factor None should be a finite number"),
        ({"shift_factor": float("inf")}, "shift_factor inf should be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoencoderConfig(**fields)
