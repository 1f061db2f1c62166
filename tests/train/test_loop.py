"""Runs as a whole, in this process: what they leave behind, and what they do with the data."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flux_func import config as configs
from flux_func import random, tree
from flux_func.data import images as pictures
from flux_func.errors import UserError
from flux_func.models import flops, flux
from flux_func.train import checkpoint, encoders, generate, loop, metrics, state
from flux_func.train import step as steps
from flux_func.train import workdir as workdirs
from tests.helpers import tiny_data, tiny_run
from tests.helpers.tiny_run import CPU, identical, losses, records, stored, train

PROMPTS = ("a three", "a four")
FULL = {
    "train.steps": 4,
    "data.image_size": 48,
    "sample.every": 2,
    "sample.steps": 1,
    "sample.prompts": PROMPTS,
    "validate.every": 2,
    "validate.samples": 9,
    "validate.batch_size": 4,
    "validate.images": 3,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 2,
    "metrics.peak_tflops": 2.0,
    "metrics.tensorboard": True,
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The workdir of a run with everything in it."""
    workdir = tmp_path_factory.mktemp("loop") / "deep" / "run"
    train(workdir, FULL)
    return workdir


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Half of a tiny run's time is curves.png: `full` has one, and tests/train/test_curves.py looks at many."""
    if "full" not in request.fixturenames:
        monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)


# What is left behind


def test_a_workdir_is_as_designed_and_no_more(full):
    names = sorted(re.sub(r"(tfevents).*", r"\1", path.name) for path in full.iterdir())
    assert names == [
        "checkpoints",
        "config.json",
        "curves.png",
        "events.out.tfevents",
        "metrics.jsonl",
        "samples",
        "summary.json",
    ]
    assert checkpoint.steps(full) == [3, 4]
    drawn = [f"{kind}_{step:06d}.png" for kind in ("step", "validation") for step in (2, 4)]
    assert sorted(path.name for path in (full / "samples").iterdir()) == sorted(drawn)


def test_metrics_have_each_step_once_with_the_fixed_fields(full):
    lines = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    training, validation = records(full), records(full, "validation_loss")
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert [record["step"] for record in validation] == [2, 4]
    assert len(lines) == 6 and [record["step"] for record in lines] == [1, 2, 2, 3, 4, 4]
    assert all(tuple(record) == ("step", *metrics.TRAINING) for record in training)
    assert all(tuple(record) == ("step", *metrics.VALIDATION) for record in validation)
    flop = flops.training_flops(flux.flavor("flux-tiny"), 9, 4) / 1e12
    for record in training:
        assert record["lr"] == 1e-4 and record["samples_skipped"] == 0
        assert record["tokens_per_s"] == pytest.approx(record["images_per_s"] * 13)
        assert record["tflops"] == pytest.approx(record["images_per_s"] * flop)
        assert record["mfu"] == pytest.approx(record["tflops"] / 2)
        assert record["data_wait_s"] >= 0 and record["peak_memory_gib"] > 0
    shown = EventAccumulator(str(full)).Reload()
    assert [event.value for event in shown.Scalars("train/loss")] == pytest.approx([r["loss"] for r in training])
    assert [event.step for event in shown.Scalars("validation/loss")] == [2, 4]
    computed = [event.value for event in shown.Scalars("train/time_share/compute")]
    assert computed == pytest.approx([record["time_share"]["compute"] for record in training])


