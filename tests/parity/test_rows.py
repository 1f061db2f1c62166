import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func.parity import rows


@given(st.integers(0, 2**32 - 1), st.floats(1e-12, 1e3))
@settings(max_examples=20, deadline=None)
def test_relative_is_the_size_of_the_difference_over_the_reference_s(seed, size):
    rng = torch.Generator().manual_seed(seed)
    theirs = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    direction = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    ours = theirs + size * direction * theirs.norm() / direction.norm()
    assert rows.relative(ours, theirs) == pytest.approx(size, rel=1e-3)


def test_relative_to_nothing_is_the_difference_itself():
    assert rows.relative(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5
    assert rows.relative(torch.zeros(2), torch.zeros(2)) == 0


def test_relative_is_summed_in_float64():
    # In float32 the sum of these squares loses a third of a percent.
    theirs = torch.full((2**24,), 1.0)
    assert rows.relative(theirs + 2**-10, theirs) == 2**-10


def test_shapes_that_differ_are_no_broadcast():
    with pytest.raises(ValueError, match=r"ours is \(2, 1\) where the reference's is \(2,\)"):
        rows.relative(torch.zeros(2, 1), torch.zeros(2))


def test_not_a_number_never_passes():
    ours, theirs = torch.tensor([math.nan]), torch.tensor([1.0])
    assert not rows.relative_row("forward", "x", ours, theirs, "image").passed
    assert not rows.relative_row("forward", "x", theirs, ours, "image").passed


@given(st.permutations(["small", "none", "large", "infinite"]))
@settings(max_examples=30, deadline=None)
def test_the_worst_is_no_number_wherever_it_stands(order):
    errors = {"small": 0.0, "none": math.nan, "large": 3.0, "infinite": math.inf}
    assert rows.worst({name: errors[name] for name in order}) == "none"
    assert rows.worst({name: errors[name] for name in order if name != "none"}) == "infinite"
    assert rows.worst({name: errors[name] for name in order if name in ("small", "large")}) == "large"


def test_a_bound_may_be_reached():
    assert rows.Row("stages", "join", "relative", 0.0, 0.0).passed
    assert not rows.Row("stages", "join", "relative", 1e-30, 0.0).passed


def test_the_bounds_that_are_promised():
    promised = {"forward": 1e-6, "bfloat16": 1.2, "gradient": 3e-6, "image": 1 / 255}
    assert promised.items() <= rows.BOUNDS.items()
