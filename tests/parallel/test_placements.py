"""Tables come to placements that cover each leaf once, and say what they could not do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import tree
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.parallel import placements
from flux_func.parallel.mesh import AXES, ONE, Mesh
from flux_func.train import optimizer

FSDP = (("*", {"shard": 0, "context": 0}),)
MESHES = st.builds(lambda *sizes: dict(zip(AXES, sizes, strict=True)), *[st.sampled_from([1, 2, 3, 4])] * 3)
SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=0, max_size=3).map(tuple)
ROWS = st.dictionaries(st.sampled_from(AXES), st.just(0), max_size=3) | st.dictionaries(
    st.sampled_from(AXES), st.just(1), max_size=3
)


def ranks(sizes):
    return [Mesh(sizes, rank) for rank in range(math.prod(sizes.values()))]


def place(table, shape, mesh):
    """The placement of one small leaf beside a large one that divides, so that nothing is refused."""
    leaves = {"leaf": torch.empty(shape, device="meta"), "large": torch.empty(6912, 6912, 1, device="meta")}
    return placements.resolve(table, leaves, mesh, "parallel.params")["leaf"]


@settings(deadline=None)
@given(MESHES, SHAPES, ROWS)
def test_the_parts_make_up_the_leaf(sizes, shape, row):
    leaf = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    count = torch.zeros(shape)
    for mesh in ranks(sizes):
        placement = place((("*", row),), shape, mesh)
        part = leaf[placement.local(mesh)]
        assert part.shape == placement.local_shape(mesh) and part.nbytes == placement.local_bytes(mesh)
        count[placement.local(mesh)] += 1
    split = mesh.size(placement.axes)
    assert torch.equal(count, torch.full(shape, mesh.size() / split))
    assert all(axis in row and sizes[axis] > 1 for axis in placement.axes)
    if not placement.axes and mesh.size([axis for axis in row]) > 1 and shape:
        assert (
            all(size % mesh.size([axis for axis in row]) for size in shape) and "divides no dimension" in placement.note
        )


@pytest.fixture(scope="module")
def block():
    """Small blocks, so that a part may be larger than one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placements, "BLOCK", 16)
        yield


@settings(deadline=None)
@given(sizes=MESHES, shape=SHAPES.filter(len), row=ROWS, rank=st.integers(0, 47))
def test_a_part_is_read_by_no_more_rows_than_it_is_large(block, sizes, shape, row, rank):
    mesh = Mesh(sizes, rank % math.prod(sizes.values()))
    leaf = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    placement, most = place((("*", row),), shape, mesh), []

    def rows(first, last):
        most.append((last - first) * math.prod(shape[1:]))
        return leaf[first:last]

    found = placements.read(placement, mesh, rows)
    assert torch.equal(found, leaf[placement.local(mesh)])
    assert max(most) <= max(found.numel(), math.prod(shape[1:]), 16)


def test_the_first_row_that_fits_counts():
    mesh = Mesh({"replicate": 2, "shard": 2, "context": 2})
    table = (("*.bias", {}), ("double_blocks.*", {"shard": 1}), *FSDP)
    found = placements.resolve(table, tree.flatten(flux.abstract(flux.flavor("flux-tiny"))), mesh, "parallel.params")
    assert found["double_blocks.0.img_mlp.0.bias"].axes == ()
    weight = found["double_blocks.1.img_mlp.0.weight"]
    assert (weight.axes, weight.dim, weight.local_shape(mesh)) == (("shard",), 1, (512, 64))
    assert found["img_in.weight"].axes == ("shard", "context")
    assert [str(placement) for placement in weight.torch()] == ["R", "S(1)", "R"]


def test_a_dimension_gives_way_and_the_table_says_so():
    mesh = Mesh({"replicate": 1, "shard": 4, "context": 1})
    placement = place(FSDP, (6, 8), mesh)
    assert (placement.dim, placement.local_shape(mesh)) == (1, (6, 2))
    assert placements.say(placement, mesh) == "dimension 1 over shard=4 (4 does not divide dimension 0)"
    assert placements.say(place(FSDP, (6, 3), mesh), mesh) == "repeated (4 divides no dimension)"


