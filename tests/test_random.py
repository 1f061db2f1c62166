"""Counted draws: the same for the same (seed, purpose, position), independent otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flux_func import random

SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.text(max_size=8), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_a_draw_is_a_function_of_seed_purpose_and_position(seed, purpose, position):
    first = random.normal(seed, purpose, position, (5,))
    random.normal(seed + 1, purpose, position, (5,))
    np.testing.assert_array_equal(first, random.normal(seed, purpose, position, (5,)))
    for other in (
        random.normal(seed + 1, purpose, position, (5,)),
        random.normal(seed, purpose + "x", position, (5,)),
        random.normal(seed, purpose, position + 1, (5,)),
    ):
        assert not np.array_equal(first, other)


def test_draws_over_positions_have_the_distribution():
    normal = np.concatenate([random.normal(3, "noise", p, (16,)) for p in range(500)])
    uniform = np.array([random.uniform(3, "timestep", p) for p in range(4000)])
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    # Neighbours in position are not correlated: the standard error of the coefficient is 1/sqrt(4000).
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 4 / 4000**0.5


def test_one_position_never_runs_into_the_next():
    long = random.normal(0, "noise", 7, (200_000,))
    assert not np.isin(random.normal(0, "noise", 8, (64,)), long[1000:]).all()
    assert stats.kstest(long[:5000], "norm").pvalue > 1e-3


@pytest.mark.parametrize("position", [(-1,), (0, 0, 0, 0)])
def test_position_outside_the_counter_is_refused(position):
    with pytest.raises(ValueError, match="position"):
        random.generator(0, "noise", *position)
