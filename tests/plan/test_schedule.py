import pytest
import torch

from flux_func.models import flux
from flux_func.parallel.sharding import Sharding
from flux_func.plan import costs, predict, schedule

TINY = flux.flavor("flux-tiny")
UNITS = costs.units(TINY)
STAGES = ["stem", "double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "head"]


def recorded(turns=1, prefetch=1, cast=False, steps=3):
    sharding = Sharding(predict.Planned({"replicate": 1, "shard": 2, "context": 1}), prefetch=prefetch)
    params = flux.abstract(TINY)
    recorder = schedule.recorder(
        sharding,
        parts={name: unit[0].select(params) for name, unit in UNITS.items()},
        cast=cast,
        steps=dict.fromkeys(UNITS, steps),
    )
    batch = dict(latents=torch.empty(1, 16, 4, 4, device="meta"), noise=torch.empty(1, 16, 4, 4, device="meta"))
    batch |= dict(timesteps=torch.empty(1, device="meta"), txt=torch.empty(1, 4, 4096, device="meta"))
    schedule.record(TINY, params, {**batch, "y": torch.empty(1, 768, device="meta")}, recorder, turns)
    return recorder.log


def stages(log, what):
    return [action.stage for action in log if action.what == what]


def test_stages_there_and_back():
    log = recorded()
    assert list(UNITS) == STAGES
    assert stages(log, "forward") == STAGES
    assert stages(log, "backward") == STAGES[::-1]
    # The head is not gathered anew on the way back.
    assert stages(log, "start") == stages(log, "gather") == STAGES + STAGES[-2::-1]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_what_is_fetched_ahead(prefetch):
    alive, most = 0, 0
    for action in recorded(prefetch=prefetch):
        alive += {"start": 1, "release": -1}.get(action.what, 0)
        most = max(most, alive)
    assert (alive, most) == (0, 1 + prefetch)


def test_parameters_are_let_go_of_after_their_stage():
    log = recorded()
    for stage in STAGES[:-1]:
        own = [action.what for action in log if action.stage == stage and action.what in ("forward", "release")]
        assert own == ["forward", "release", "release"]


def test_sums_are_one_step_behind():
    log = [action for action in recorded() if action.what in ("backward", "reduce")]
    assert [(action.what, action.stage, action.step) for action in log[:6]] == [
        ("backward", "head", 0),
        ("reduce", "head", 0),
        ("backward", "single_blocks.1", 0),
        ("reduce", "head", 1),
        ("reduce", "single_blocks.1", 0),
        ("backward", "single_blocks.0", 0),
    ]
    assert len(stages(log, "reduce")) == 3 * len(STAGES)


def test_gradients_of_micro_batches_are_kept_until_the_last():
    log = recorded(turns=2, cast=True)
    turns = [place for place, action in enumerate(log) if action.what == "turn"]
    first, last = log[: turns[1]], log[turns[1] :]
    assert not stages(first, "reduce") and not stages(first, "drop_cast")
    assert stages(first, "cast") == stages(first, "drop") == STAGES[::-1]
    assert sorted(stages(last, "drop_cast")) == sorted(2 * STAGES)


def test_log_is_the_same_again():
    assert recorded(turns=2) == recorded(turns=2)
