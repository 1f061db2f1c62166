"""What is measured once for each kind of stage, against the fold over all of them."""

import pytest
import torch

from flux_func import plan_main, tree
from flux_func.models import flux
from flux_func.plan import costs, devices, predict
from flux_func.plan.meter import Meter, Send
from tests.helpers import rank_plan

SIZES = {"replicate": 2, "shard": 4, "context": 1}


def measured(fields=None, sizes=SIZES):
    problem = plan_main.pose(
        plan_main.prepare(rank_plan.config(sizes, fields or {})), predict.Planned(sizes), torch.device("meta")
    )
    meter = Meter(devices.DEVICES["h100"])
    return problem, costs.measure(problem, predict.parts(problem.state, problem.sharding.mesh)["params"], meter, {})


def test_units_are_stages_with_those_without_parameters_after_them():
    cfg = flux.flavor("flux-tiny")
    assert [costs.kind(unit, flux.abstract(cfg))[0] for unit in costs.units(cfg).values()] == [
        ("stem",),
        ("double_block",),
        ("double_block", "join"),
        ("single_block",),
        ("last_block",),
        ("head", "loss"),
    ]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_what_is_gathered_and_given_back(compute):
    problem, found = measured({"numerics.compute": str(compute).removeprefix("torch.")})
    params = flux.abstract(problem.cfg)
    for unit in costs.units(problem.cfg).values():
        count = sum(leaf.numel() for leaf in tree.leaves(unit[0].select(params)))
        kind = costs.kind(unit, params)
        moving, stage = found.moving[kind], found.stages[kind]
        assert moving.whole == stage.grads == count * compute.itemsize
        (gather,) = [event for event in moving.start.events if isinstance(event, Send)]
        assert (gather.kind, gather.group, gather.sent) == ("all_gather", "shard", count * compute.itemsize * 3 / 4)
        sends = [[event for event in step.events if isinstance(event, Send)] for step in moving.reduce]
        assert [[(send.kind, send.group, send.sent) for send in step] for step in sends] == [
            [("reduce_scatter", "shard", count * 4 * 3 / 4)],
            [("all_reduce", "replicate", count / 4 * 4)],
            [],
        ]
        assert sum(step.kept for step in moving.reduce) == count  # a quarter of float32
        assert moving.cast.kept == (0 if compute == torch.float32 else count * 4)
    assert found.cast == (compute != torch.float32) and not found.alias


def test_recomputation_keeps_less_and_computes_more():
    plain, full = measured()[1], measured({"remat.policy": "full"})[1]
    for kind, stage in plain.stages.items():
        again = full.stages[kind]
        assert again.forward.kept < stage.forward.kept
        assert again.forward.operations == stage.forward.operations
        assert again.backward.operations == stage.backward.operations + stage.forward.operations


def test_what_is_kept_of_flux_debug_under_recomputation_is_little():
    alone = dict.fromkeys(SIZES, 1)
    real = {"model.flavor": "flux-debug", "data.image_size": 256, "text.max_length": 256, "train.batch_size": 8}

    def kept(policy):
        problem, found = measured({**real, "remat.policy": policy}, alone)
        params = flux.abstract(problem.cfg)
        units = costs.units(problem.cfg).values()
        return sum(found.stages[costs.kind(unit, params)].forward.kept for unit in units)

    none, selective, full = (kept(policy) for policy in ("none", "selective", "full"))
    assert full <= 0.15 * none and full < selective <= 0.15 * none


def test_alone_nothing_is_sent_and_gradients_are_handed_back():
    _, found = measured(sizes=dict.fromkeys(SIZES, 1))
    assert found.alias
    for moving in found.moving.values():
        assert (moving.whole, len(moving.reduce), moving.reduce[0].kept) == (0, 1, 0)
        assert not moving.start.events and not moving.finish.events
