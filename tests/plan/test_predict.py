"""Plans against steps that were taken, on processes that talk to each other, and counted."""

import functools
import math

import pytest
import torch

from flux_func import plan_main
from flux_func.models import flops
from flux_func.plan import devices, predict, trace
from flux_func.plan.meter import Compute, Cost, Send, Wait
from flux_func.train import moments
from tests.helpers import rank_plan, ranks

H100 = devices.DEVICES["h100"]
FSDP, HSDP = {"replicate": 1, "shard": 4, "context": 1}, {"replicate": 2, "shard": 2, "context": 1}
DDP, CP = {"replicate": 2, "shard": 1, "context": 1}, {"replicate": 1, "shard": 1, "context": 2}
FULL, TWICE = {"remat.policy": "full"}, {"train.accumulate": 2}
SELECTIVE = {"remat.policy": "selective", "remat.keep": ("attention", "single_blocks.linear1")}
LOW = {"numerics.compute": "bfloat16", "numerics.reduce": "float32"}
AHEAD, ZERO = (
    {"parallel.prefetch": 2},
    {"parallel.params": (("*", {}),), "parallel.moments": (("*", {"replicate": 0}),)},
)
LORA = {"lora.rank": 4, "lora.patterns": ("*_blocks.*",)}  # the first stage and the last have none of it
SPLIT = {**LORA, "parallel.lora": (("*", {"shard": 0}),)}
BY_FOUR = [(FSDP, {}), (FSDP, FULL), (FSDP, TWICE), (FSDP, {**FULL, **TWICE}), (FSDP, {**FULL, **LOW, **TWICE})]
BY_FOUR += [(FSDP, {**FULL, **AHEAD}), (HSDP, {}), (HSDP, {**FULL, **TWICE})]
BY_FOUR += [(FSDP, SELECTIVE), (FSDP, LORA), (HSDP, {**SPLIT, **FULL, **LOW, **TWICE})]
BY_TWO = [(DDP, {}), (DDP, {**FULL, **TWICE}), (DDP, ZERO), *((CP, {"parallel.attention": kind, **FULL}) for kind in
          ("all_gather", "ulysses", "ring")), (CP, TWICE), (CP, {**LORA, **FULL}), (DDP, {**LORA, **LOW})]  # fmt: skip


@functools.cache
def measured(world):
    """Every case, its plan, and what each process counted."""
    cases = BY_FOUR if world == 4 else BY_TWO
    counted = zip(*ranks.run(world, rank_plan.count, cases), strict=True)
    return [(case, predicted(*case), found) for case, found in zip(cases, counted, strict=True)]


def posed(sizes, fields, mesh=None, device="meta"):
    return plan_main.pose(
        plan_main.prepare(rank_plan.config(sizes, fields)), mesh or predict.Planned(sizes), torch.device(device)
    )


def predicted(sizes, fields):
    return predict.predict(posed(sizes, fields), devices.Cluster(H100, sizes))


@pytest.mark.parametrize("world", [4, 2])
def test_bytes_of_state_are_those_there_are(world):
    for case, expected, found in measured(world):
        assert {each["state"] for each in found} == {sum(expected.state.values())}, case


@pytest.mark.parametrize("world", [4, 2])
def test_bytes_sent_are_those_counted_at_the_collectives(world):
    for case, expected, found in measured(world):
        for each in found:
            assert each["sent"] == pytest.approx(dict(expected.sent)), case


@pytest.mark.parametrize("world", [4, 2])
def test_peak_of_everything_else_is_as_counted(world):
    for case, expected, found in measured(world):
        for each in found:
            assert each["working"] == pytest.approx(expected.working, rel=0.05), case


@pytest.mark.parametrize("more", [{"optimizer.moments": "8bit"}, {"optimizer.moments": "bfloat16"}, {}])
def test_narrow_states_are_as_counted(monkeypatch, more):
    # Of a GPU's memory more is taken for an update's parts than of a CPU's cache.
    monkeypatch.setattr(moments, "PART", moments.PART_CPU)
    fields = {"numerics.param": "bfloat16", "numerics.compute": "bfloat16", **more}
    expected = predicted(DDP, fields)
    for each in ranks.run(2, rank_plan.count, [(DDP, fields)]):
        assert each[0]["state"] == sum(expected.state.values())
        assert each[0]["working"] == pytest.approx(expected.working, rel=0.05)
    count = flops.parameters(posed(DDP, fields).cfg)
    most = {"8bit": 2 + 2 * (1 + 4 / 128), "bfloat16": 6, "": 6}[more.get("optimizer.moments", "")]
    assert sum(expected.state.values()) == pytest.approx(most * count, rel=0.02)