def test_config_and_summary_say_what_was_run(full):
    assert json.loads((full / "config.json").read_text()) == loop.to_json(tiny_run.config(FULL))
    assert checkpoint.read_config(full, 4) == loop.to_json(tiny_run.config(FULL))
    summary = json.loads((full / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["final_loss"] == records(full)[-1]["loss"]
    assert summary["last_validation_loss"] == records(full, "validation_loss")[-1]["validation_loss"]
    assert summary["parameters"] == sum(leaf.numel() for leaf in tree.leaves(flux.abstract(flux.flavor("flux-tiny"))))


def test_grids_are_the_checkpoints_pictures_in_the_runs_size(full):
    config = tiny_run.config(FULL)
    cfg = state.model_config(config)
    codecs = encoders.build(config, cfg, CPU)
    params = checkpoint.restore(full, 4, {"params": flux.abstract(cfg)})["params"]
    source = loop.sources.build(config, "validation")
    held_out = [source[i][1] for i in range(3)]
    for name, prompts in (("step", PROMPTS), ("validation", held_out)):
        drawn = generate.generate(params, cfg, codecs, prompts, seed=0, height=48, width=48, steps=1)
        assert drawn.shape[1:] == (3, 48, 48)
        expected = np.asarray(pictures.grid(drawn.numpy(), prompts)).astype(int)
        found = np.asarray(Image.open(full / "samples" / f"{name}_000004.png")).astype(int)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 1
    # One does not stand over another's picture.
    one, other = (full / "samples" / f"step_{step:06d}.png" for step in (2, 4))
    assert one.read_bytes() != other.read_bytes()


def test_without_prompts_the_grid_is_of_the_first_held_out_captions(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "draw", lambda run, current, texts, name: seen.append((texts, name)))
    train(tmp_path, {"train.steps": 1, "sample.every": 1})
    source = loop.sources.build(tiny_run.config(), "validation")
    assert seen == [([source[i][1] for i in range(4)], "step_000001.png")]


def test_lines_are_written_when_due_and_at_the_end(tmp_path):
    train(tmp_path / "some", {"train.steps": 5, "log.every": 2})
    assert [record["step"] for record in records(tmp_path / "some")] == [2, 4, 5]
    train(tmp_path / "last", {"train.steps": 3, "log.every": 0, "metrics.tensorboard": False})
    assert [record["step"] for record in records(tmp_path / "last")] == [3]
    assert not list((tmp_path / "last").glob("events*"))


def test_validation_and_grids_are_of_the_average_where_it_is_kept(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "draw", lambda run, current, texts, name: None)
    monkeypatch.setattr(
        loop.validate, "run", lambda params, *args, **kwargs: seen.append(params) or {"validation_loss": 1.0}
    )
    train(tmp_path, {"train.steps": 1, "validate.every": 1, "ema.decay": 0.5})
    kept, given = stored(tmp_path, 1), tree.flatten({"ema": seen[0]})
    assert all(torch.equal(leaf, kept[path]) for path, leaf in given.items())
    assert not torch.equal(kept["ema.img_in.weight"], kept["params.img_in.weight"])


def test_validation_and_grids_are_by_the_kernel_that_is_named(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "draw", lambda run, current, texts, name: None)
    monkeypatch.setattr(loop.validate, "run", lambda *args, ops, **kwargs: seen.append(ops) or {"validation_loss": 1.0})
    train(tmp_path, {"train.steps": 1, "validate.every": 1, "kernels.attention": "math"})
    assert [ops.attention.keywords for ops in seen] == [{"kernel": "math"}]


WEIGHTS_AT_THE_END = {"checkpoint.every": 0, "checkpoint.last_weights_only": True}


@pytest.mark.parametrize(
    "fields, held, each",
    [
        ({"checkpoint.every": 2, "checkpoint.keep_last": 1}, 2, 12),  # of steps 2 and 4: there is none of step 0
        ({"checkpoint.every": 4, "checkpoint.keep_last": 1}, 1, 12),
        (WEIGHTS_AT_THE_END, 1, 4),
        ({**WEIGHTS_AT_THE_END, "checkpoint.export_dtype": "bfloat16"}, 1, 2),
    ],
    ids=str,
)
def test_room_is_asked_for_what_will_be_written(tmp_path, monkeypatch, fields, held, each):
    asked = []
    monkeypatch.setattr(loop.workdirs, "check_room", lambda *args: asked.append(args))
    train(tmp_path, fields)
    _, size, upcoming, keep_last, keep_every = asked[0]
    assert workdirs._most_held(upcoming, keep_last, keep_every) == held
    assert round(size / flops.parameters(flux.flavor("flux-tiny"))) == each


def test_a_checkpoint_that_another_run_saved_meanwhile_is_not_gone_back_behind(tmp_path, monkeypatch):
    train(tmp_path)
    begin = loop.begin

    def late(*args):
        monkeypatch.setattr(loop.checkpoint, "latest", lambda workdir: 5)
        return begin(*args)

    monkeypatch.setattr(loop, "begin", late)
    before = tiny_run.snapshot(tmp_path)
    with pytest.raises(UserError, match="another run saved a checkpoint there meanwhile; start again"):
        train(tmp_path, {"train.steps": 6})
    assert tiny_run.snapshot(tmp_path) == before


def test_validation_takes_no_part_in_training(tmp_path):
    plain = train(tmp_path / "plain")
    busy = {"validate.every": 1, "validate.samples": 4, "sample.every": 1, "sample.steps": 1, "validate.images": 1}
    assert losses(train(tmp_path / "busy", {**busy, "checkpoint.every": 1})) == losses(plain)
    assert identical(stored(tmp_path / "plain", 4), stored(tmp_path / "busy", 4))


def test_weights_only_at_the_end_in_the_type_asked_for(tmp_path):
    fields = {"checkpoint.last_weights_only": True, "checkpoint.export_dtype": "bfloat16", "ema.decay": 0.5}
    train(tmp_path / "weights", {**fields, "checkpoint.every": 3})
    train(tmp_path / "whole", {"ema.decay": 0.5})
    kept, whole = stored(tmp_path / "weights", 4), stored(tmp_path / "whole", 4)
    assert kept.keys() == {path for path in whole if not path.startswith("opt.")}
    assert all(torch.equal(leaf, whole[path].bfloat16()) for path, leaf in kept.items())
    assert "opt" in checkpoint.abstract(tmp_path / "weights", 3)
    with pytest.raises(UserError, match="holds weights only"):
        train(tmp_path / "weights", {**fields, "checkpoint.every": 3, "train.steps": 6})


def test_the_rate_written_is_that_of_the_step(tmp_path):
    fields = {"optimizer.warmup_steps": 3, "optimizer.schedule": "linear", "optimizer.decay_steps": 5}
    train(tmp_path, {**fields, "train.steps": 2})
    rates = [record["lr"] for record in train(tmp_path, {**fields, "train.steps": 5})]
    assert rates == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 5e-5, 0])


