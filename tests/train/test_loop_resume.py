"""A resumed run is one that never stopped: bit for bit, from wherever it was left."""

import itertools
import json

import pytest

from flux_func.errors import UserError
from flux_func.train import checkpoint, metrics
from flux_func.train import step as steps
from tests.helpers import tiny_run
from tests.helpers.tiny_run import identical, losses, records, stored, train


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Half of a tiny run's time is curves.png."""
    monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)


RUNS = {
    "adamw": {},
    "average, logit-normal, guidance": {
        "ema.decay": 0.9,
        "train.timesteps": "logit_normal",
        "train.shift": True,
        "model.guidance_embed": True,
        "optimizer.warmup_steps": 4,
    },
    "momentum, accumulation, stratified": {
        "optimizer.name": "SGD",
        "optimizer.options": "momentum=0.9, nesterov=True",
        "optimizer.lr": 1e-2,
        "train.batch_size": 4,
        "train.accumulate": 2,
        "train.timesteps": "stratified",
    },
    "bfloat16, average, cosine, recomputation": {
        "numerics.param": "bfloat16",
        "numerics.compute": "bfloat16",
        "ema.decay": 0.99,
        "optimizer.schedule": "cosine",
        "optimizer.decay_steps": 9,
        "remat.policy": "full",
    },
    "bfloat16, moments in 8 bits, Float8": {
        "numerics.param": "bfloat16",
        "numerics.compute": "bfloat16",
        "numerics.reduce": "bfloat16",
        "numerics.linear": "float8_tensorwise",
        "optimizer.moments": "8bit",
        "data.image_size": 64,
        "text.max_length": 8,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_one_that_never_stopped(tmp_path, name):
    fields = RUNS[name]
    whole = losses(train(tmp_path / "whole", {**fields, "train.steps": 6}))
    first = losses(train(tmp_path / "parts", {**fields, "train.steps": 2}))
    second = losses(train(tmp_path / "parts", {**fields, "train.steps": 6, "checkpoint.every": 3}))
    assert [step for step, *_ in whole] == [1, 2, 3, 4, 5, 6] and first == whole[:2] and second == whole
    assert len({loss for _, loss, _ in whole}) == 6
    assert identical(stored(tmp_path / "whole", 6), stored(tmp_path / "parts", 6))
    assert checkpoint.steps(tmp_path / "parts") == [3, 6]


def test_worker_processes_and_resuming_change_nothing(tmp_path):
    fields = {"train.steps": 4, "data.prompt_dropout": 0.5}
    whole = losses(train(tmp_path / "whole", fields))
    train(tmp_path / "parts", {**fields, "train.steps": 1})
    assert losses(train(tmp_path / "parts", {**fields, "data.workers": 1})) == whole
    assert identical(stored(tmp_path / "whole", 4), stored(tmp_path / "parts", 4))


def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(tmp_path, capsys):
    whole = losses(train(tmp_path / "whole", {"log.every": 2}))
    calls = itertools.count()
    train(tmp_path / "parts", {"log.every": 2, "checkpoint.every": 3}, stop=lambda: "SIGTERM" * (next(calls) > 1))
    [step] = checkpoint.steps(tmp_path / "parts")
    said = capsys.readouterr().out
    assert 0 < step < 4
    assert f"stopped by SIGTERM after step {step} of 4; the checkpoint is saved: the same command goes on" in said
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["steps"] <= step
    rest = losses(train(tmp_path / "parts", {"log.every": 2}))
    assert [record for record in rest if record[0] % 2 == 0] == whole
    assert identical(stored(tmp_path / "whole", 4), stored(tmp_path / "parts", 4))


def test_a_run_stopped_before_its_first_step_goes_on_too(tmp_path):
    assert train(tmp_path / "parts", stop=lambda: "SIGINT") == []
    assert checkpoint.steps(tmp_path / "parts") == [0]
    assert losses(train(tmp_path / "parts")) == losses(train(tmp_path / "whole"))


def test_a_run_that_breaks_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    whole = losses(train(tmp_path / "whole", {"train.steps": 7}))
    taken = steps.train_step

    def breaking(current, batch, step, **given):
        if step == 5:
            raise RuntimeError("a power cut")
        return taken(current, batch, step, **given)

    fields = {"train.steps": 7, "checkpoint.every": 2}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a power cut"):
        patch.setattr(steps, "train_step", breaking)
        train(tmp_path / "parts", fields)
    assert losses(records(tmp_path / "parts")) == whole[:5] and checkpoint.steps(tmp_path / "parts") == [2, 4]
    assert losses(train(tmp_path / "parts", fields)) == whole
    assert identical(stored(tmp_path / "whole", 7), stored(tmp_path / "parts", 7))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    before = losses(train(tmp_path))
    there = tiny_run.snapshot(tmp_path / "checkpoints")
    assert losses(train(tmp_path)) == before and tiny_run.snapshot(tmp_path / "checkpoints") == there


def test_fewer_steps_than_were_taken_are_refused_and_nothing_is_touched(tmp_path):
    train(tmp_path)
    before = tiny_run.snapshot(tmp_path)
    with pytest.raises(UserError, match="train.steps is 3: should be at least 4, the step of the checkpoint"):
        train(tmp_path, {"train.steps": 3})
    assert tiny_run.snapshot(tmp_path) == before
