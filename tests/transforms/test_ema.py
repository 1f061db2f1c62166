"""The moving average against its closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("decay", [2, -1, 1 + 1e-6, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay is .*: should be a number in"):
        ema.update({"w": torch.zeros(3)}, {"w": torch.ones(3)}, decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_decay_may_be_a_tensor_which_is_not_looked_at(dtype):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        average = ema.update({"w": torch.zeros(3, dtype=dtype)}, {"w": torch.ones(3)}, torch.tensor(0.25))
    torch.testing.assert_close(average["w"], torch.full((3,), 0.75, dtype=dtype))
    assert seen and not any("local_scalar" in name for name in seen)
    with pytest.raises(ValueError, match=r"decay is a tensor \[2\]: should be a number or a scalar tensor"):
        ema.update({"w": torch.zeros(3)}, {"w": torch.ones(3)}, torch.ones(2))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"v": torch.ones(2)}, "missing w"),
        ({"w": torch.ones(1)}, r"w is \[1\] and should be \[2\]"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, "not expected v"),
        ({}, "missing w"),
        ({"w": torch.ones(2), "blocks": []}, "the leaves are the same, but"),
    ],
)
def test_another_tree_than_the_averages_is_refused_before_anything_is_written(params, says):
    average = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"params is not like the average: .*{says}"):
        ema.update(average, params, 0.5)
    assert not average["w"].any()


def test_order_of_keys_does_not_matter():
    average = ema.update(
        {"a": torch.zeros(2), "b": torch.zeros(2)}, {"b": torch.full((2,), 4.0), "a": torch.full((2,), 2.0)}, 0.5
    )
    assert average["a"].tolist() == [1, 1] and average["b"].tolist() == [2, 2]


def test_decay_warms_up_to_its_value():
    assert ema.decay_at(0, 0.999) == 0.1
    assert ema.decay_at(90, 0.999) == 0.91
    assert ema.decay_at(10**6, 0.999) == 0.999


def test_the_average_of_parts_is_the_part_of_the_average():
    assert ranks.run(4, rank_sampling.averages, 3) == [True] * 4
