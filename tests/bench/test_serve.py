"""Both kinds of side in this process: they compute the same, and say truly what they hold."""

import io
import json
import mmap

import pytest
import torch
from safetensors.torch import load_file

import flux_func as ff
from flux_func import tree
from flux_func.bench import serve
from flux_func.bench.cases import Side
from flux_func.bench.serve import Work
from flux_func.interop import formats
from flux_func.models import flops
from tests.helpers import tiny_bench

PEERS = ("bfl", "diffusers")


def steps(path, peer="ours", count=3):
    work = tiny_bench.work(path, peer)
    return work, [work.step().item() for _ in range(count)]


@pytest.mark.parametrize("peer", PEERS)
def test_a_training_step_is_the_same_as_ours(peer, tmp_path):
    asked = tiny_bench.case()
    paths = tiny_bench.ask(asked, [Side("ours"), Side(peer)], tmp_path)
    ours, expected = steps(paths[0])
    theirs, found = steps(paths[1], peer)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[0] > expected[1] > expected[2]
    # The weights after three updates, too.
    layout = formats.layout(asked.cfg, peer)
    paths_of_ours = list(tree.flatten(ff.abstract(asked.cfg)))
    mine = dict(zip(paths_of_ours, list(ours.kept())[-len(paths_of_ours) :], strict=True))  # after the moments
    names = [name for name, _ in theirs_model(paths[1], peer).named_parameters()]
    for name, leaf in zip(names, theirs.kept(), strict=False):
        same = layout.tensor(name, lambda path, start, stop: mine[path][start:stop])
        assert (leaf - same).norm() <= 1e-5 * same.norm(), name
    # Weights and two moments each; what is over are counters of steps.
    numbers = flops.parameters(asked.cfg)
    for side in (ours, theirs):
        assert 0 <= sum(leaf.nbytes for leaf in side.kept()) - 12 * numbers <= 4 * len(names)


def theirs_model(path, peer):
    """The reference's model without weights, for the order of its names."""
    import importlib

    with torch.device("meta"):
        return importlib.import_module(f"with_{peer}").transformer(json.loads(path.read_text())["model"])


@pytest.mark.parametrize("work", ["forward", "sample"])
def test_without_gradients_all_are_the_same_and_weights_alone_are_kept(work, tmp_path):
    asked = tiny_bench.case(work)
    paths = tiny_bench.ask(asked, [Side("ours"), *map(Side, PEERS)], tmp_path)
    expected = by_hand(work, paths[0])
    for path, peer in zip(paths, ("ours", *PEERS), strict=True):
        side, found = steps(path, peer, 2)
        assert found == pytest.approx([expected] * 2, rel=1e-5)
        assert sum(leaf.nbytes for leaf in side.kept()) == 4 * flops.parameters(asked.cfg)


def by_hand(work, path):
    request = json.loads(path.read_text())
    params, batch = tree.unflatten(load_file(request["weights"])), load_file(request["inputs"])
    cfg = tiny_bench.case().cfg
    if work == "forward":
        return ff.loss(params, cfg, batch).item()
    given = {name: batch[name] for name in ("noise", "txt", "y")}
    return ff.sample(params, cfg, **given, steps=4, shift=False).square().mean().item()


@pytest.mark.parametrize("peer", ["ours", *PEERS])
@pytest.mark.parametrize("work", ["forward", "train_step"])
def test_in_bfloat16_it_is_near_but_not_the_same(work, peer, tmp_path):
    sides = [Side("ours"), Side(peer, "bfloat16")]
    paths = tiny_bench.ask(tiny_bench.case(work), sides, tmp_path)
    (_, [expected]), (narrow, [found]) = (steps(paths[0], count=1), steps(paths[1], peer, 1))
    assert 1e-5 < abs(found - expected) / expected < 1e-2
    assert {leaf.dtype for leaf in narrow.kept()} == {torch.float32}


def test_the_peak_is_of_what_was_there_since_it_was_reset():
    size = 2**27
    serve.reset_peak("cpu")
    before = serve.peak_bytes("cpu")
    # Pages of the system's: what torch frees, the C library may keep.
    with mmap.mmap(-1, size) as pages:
        pages[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)
    assert abs(serve.peak_bytes("cpu") - before - size) < 2**24
    serve.reset_peak("cpu")
    assert abs(serve.peak_bytes("cpu") - before) < 2**24


def test_a_line_is_a_step(tmp_path, monkeypatch):
    [path] = tiny_bench.ask(tiny_bench.case(), [Side("ours")], tmp_path)
    given = []

    def make(request, weights, inputs):
        given.extend((request["work"], set(inputs)))
        kept = torch.zeros(5)
        return Work(lambda: kept.add_(1).sum(), lambda: [kept])

    monkeypatch.setattr(serve.sys, "stdin", io.StringIO("step\nstep\n"))
    replies = io.StringIO()
    serve.serve(make, "fluxbfl", path, replies)
    ready, *answers = map(json.loads, replies.getvalue().splitlines())
    assert given == ["train_step", {"latents", "noise", "timesteps", "txt", "y"}]
    assert ready["about"]["versions"]["fluxbfl"] == "0.0.3" and ready["about"]["threads"] == torch.get_num_threads()
    assert [answer["loss"] for answer in answers] == [5, 10]
    assert all(answer["kept_bytes"] == 20 and answer["seconds"] > 0 for answer in answers)
    assert 2**26 < ready["imported_bytes"] <= answers[0]["peak_bytes"]