def test_no_more_stages_than_one_and_those_fetched_ahead_are_whole():
    for (_, fields), _, found in measured(4):
        assert {each["stages"] for each in found} == {1 + fields.get("parallel.prefetch", 1)}


@pytest.mark.parametrize("sizes", [FSDP, {"replicate": 1, "shard": 4, "context": 2}])
def test_a_process_has_its_share_of_parameters_and_moments(sizes):
    count, whole = math.prod(sizes.values()), predicted(dict.fromkeys(sizes, 1), {}).state
    for member, size in predicted(sizes, {}).state.items():
        assert size <= whole[member] * (1 / count + 0.02)


@pytest.mark.parametrize("sizes", [dict.fromkeys(FSDP, 1), HSDP])
def test_operations_are_those_of_the_formula(sizes):
    # Flash attention computes its scores once more on the way back, half a forward pass, which nobody asked for.
    problem = posed(sizes, {})
    image, text = 16, 8
    scores = 4 * (image + text) ** 2 * problem.cfg.hidden_size * (problem.cfg.depth + problem.cfg.depth_single_blocks)
    # And the text's second linear in the last block, which the formula counts and nobody reads, is not computed.
    unread = 3 * 2 * text * (problem.cfg.hidden_size + problem.cfg.mlp_size) * problem.cfg.hidden_size
    asked = 16 * (flops.training_flops(problem.cfg, image, text) + scores / 2 - unread)
    assert predicted(sizes, {}).operations * math.prod(sizes.values()) == pytest.approx(asked, rel=1e-9)


SOME = {"lora.rank": 4, "lora.patterns": ("double_blocks.1.*", "single_blocks.0.linear1")}


@pytest.mark.parametrize("fields", [{}, {**FULL, **LOW, **TWICE}, {**SPLIT, **LOW}, {**SOME, **FULL, **TWICE}])
@pytest.mark.parametrize("sizes", [FSDP, {"replicate": 4, "shard": 8, "context": 2}])
def test_a_trace_of_the_fold_is_as_planned(sizes, fields):
    given = {**fields, "train.batch_size": 128}
    expected = predicted(sizes, given)
    with trace.processes(sizes) as mesh:
        found = trace.trace(posed(sizes, given, mesh, "cpu"))
    assert found.state == sum(expected.state.values())
    assert found.sent == pytest.approx(dict(expected.sent))
    assert found.working == pytest.approx(expected.working, rel=0.02)


def test_time_is_of_what_cannot_be_hidden():
    class Slow(devices.Cluster):
        def seconds(self, kind, axes, sent):
            return sent / 1e9

    sent = Send(1, "all_gather", "shard", 2e9)
    player = predict.Player(Slow(H100, FSDP))
    for step in (
        predict.Step("a", Cost(10, 30, (Compute(1.0, 5.0), sent)), "x"),
        predict.Step("b", Cost(-4, 8, (Compute(0.5, 1.0),))),
        predict.Step("a", Cost(0, 2, (Wait(1),)), "x"),
    ):
        player.play(step)
    assert (player.compute, player.exposed, player.communication, player.operations) == (1.5, 1.5, 2.0, 6.0)
    assert player.highest == {"a": 30}
    assert player.sent == {("all_gather", "shard"): 2e9}


def test_collectives_of_one_group_wait_for_each_other_and_those_of_two_do_not():
    class Slow(devices.Cluster):
        def seconds(self, kind, axes, sent):
            return sent

    def time(groups):
        player = predict.Player(Slow(H100, HSDP))
        sends = [Send(place, "all_gather", group, 1.0) for place, group in enumerate(groups)]
        player.play(predict.Step("a", Cost(0, 0, (*sends, *(Wait(place) for place in range(len(groups)))))))
        return player.exposed

    assert time(["shard", "shard"]) == 2
    assert time(["shard", "replicate"]) == 1
