"""The moving average against its closed form."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.transforms import ema
from tests.helpers import rank_sampling, ranks


@given(st.floats(0, 1), st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_average_of_a_constant_approaches_it_geometrically(decay, steps):
    average, params = {"w": torch.zeros(3, dtype=torch.float64)}, {"w": torch.ones(3, dtype=torch.float64)}
    for _ in range(steps):
        average = ema.update(average, params, decay)
    torch.testing.assert_close(average["w"], torch.full((3,), 1 - decay**steps, dtype=torch.float64))


def test_average_is_donated_and_keeps_its_type():
    average, params = {"w": torch.zeros(3)}, {"w": torch.ones(3, dtype=torch.bfloat16)}
    kept = average["w"]
    out = ema.update(average, params, 0.25)
    assert out["w"] is kept and kept.dtype == torch.float32
    torch.testing.assert_close(kept, torch.full((3,), 0.75))


def test_decay_warms_up_to_its_value():
    assert ema.decay_at(0, 0.999) == 0.1
    assert ema.decay_at(90, 0.999) == 0.91
    assert ema.decay_at(10**6, 0.999) == 0.999


def test_the_average_of_parts_is_the_part_of_the_average():
    assert ranks.run(4, rank_sampling.averages, 3) == [True] * 4
