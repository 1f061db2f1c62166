"""The block transform against scipy's DCT, its algebra, and its table against the photographs it was measured on."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux_func.models import dct

TAR = pathlib.Path(__file__).parents[3] / "shared/data/cc12m-train-0000.tar"
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_kernel_is_orthonormal_and_low_in_frequency():
    rows = dct.kernel().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-14)
    assert [sum(color == which for color, _, _ in dct.CHANNELS) for which in range(3)] == [10, 3, 3]
    assert {(v, h) for color, v, h in dct.CHANNELS if color == 0} == {(v, h) for v in range(4) for h in range(4 - v)}


@settings(max_examples=10, deadline=None)
@given(SIZES, st.integers(0, 2**31))
def test_encode_equals_scipy(size, seed):
    batch, height, width = size
    images = normal(batch, 3, 8 * height, 8 * width, seed=seed)
    opponent = np.array([[1, 1, 1], [-1, -1, 2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
    blocks = np.einsum("oc,bcyixj->boyxij", opponent, images.numpy().reshape(batch, 3, height, 8, width, 8))
    full = scipy.fft.dctn(blocks, axes=(-2, -1), norm="ortho")
    expected = np.stack([full[:, color, :, :, v, h] for color, v, h in dct.CHANNELS], axis=1)
    expected = (expected - np.reshape(dct.MEAN, (16, 1, 1))) / np.reshape(dct.STD, (16, 1, 1))
    np.testing.assert_allclose(dct.encode(images), expected, rtol=0, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(SIZES, st.integers(0, 2**31))
def test_encoding_undoes_decoding_and_decoding_projects(size, seed):
    batch, height, width = size
    latents = normal(batch, 16, height, width, seed=seed)
    torch.testing.assert_close(dct.encode(dct.decode(latents)), latents, rtol=0, atol=1e-12)
    images = normal(batch, 3, 8 * height, 8 * width, seed=seed)
    projected = dct.decode(dct.encode(images))
    torch.testing.assert_close(dct.decode(dct.encode(projected)), projected, rtol=0, atol=1e-12)
    # Orthogonal: what is lost is at right angles to whatever can be kept.
    other = dct.decode(latents) - dct.decode(torch.zeros_like(latents))
    assert abs(float(((images - projected) * other).sum())) < 1e-9 * float(images.norm() * other.norm() + 1)


def test_float32_and_bfloat16_stay_what_they_are():
    images = normal(2, 3, 16, 24)
    exact = dct.encode(images)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        latents = dct.encode(images.to(dtype))
        assert latents.dtype == dct.decode(latents).dtype == dtype
        torch.testing.assert_close(latents.double(), exact, rtol=tolerance, atol=tolerance)


def test_grey_has_no_colour():
    latents = dct.encode(normal(1, 1, 16, 16).expand(1, 3, 16, 16))[0, 10:]
    none = -np.array(dct.MEAN[10:]) / np.array(dct.STD[10:])
    np.testing.assert_allclose(latents, np.broadcast_to(none[:, None, None], (6, 2, 2)), rtol=0, atol=1e-12)


def test_smooth_images_come_back():
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    smooth = torch.stack([torch.sin(3 * x + y), torch.cos(2 * y), 0.5 * x * y - 0.3])[None].double()
    error = dct.decode(dct.encode(smooth)) - smooth
    assert -20 * np.log10(float(error.square().mean().sqrt()) / 2) > 50, "peak signal-to-noise ratio in decibels"


def test_table_is_what_the_photographs_give():
    mean, std = dct.measure(dct.photographs())
    np.testing.assert_allclose(mean, dct.MEAN, rtol=0, atol=6e-4)
    np.testing.assert_allclose(std, dct.STD, rtol=0, atol=6e-4)


def test_photographs_latents_have_unit_variance():
    columns = []
    for photograph in dct.photographs():
        third = photograph[:408, :624].reshape(136, 3, 208, 3, 3).mean(axis=(1, 3)) / 127.5 - 1
        columns.append(dct.encode(torch.from_numpy(third).permute(2, 0, 1)[None]).flatten(2)[0])
    latents = torch.cat(columns, dim=1)
    constant = torch.tensor([v == h == 0 for _, v, h in dct.CHANNELS])
    torch.testing.assert_close(latents.std(dim=1), torch.ones(16, dtype=torch.float64), rtol=0, atol=6e-3)
    torch.testing.assert_close(latents.mean(dim=1)[constant], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-3)
    assert float(latents.mean(dim=1).abs().max()) < 0.12


@pytest.mark.skipif(not TAR.exists(), reason=f"{TAR.name} is not there")
def test_table_fits_web_photographs():
    columns = []
    with tarfile.open(TAR) as tar:
        for member in (m for m in tar if m.name.endswith(".jpg")):
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize([round(scale * side) // 8 * 8 for side in image.size], Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None]
            columns.append(dct.encode(pixels).flatten(2)[0])
    latents = torch.cat(columns, dim=1)
    std = latents.std(dim=1)
    assert bool(((std > 0.75) & (std < 1.5)).all())
    assert 0.9 < float(latents.square().mean()) ** 0.5 < 1.3
    assert float(latents.mean(dim=1).abs().max()) < 0.6
