"""Whole runs on meshes: what they leave is what one process leaves, and any mesh goes on where another stopped."""

import json
import math
import shutil

import pytest

from flux_func.train import checkpoint
from tests.helpers import rank_runs, rank_training, ranks, tiny_run

ONE = {"replicate": 1, "shard": 1, "context": 1}


def mesh(replicate=1, shard=1, context=1):
    return {"replicate": replicate, "shard": shard, "context": context}


def train(workdir, sizes, fields):
    """Trains on a mesh; returns the records of metrics.jsonl."""
    if sizes == ONE:
        return tiny_run.train(workdir, {**rank_training.FIELDS, **fields})
    ranks.run(math.prod(sizes.values()), rank_runs.train, str(workdir), sizes, fields)
    return tiny_run.records(workdir)


def assert_same(found, expected, loss=1e-6, norm=1e-5):
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=norm
        )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The records of ten steps on one process."""
    return train(tmp_path_factory.mktemp("unbroken"), ONE, {"train.steps": 10, "ema.decay": 0.9})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A workdir that eight processes left after six steps."""
    workdir = tmp_path_factory.mktemp("stopped") / "work"
    train(workdir, mesh(2, 2, 2), {"train.steps": 6, "ema.decay": 0.9, "checkpoint.every": 4})
    return workdir


@pytest.mark.parametrize("sizes", [mesh(shard=2, context=2), mesh(replicate=2), ONE], ids=str)
def test_another_mesh_goes_on_with_the_losses_of_the_unbroken_run(stopped, unbroken, tmp_path, sizes):
    workdir = tmp_path / "work"
    shutil.copytree(stopped, workdir)
    found = train(workdir, sizes, {"train.steps": 10, "ema.decay": 0.9})
    assert_same(found, unbroken)
    assert checkpoint.steps(workdir) == [6, 10]


def test_a_mesh_goes_on_where_one_process_stopped(unbroken, tmp_path):
    train(tmp_path, ONE, {"train.steps": 5, "ema.decay": 0.9})
    assert_same(train(tmp_path, mesh(shard=2), {"train.steps": 10, "ema.decay": 0.9}), unbroken)


NARROW = {"numerics.param": "bfloat16", "numerics.compute": "bfloat16", "optimizer.moments": "8bit"}


def test_another_mesh_goes_on_with_codes_scales_and_stochastic_rounding(tmp_path):
    fields = {**NARROW, "train.steps": 6}
    expected = train(tmp_path / "one", ONE, fields)
    train(tmp_path / "many", mesh(shard=4), {**fields, "train.steps": 3})
    found = train(tmp_path / "many", mesh(replicate=2, shard=2), fields)
    # The draws are the same; sums of gradients in another order are not, and here and there that turns a number.
    assert_same(found, expected, loss=2e-3, norm=2e-2)
    one, many = (tiny_run.stored(tmp_path / name, 6) for name in ("one", "many"))
    for path, leaf in one.items():
        assert many[path].dtype == leaf.dtype and many[path].shape == leaf.shape
        if path.startswith("params."):
            assert (many[path].double() - leaf.double()).norm() <= 5e-3 * leaf.double().norm(), path


def test_a_mesh_leaves_what_one_process_leaves(tmp_path):
    fields = {
        "train.steps": 4,
        "validate.every": 2,
        "validate.samples": 7,  # not the same number for each process
        "validate.batch_size": 2,
        "validate.images": 3,
        "sample.every": 4,
        "sample.steps": 2,
        "sample.prompts": ("a handwritten three", "a handwritten five", "a handwritten seven"),
        "metrics.tensorboard": True,
        "ema.decay": 0.9,
    }
    one, four = tmp_path / "one", tmp_path / "four"
    train(one, ONE, fields)
    train(four, mesh(2, 1, 2), fields)
    names = [
        sorted(
            str(path.relative_to(workdir))
            for path in workdir.rglob("*")
            if "tfevents" not in path.name and "checkpoints" not in str(path)
        )
        for workdir in (one, four)
    ]
    assert names[0] == names[1] and len(list(four.glob("events.out.tfevents.*"))) == 1
    assert_same(tiny_run.records(four), tiny_run.records(one))
    for a, b in zip(*(tiny_run.records(workdir, "validation_loss") for workdir in (four, one)), strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-6)
    drawn, expected = rank_runs.pictures(four), rank_runs.pictures(one)
    assert drawn.keys() == expected.keys() and len(drawn) == 3
    for name, picture in drawn.items():
        assert picture.shape == expected[name].shape and abs(picture - expected[name]).max() <= 1, name
    said = json.loads((four / "summary.json").read_text())
    assert said["processes"] == 4 and said["steps"] == 4
