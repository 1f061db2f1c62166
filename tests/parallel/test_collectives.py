"""Collectives give what every rank's tensors say, and their derivatives of every kind."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flux_func.parallel import collectives
from tests.helpers import rank_collectives, ranks


@st.composite
def cases(draw, kind, world):
    """A collective, a shape that it can work on, what it works along, and a shift."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    dims = tuple(draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    if kind == "reduce_scatter" or kind.startswith("all_to_all"):
        shape[dims[0]] *= world
    return kind, tuple(shape), dims, draw(st.integers(-world, world))


def drawn(kind, world):
    """Examples drawn beforehand, so that one start of the ranks serves them all."""
    found = []

    @settings(max_examples=8, database=None, derandomize=True, phases=[Phase.generate], deadline=None)
    @given(cases(kind, world))
    def collect(case):
        found.append(case)

    collect()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_values_transposes_tangents_and_batches_are_right_for_any_shape(world):
    examples = [case for kind in rank_collectives.KINDS for case in drawn(kind, world)]
    for errors in ranks.run(world, rank_collectives.largest_errors, examples):
        for case, error in zip(examples, errors, strict=True):
            assert max(error) <= 1e-12, (case, error)


def test_first_and_second_derivatives_are_those_of_one_process():
    for found in ranks.run(2, rank_collectives.derivatives, (4, 2), (0, 1)):
        assert set(found) == set(rank_collectives.KINDS)
        for kind, errors in found.items():
            assert max(errors.values()) <= 1e-12, (kind, errors)


def test_a_tally_counts_what_a_ring_sends():
    size = 8 * 4 * 2 * 8  # bytes of a float64 [8, 4, 2]
    for found in ranks.run(4, rank_collectives.counted, (8, 4, 2)):
        assert found == {
            "all_gather": {"all_gather": 3 * size, "reduce_scatter": 3 * size},
            "reduce_scatter": {"reduce_scatter": 3 * size / 4, "all_gather": 3 * size / 4},
            "all_reduce": {"all_reduce": 2 * 2 * 3 * size / 4},
            "all_to_all": {"all_to_all": 2 * 3 * size / 4},
            "all_to_all of pairs": {"all_to_all": 2 * size / 2},
            "ring_permute": {"permute": 2 * size},
        }


def test_operations_in_flight_return_what_they_say():
    xs = [rank_collectives.draw(rank, (4, 3)).numpy() for rank in range(2)]
    for rank, (gathered, scattered, reduced) in enumerate(ranks.run(2, rank_collectives.in_flight, 2)):
        np.testing.assert_array_equal(gathered, np.concatenate(xs))
        np.testing.assert_allclose(scattered, sum(xs)[2 * rank : 2 * rank + 2], atol=1e-15)
        np.testing.assert_allclose(reduced, sum(xs), atol=1e-15)


def test_one_process_alone_keeps_its_tensor():
    x = torch.ones(2, 3)
    for kind in rank_collectives.KINDS:
        assert rank_collectives.collective(kind, None, (0, 1))(x) is x


def test_a_fake_group_is_counted_without_the_machines():
    # In a process of its own: a process group is global.
    assert ranks.run(1, rank_collectives.counted_in_a_fake_world, 1024) == [
        {"all_gather": 1023 * 4 * 4, "reduce_scatter": 1023 * 4 * 4}
    ]


def test_a_dimension_that_does_not_divide_is_named():
    class Two:
        def size(self):
            return 2

    for call in (
        lambda: collectives.reduce_scatter(torch.ones(3, 2), 0, Two()),
        lambda: collectives.all_to_all(torch.ones(3, 2), 0, 1, Two()),
    ):
        with pytest.raises(ValueError, match=r"dimension 0 of \[3, 2\] does not divide by the 2 processes"):
            call()
