"""What is gathered, reduced and split is the whole again, in order, and no more of it than asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import config as configs
from flux_func import tree
from flux_func.errors import UserError
from flux_func.flow import path
from flux_func.models import flux
from flux_func.models.stages import fold
from flux_func.parallel import sharding
from flux_func.parallel.mesh import AXES, ONE, Mesh
from flux_func.parallel.placements import Placement
from flux_func.parallel.sharding import Sharding, Stream
from tests.helpers import tiny_batch

TINY = flux.flavor("flux-tiny")
CPU = torch.device("cpu")


def mesh(replicate=1, shard=1, context=1, rank=0):
    return Mesh(dict(zip(AXES, (replicate, shard, context), strict=True)), rank)


def from_config(fields, made):
    config = configs.default()
    config.update_from_flattened_dict({f"parallel.{name}": value for name, value in fields.items()})
    return sharding.from_config(config, flux.abstract(TINY), made, torch.bfloat16, torch.float32, CPU)


class Watched(Sharding):
    """A sharding that notes when a visit's gather starts and when it is waited for."""

    def start_gather(self, select, params):
        object.__setattr__(self, "log", [*getattr(self, "log", []), ("start", select(params))])

        def finish():
            self.log.append(("take", select(params)))
            return select(params)

        return finish


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_stream_starts_so_many_ahead_and_each_visit_once(prefetch):
    params = dict(zip("abcde", range(5), strict=True))
    visits = [lambda tree, key=key: tree[key] for key in params]
    watched = Watched(prefetch=prefetch)
    stream = Stream(watched, params, [*visits, *reversed(visits)])
    assert not getattr(watched, "log", [])
    for turn, expected in enumerate([0, 1, 2, 3, 4, 4, 3, 2, 1, 0]):
        assert stream.take() == expected
        started = [what for what, _ in watched.log].count("start")
        taken = [what for what, _ in watched.log].count("take")
        # The last stage forward is the first backward, and gathered once.
        visited = turn + 1 - (turn >= 5)
        ahead = min(turn + prefetch, 9) + 1
        assert taken == visited and started == ahead - (ahead > 5), (turn, watched.log)


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=3), st.integers(0, 2), st.sampled_from([1, 2]))
def test_pieces_and_assembly_are_each_others_inverse(shape, dim, count):
    dim %= len(shape)
    shape[dim] *= count
    leaf = torch.arange(math.prod(shape)).reshape(shape)
    place = Placement(tuple(shape), leaf.dtype, ("shard",) if count > 1 else (), dim)
    rows = sharding._pieces(leaf, place, mesh(shard=count))
    for rank in range(count):
        one = mesh(shard=count, rank=rank)
        assert torch.equal(rows[rank], leaf[place.local(one)].reshape(-1))
    assert torch.equal(sharding._assemble(rows, place.local_shape(one), place), leaf)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4, 6]), st.sampled_from([4, 8]))
def test_processes_of_a_context_have_each_token_once(context, height, text):
    if height % 2 or (height * 8 // 4) % context or text % context:
        return
    batch = tiny_batch.batch(2, height, 8, text)
    carry, const = path.inputs(TINY, batch)
    parts = [from_config({}, mesh(context=context, rank=rank)).split(carry, const) for rank in range(context)]
    for name, dim in (("img", 1), ("txt", 1)):
        assert torch.equal(torch.cat([part[name] for part, _ in parts], dim), carry[name])
    assert torch.equal(torch.cat([part["target"] for _, part in parts], 1), const["target"])
    for i in (0, 1):
        texts = [part["rope"][i][:, :, : part["text_length"]] for _, part in parts]
        images = [part["rope"][i][:, :, part["text_length"] :] for _, part in parts]
        assert torch.equal(torch.cat([*texts, *images], 2), const["rope"][i])
    for part, rest in parts:
        assert torch.equal(part["y"], carry["y"]) and rest["text_length"] == part["txt"].shape[1]


@pytest.mark.parametrize(
    "fields, sizes, repeats",
    [
        ({}, (2, 2, 2), 1),
        ({"batch": (("*", {"shard": 0}),)}, (2, 2, 2), 2),
        ({"activations": ()}, (2, 2, 2), 2),
        ({"activations": (), "batch": ()}, (2, 2, 2), 8),
    ],
)
def test_what_is_split_over_no_axis_is_counted(fields, sizes, repeats):
    assert from_config(fields, mesh(*sizes)).repeats == repeats


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"params": (("*", {"rows": 0}),)}, "parallel.params has the row"),
        ({"moments": (("*", {}),)}, "parallel.moments has"),
        ({"moments": (("*", {"shard": 1}),)}, "parallel.moments has"),
        ({"batch": (("txt", {}), ("*", {"shard": 0}))}, "parallel.batch has txt as {}"),
        ({"batch": (("*", {"shard": 1}),)}, "parallel.batch has the row ('*', {'shard': 1}): nothing that it fits has"),
        ({"batch": (("noize", {"shard": 0}),)}, "its pattern fits nothing; the nearest are noise"),
        (
            {"batch": (("*", {"shard": 0, "context": 0}),)},
            "parallel.batch splits samples over context=2, and",
        ),
        ({"activations": (("image", {"context": 1}),)}, "parallel.activations has the row ('image', {'context': 1})"),
        ({"activations": (("img", {}), ("rope", {"context": 2}), ("*", {"context": 1}))}, "parallel.activations has"),
        ({"activations": (("*", {"shard": 1}),)}, "parallel.activations has img as {'shard': 1}"),
    ],
)
def test_tables_that_cannot_be_honoured(fields, said):
    with pytest.raises(UserError) as error:
        from_config(fields, mesh(2, 2, 2))
    assert said in str(error.value)


def test_one_process_changes_types_alone():
    made, params = from_config({}, ONE), flux.init(TINY)
    stages = [stage for stage in flux.chain(TINY) if stage.keys]
    whole = made.start_gather(stages[1].select, params)()
    assert {leaf.dtype for leaf in tree.leaves(whole)} == {torch.bfloat16}
    tree.map(
        lambda found, leaf: torch.testing.assert_close(found, leaf.bfloat16(), rtol=0, atol=0),
        whole,
        params["double_blocks"][0],
    )
    with pytest.raises(StopIteration) as done:
        next(made.reduction(stages[1].select, made.to_reduce(whole)))
    assert {leaf.dtype for leaf in tree.leaves(done.value.value)} == {torch.float32}
    kept = Sharding().start_gather(stages[1].select, params)()
    assert all(a is b for a, b in zip(tree.leaves(kept), tree.leaves(params["double_blocks"][0]), strict=True))


def test_a_forward_pass_gathers_what_it_computes_with():
    params = flux.init(TINY, scheme="nonzero")
    carry, const = path.inputs(TINY, tiny_batch.batch(2))
    ops = sharding.gathering(from_config({}, ONE), params, flux.chain(TINY))
    for _ in range(2):
        found = fold(flux.chain(TINY), params, carry, const, ops)["img"]
        lower = tree.map(lambda leaf: leaf.bfloat16(), params)
        assert torch.equal(found, fold(flux.chain(TINY), lower, carry, const, flux.Ops())["img"])
