import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_func.errors import UserError
from flux_func.parallel import mesh
from flux_func.parallel.mesh import AXES, Mesh
from tests.helpers import rank_mesh, ranks

SIZES = st.integers(1, 6)


@given(SIZES, SIZES, SIZES)
def test_every_rank_has_a_place_of_its_own(replicate, shard, context):
    sizes = dict(zip(AXES, (replicate, shard, context), strict=True))
    places = [tuple(Mesh(sizes, rank).index([axis]) for axis in AXES) for rank in range(math.prod(sizes.values()))]
    assert places == sorted(set(places))
    assert [Mesh(sizes, rank).index(AXES) for rank in range(len(places))] == list(range(len(places)))


@given(SIZES, SIZES, SIZES)
def test_an_index_along_two_axes_counts_the_first_most(replicate, shard, context):
    sizes = dict(zip(AXES, (replicate, shard, context), strict=True))
    for rank in range(math.prod(sizes.values())):
        one = Mesh(sizes, rank)
        assert one.index(("shard", "context")) == one.index(("shard",)) * context + one.index(("context",))
    assert one.size(("shard", "context")) == shard * context and one.size() == rank + 1


@given(SIZES, SIZES, SIZES, st.sampled_from(AXES))
def test_what_is_left_goes_to_the_open_axis(replicate, shard, context, axis):
    sizes = dict(zip(AXES, (replicate, shard, context), strict=True))
    assert mesh.resolve({**sizes, axis: -1}, math.prod(sizes.values())) == sizes


@pytest.mark.parametrize(
    "wanted, processes, said",
    [
        ((1, 3, 1), 8, "parallel is replicate=1 x shard=3 x context=1: does not make up the 8 processes there are"),
        ((1, -1, 3), 8, "does not make up the 8 processes"),
        ((-1, -1, 1), 8, "parallel.shard is -1: so is parallel.replicate"),
        ((1, 0, 1), 1, "parallel.shard is 0: should be at least 1, or -1"),
    ],
)
def test_sizes_that_cannot_be(wanted, processes, said):
    with pytest.raises(UserError) as error:
        mesh.resolve(dict(zip(AXES, wanted, strict=True)), processes)
    assert said in str(error.value)


@given(SIZES, SIZES, SIZES, st.integers(1, 64))
def test_the_meshes_that_are_named_would_be(replicate, shard, context, processes):
    wanted = dict(zip(AXES, (replicate, shard, context), strict=True))
    if replicate * shard * context == processes:
        return
    with pytest.raises(UserError) as error:
        mesh.resolve(wanted, processes)
    named = str(error.value).rpartition("would: ")[2].split("; ")
    for one in named:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in one.split(","))}
        assert mesh.resolve(sizes, processes) == sizes
    if processes % (replicate * context) == 0:
        assert f"replicate={replicate},shard={processes // (replicate * context)},context={context}" in named


def test_groups_are_the_ranks_along_their_axes():
    sizes = {"replicate": 2, "shard": 1, "context": 2}
    found = ranks.run(4, rank_mesh.groups, sizes)
    assert [answer["replicate"] for answer in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [answer["shard context"] for answer in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(answer["replicate shard context"] == [0, 1, 2, 3] and answer["shard"] is None for answer in found)
    for rank, answer in enumerate(found):
        assert all(
            members is None or members[answer["places"][axes]] == rank
            for axes, members in answer.items()
            if axes != "places"
        )


def test_a_groups_limit_is_the_one_asked_for():
    said = ranks.run(4, rank_mesh.waits, 1.5)
    assert "1500ms" in said[0] and not any(said[1:])
