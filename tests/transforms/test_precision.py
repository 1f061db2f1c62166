"""Stages computed in another type than their parameters are kept in, and stochastic rounding."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.flow import path
from flux_func.models import flux
from flux_func.transforms import precision


def test_parameters_are_cast_and_the_loss_stage_is_left_alone():
    wrap = precision.compute_in(torch.bfloat16)
    stem, *_, loss = path.chain(flux.flavor("flux-tiny"))
    seen = wrap(lambda params, carry, const: params, stem)({"a": [torch.ones(2)]}, {}, {})
    assert seen["a"][0].dtype == torch.bfloat16
    fn = object()
    assert wrap(fn, loss) is fn


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=8), st.integers(0, 2**16 - 1))
def test_a_number_is_rounded_to_one_of_its_two_neighbours(numbers, bits):
    x = np.array(numbers, np.float32)
    rounded = precision.round_to_bfloat16(torch.from_numpy(x), torch.full((len(x),), bits)).double().numpy()
    # Toward zero, and the next one from there.
    low = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    high = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    share = (x.view(np.uint32) & 0xFFFF).astype(np.int64)
    expected = np.where(share + bits >= 1 << 16, high, low)
    assert np.array_equal(rounded, expected.astype(np.float64))
    exact = share == 0
    assert np.array_equal(rounded[exact], x[exact].astype(np.float64))


def test_what_is_not_finite_stays():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for bits in (0, 2**16 - 1):
        out = precision.round_to_bfloat16(x, torch.full((3,), bits))
        assert out.dtype == torch.bfloat16 and torch.equal(out[:2], x[:2].bfloat16()) and out[2].isnan()
    # All bits of a NaN set: a carry would make a zero of it.
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert precision.round_to_bfloat16(full, torch.full((2,), 1)).isnan().all()


def test_rounding_is_right_on_average():
    count, index = 400, torch.arange(2000)
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).exp()
    draws = [precision.counted_bits(7, torch.tensor(float(step)), index) >> 16 for step in range(count)]
    rounded = torch.stack([precision.round_to_bfloat16(x, bits).double() for bits in draws])
    low = (x.view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    step = torch.ldexp(torch.ones(2000, dtype=torch.float64), torch.frexp(low).exponent - 8)
    share = (x.double() - low) / step
    error = (share * (1 - share) / count).sqrt() * step
    # In units of its standard error each mean is standard normal, and so is the mean of all, times the root of 2000.
    z = ((rounded.mean(0) - x) / error)[share > 0]
    assert z.abs().max() < 4.5 and (z.mean() * len(z) ** 0.5).abs() < 3.5 and 0.9 < z.std() < 1.1
    nearest = x.bfloat16().double() - x
    assert (nearest.abs() > 10 * error.clamp(min=1e-12)).float().mean() > 0.5


def test_bits_are_a_function_of_key_step_and_index_and_uniform():
    step, index = torch.tensor(3.0), torch.arange(2**16)
    bits = precision.counted_bits(5, step, index)
    assert bits.min() >= 0 and bits.max() < 2**32
    assert torch.equal(precision.counted_bits(5, step.long(), index[100:200]), bits[100:200])
    others = [precision.counted_bits(key, torch.tensor(at), index) for key, at in ((6, 3.0), (5, 4.0), (5, 2.0))]
    for found in (bits, *others):
        for byte in range(4):
            counts = torch.bincount(found >> 8 * byte & 0xFF, minlength=256).double()
            # Chi-squared with 255 degrees of freedom: its standard deviation is 22.6.
            assert abs(((counts - 256) ** 2 / 256).sum() - 255) < 4 * 22.6
    pairs = [(bits, other) for other in others] + [(bits[:-1], bits[1:]), (bits[:-256], bits[256:])]
    pairs.append((bits & 0xFFFF, bits >> 16))
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1]
        assert correlation.abs() < 4 / 2**8
