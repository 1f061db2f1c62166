"""Each layer against a formula in float64, and its derivatives against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.models import layers


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_layer_norm_is_the_formula(batch, length, size):
    x = draw(batch, length, size) * 3 + 1
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layers.layer_norm(x), expected, rtol=1e-10, atol=1e-12)


def test_layer_norm_of_narrow_types_is_right_plain_and_transformed():
    x, u = (draw(4, 64, seed=i).bfloat16() for i in (1, 2))

    def loss(x):
        return (layers.layer_norm(x) ** 3).sum()

    def slope(x, u):
        return torch.func.jvp(loss, (x,), (u,))[1]

    def of_autograd(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    wide = x.double(), u.double()
    torch.testing.assert_close(layers.layer_norm(x), layers.layer_norm(wide[0]).bfloat16(), rtol=2**-7, atol=0)
    for fn, count in ((of_autograd, 1), (torch.func.grad(loss), 1), (torch.func.grad(slope), 2)):
        found, expected = fn(*(x, u)[:count]), fn(*wide[:count])
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 2e-2 * expected.norm()


def test_rms_norm_is_the_formula_and_is_at_least_float32_inside():
    x, scale = draw(2, 3, 8), draw(8, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    torch.testing.assert_close(layers.rms_norm({"scale": scale}, x, 1e-5), expected)
    half = layers.rms_norm({"scale": scale.bfloat16()}, x.bfloat16(), 1e-5)
    assert half.dtype == torch.bfloat16
    assert ((half.double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("name", ["layer_norm", "modulate", "rms_norm", "rope"])
@pytest.mark.parametrize("order", ["grad_jvp", "jvp_jvp", "jvp_grad", "grad_grad"])
def test_second_derivatives_agree_with_finite_differences(name, order):
    # F.layer_norm is wrong by a third in the first two.
    scale, shift, table = draw(8, seed=1), draw(1, 1, 8, seed=2), layers.rope(draw(1, 4, 2), (4, 4), 100, torch.float64)
    fn = {
        "layer_norm": layers.layer_norm,
        "modulate": lambda x: layers.modulate(x, shift, scale[None, None]),
        "rms_norm": lambda x: layers.rms_norm({"scale": scale}, x, 1e-6),
        "rope": lambda x: layers.apply_rope(x[:, None], table)[:, 0],
    }[name]
    x, u, v, w = (draw(1, 4, 8, seed=i) for i in range(3, 7))

    def loss(x):
        return (fn(x) ** 3 * w).sum()

    def slope(x, direction):
        return torch.func.jvp(loss, (x,), (direction,))[1]

    def step(f, h=1e-4):
        return (f(x + h * v) - f(x - h * v)) / (2 * h)

    exact = {
        "grad_jvp": lambda: (torch.func.grad(slope)(x, u) * v).sum(),
        "jvp_jvp": lambda: torch.func.jvp(lambda x: slope(x, u), (x,), (v,))[1],
        "jvp_grad": lambda: (torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1] * u).sum(),
        "grad_grad": lambda: (torch.func.grad(lambda x: (torch.func.grad(loss)(x) * u).sum())(x) * v).sum(),
    }[order]()
    numeric = step(lambda x: (torch.func.grad(loss)(x) * u).sum())
    torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-6)


def test_timestep_embedding_is_cosines_then_sines_of_a_thousand_t():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    out = layers.timestep_embedding(t, 6)
    omega = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    for row, value in zip(out, t.tolist(), strict=True):
        angles = [1000 * value * w for w in omega]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        np.testing.assert_allclose(row.numpy(), expected, rtol=0, atol=1e-9)
    assert layers.timestep_embedding(t.bfloat16(), 6).dtype == torch.float32


def test_rope_turns_each_pair_by_position_times_frequency():
    ids = torch.tensor([[[0.0, 3, 5], [0, 63, 1]]])
    x = draw(1, 2, 2, 12)
    out = layers.apply_rope(x, layers.rope(ids, (4, 4, 4), 10000, torch.float64))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    for token in range(2):
        for pair in range(6):
            angle = ids[0, token, pair // 2].item() * 10000 ** (-(pair % 2) / 2)
            expected = pairs[0, :, token, pair] * complex(math.cos(angle), math.sin(angle))
            got = torch.view_as_complex(out.unflatten(-1, (-1, 2)).contiguous())[0, :, token, pair]
            torch.testing.assert_close(got, expected)


def test_position_ids_and_rope_never_fall_below_float32():
    ids = torch.tensor([[[0.0, 300, 301]]])
    cos, sin = layers.rope(ids, (4, 4, 4), 10000, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0, 0, 4].item() == pytest.approx(math.cos(300), abs=1e-7)
    x = draw(1, 1, 1, 12).bfloat16()
    exact = layers.apply_rope(x.double(), layers.rope(ids, (4, 4, 4), 10000, torch.float64))
    rounded = layers.apply_rope(x, (cos, sin))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_attention_is_full_and_not_causal():
    q, k, v = (draw(2, 3, 5, 4, seed=i) for i in range(3))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
    expected = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layers.attention(q, k, v), expected)
    # The first token sees the last one.
    moved = layers.attention(q, k, torch.cat([v[:, :, :-1], v[:, :, -1:] + 1], dim=2))
    assert (moved - expected)[:, 0].abs().min() > 1e-4