# Data


def test_every_step_has_the_whole_batch_of_its_own_positions(tmp_path, monkeypatch):
    seen, taken = {}, steps.train_step

    def watching(current, batch, step, **given):
        seen.setdefault(step, []).append((batch["position"].tolist(), [hash(x.tobytes()) for x in batch["noise"]]))
        return taken(current, batch, step, **given)

    monkeypatch.setattr(steps, "train_step", watching)
    train(tmp_path, {"train.batch_size": 3, "train.steps": 2})
    train(tmp_path, {"train.batch_size": 3, "train.steps": 5})
    assert [[p for p, _ in seen[step]] for step in sorted(seen)] == [[list(range(3 * i, 3 * i + 3))] for i in range(5)]
    draws = [draw for step in seen.values() for _, noise in step for draw in noise]
    assert len(set(draws)) == 15
    assert draws[0] == hash(random.normal(0, "noise", 0, (16, 4, 4)).tobytes())


def write_folder(root, count, broken=()):
    root.mkdir()
    for name, data in tiny_data.members(count).items():
        (root / name).write_bytes(b"no image" if name.endswith(".png") and int(name[:3]) in broken else data)
    return {"data.source": "folder", "data.path": str(root), "data.image_size": 16, "data.validation_fraction": 0.25}


def test_a_broken_image_is_replaced_counted_and_named(tmp_path, capsys):
    fields = {**write_folder(tmp_path / "data", 8, broken=[3]), "train.steps": 8}
    parts = {
        index: loop.sources.build(tiny_run.config(fields), split)
        for index, split in enumerate(configs.CHOICES["data.split"])
    }
    split = "train" if "003.png" in [parts[0].name(i) for i in range(len(parts[0]))] else "validation"
    fields |= {"data.split": split, "validate.split": split, "validate.every": 8, "validate.samples": len(parts[0])}
    found = train(tmp_path / "run", fields)
    counts, said = [record["samples_skipped"] for record in found], capsys.readouterr().out.splitlines()
    named = [line for line in said if "a sample was replaced" in line]
    training = [line for line in named if line.startswith("step ")]
    assert counts == sorted(counts) and counts[-1] == len(training) > 0
    assert all(re.fullmatch(r"step \d+: a sample was replaced: 003.png: not an image", line) for line in training)
    assert "validation: a sample was replaced: 003.png: not an image" in named
    assert np.isfinite([record["loss"] for record in found]).all()
    # The count goes on over a resume.
    more = train(tmp_path / "run", {**fields, "train.steps": 9})
    assert more[-1]["samples_skipped"] >= counts[-1]
    assert json.loads((tmp_path / "run/summary.json").read_text())["samples_skipped"] == more[-1]["samples_skipped"]


def test_a_source_in_which_all_is_broken_stops_with_an_error_that_says_so(tmp_path):
    fields = write_folder(tmp_path / "data", 6, broken=range(6))
    with pytest.raises(
        UserError, match=r"data.path is '.*data': every sample is unusable \(.* tried\), such as 00"
    ) as error:
        train(tmp_path / "run", fields)
    assert "\n" not in str(error.value)
    assert checkpoint.steps(tmp_path / "run") == []


def test_the_data_is_closed_whatever_happens(tmp_path, monkeypatch):
    made, batches = [], loop.batches
    monkeypatch.setattr(loop, "batches", lambda run, start: made.append(batches(run, start)) or made[-1])
    train(tmp_path, {"train.steps": 1})
    monkeypatch.setattr(steps, "train_step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, {"train.steps": 2})
    # Held here, so that nothing but an explicit close has ended them.
    assert [data.gi_frame for data in made] == [None, None]


def test_one_run_at_a_time_writes_in_a_workdir(tmp_path):
    with workdirs.keeping_others_out(tmp_path / "work"):
        before = tiny_run.snapshot(tmp_path / "work")
        with pytest.raises(UserError, match="another run is writing there; wait for it, or name another --workdir"):
            train(tmp_path / "work")
        assert tiny_run.snapshot(tmp_path / "work") == before
    assert len(train(tmp_path / "work")) == 4
