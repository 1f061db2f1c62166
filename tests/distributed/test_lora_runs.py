"""Runs that train a LoRA on meshes: what they leave is what one process leaves, wherever base and LoRA are."""

import math

import numpy as np
import pytest

from tests.helpers import rank_runs, rank_training, ranks, tiny_run

ONE = {"replicate": 1, "shard": 1, "context": 1}
FIELDS = {
    "lora.rank": 4,
    "lora.patterns": ("*_blocks.*",),  # the first stage and the last have none of it
    "optimizer.lr": 1e-2,
    "train.steps": 6,
    "ema.decay": 0.9,
    "checkpoint.every": 3,
    "validate.every": 6,
    "validate.samples": 8,
    "sample.every": 6,
    "sample.prompts": ("a handwritten two", "a handwritten nine", "a handwritten one"),
    "sample.steps": 2,
}
SPLIT = {"parallel.lora": (("*", {"shard": 0}),)}


def train(workdir, sizes, fields):
    """Trains on a mesh; returns the records of losses, and of validation."""
    fields = {**FIELDS, **fields}
    if sizes == ONE:
        tiny_run.train(workdir, {**rank_training.FIELDS, **fields})
    else:
        ranks.run(math.prod(sizes.values()), rank_runs.train, str(workdir), sizes, fields)
    return tiny_run.records(workdir), tiny_run.records(workdir, "validation_loss")


def assert_same(found, expected):
    (steps, validated), (steps_alone, validated_alone) = found, expected
    assert [record["step"] for record in steps] == [record["step"] for record in steps_alone]
    for a, b in zip(steps, steps_alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for a, b in zip(validated, validated_alone, strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one process: its folder and its records."""
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, train(workdir, ONE, {})


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ({"shard": 2}, {}),
        ({"shard": 2}, {**SPLIT, "remat.policy": "full", "train.accumulate": 2, "parallel.prefetch": 2}),
        ({"replicate": 2}, {"parallel.params": (("*", {}),), "train.accumulate": 2}),
        ({"shard": 2, "context": 2}, {"parallel.attention": "ulysses", "parallel.lora": (("*", {"context": 1}),)}),
    ],
)
def test_any_mesh_trains_the_same(alone, tmp_path, sizes, fields):
    assert_same(train(tmp_path, {**ONE, **sizes}, fields), alone[1])
    found, expected = rank_runs.pictures(tmp_path), rank_runs.pictures(alone[0])
    assert found.keys() == expected.keys() and found
    assert all(np.abs(found[name] - expected[name]).max() <= 2 for name in expected)


def test_another_mesh_goes_on(alone, tmp_path):
    train(tmp_path, {**ONE, "shard": 2}, {**SPLIT, "train.steps": 3, "validate.every": 0, "sample.every": 0})
    assert_same(train(tmp_path, ONE, {}), alone[1])