def test_flux_dev_divides_over_1024_processes():
    mesh = Mesh({"replicate": 16, "shard": 64, "context": 1})
    leaves = tree.flatten(flux.abstract(flux.flavor("flux-dev")))
    found = placements.resolve(FSDP, leaves, mesh, "parallel.params")
    whole = sum(leaf.nbytes for leaf in leaves.values())
    assert sum(placement.local_bytes(mesh) for placement in found.values()) * 64 == whole == 4 * 11_901_408_320
    lines = placements.describe(found, mesh)
    assert sum(size for *_, size in lines) * 64 == whole and len(lines) <= 40
    assert any(name == "single_blocks.*.linear1.weight (x38)" for name, *_ in lines)


def test_what_divides_almost_nothing_is_refused():
    mesh = Mesh({"replicate": 1, "shard": 56, "context": 1})
    leaves = tree.flatten(flux.abstract(flux.flavor("flux-dev")))
    with pytest.raises(UserError, match=r"parallel.params splits over shard=56: .*: 24, 32, 48, 64$"):
        placements.resolve(FSDP, leaves, mesh, "parallel.params")


@pytest.mark.parametrize("flavor", ["flux-debug", "flux-digits"])
def test_the_sizes_that_are_named_would_divide(flavor):
    leaves, refused = tree.flatten(flux.abstract(flux.flavor(flavor))), 0
    for size in range(2, 40):
        try:
            placements.resolve(FSDP, leaves, Mesh({"replicate": 1, "shard": size, "context": 1}), "parallel.params")
        except UserError as error:
            refused += 1
            for named in str(error).rpartition(": ")[2].split(", "):
                mesh = Mesh({"replicate": 1, "shard": int(named), "context": 1})
                placements.resolve(FSDP, leaves, mesh, "parallel.params")
    assert refused > 20


@pytest.mark.parametrize(
    "row, said",
    [
        (("*", {"expert": 0}), "there is no axis 'expert'; the mesh has replicate, shard, context"),
        (("*", {"shard": -1}), "the dimension of 'shard' is -1"),
        (("*", {"shard": 0, "context": 1}), "split different dimensions"),
        (("weights", {"shard": 0}), "its pattern fits nothing; the nearest are weight"),
        (("*", {"shard": 2}), "nothing that it fits has a dimension 2"),
        (("bias", {"shard": 1}), "nothing that it fits has a dimension 1"),
        (("*",), "should be (pattern, {axis: dimension})"),
        (("*", "shard"), "its second part should be {axis: dimension}"),
    ],
)
def test_rows_that_cannot_be(row, said):
    with pytest.raises(UserError) as error:
        placements.check((row,), {"weight": 2, "bias": 1}, "parallel.params")
    assert "parallel.params has the row" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    "opt", [optimizer.adamw(1e-3), optimizer.from_torch(torch.optim.SGD, 1e-3, momentum=0.9)], ids=["adamw", "sgd"]
)
def test_moments_are_placed_with_their_parameters(opt):
    mesh = Mesh({"replicate": 1, "shard": 4, "context": 1})
    params = flux.abstract(flux.flavor("flux-tiny"))
    flat = tree.flatten(params)
    where = placements.resolve(FSDP, flat, mesh, "parallel.params")
    state = tree.flatten({"params": params, "opt": opt.init(params), "ema": params})
    found = placements.of_state(state, where, where)
    assert found["ema.img_in.weight"] == where["img_in.weight"]
    kept = {path: place for path, place in found.items() if path.startswith("opt.") and place.shape}
    assert len(kept) % len(flat) == 0 and len(kept) >= len(flat)
    for path, placement in kept.items():
        name = next(name for name in flat if f".{name}" in path and where[name].shape == placement.shape)
        assert placement.axes == where[name].axes == ("shard",)


def test_one_process_has_everything():
    leaf = torch.ones(3, 5)
    placement = place(FSDP, (3, 5), ONE)
    assert placement.local_shape(ONE) == (3, 5) and placements.distribute(leaf, placement, ONE) is leaf
    assert np.shares_memory(placements.local(leaf).numpy(), leaf.numpy())
