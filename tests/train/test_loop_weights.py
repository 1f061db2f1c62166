"""A run that starts from weights: the model and the losses are theirs, and once it has begun it needs them no more."""

import dataclasses
import json
import shutil
import weakref

import pytest
import torch
from PIL import Image

from flux_func import sample_main, train_main, tree
from flux_func.data import pipeline, sources
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.train import checkpoint, encoders, metrics, state, step
from tests.helpers import tiny_data, tiny_pipeline, tiny_run
from tests.helpers.tiny_run import CPU, identical, losses, records, stored, train

FINETUNE = tiny_run.ROOT / "configs/flux_dev_finetune.py"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Half of a tiny run's time is curves.png."""
    monkeypatch.setattr(metrics, "draw_curves", lambda records, path: None)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipeline.whole(tmp_path_factory.mktemp("weights") / "pipe")


def fields(pipe, **more):
    """What makes of a tiny run one that starts from a pipeline, with its encoders."""
    return {
        "model.flavor": "",
        "model.init": "pretrain",
        "model.weights": str(pipe),
        "autoencoder.kind": "kl",
        "autoencoder.path": str(pipe),
        "text.kind": "hf",
        "text.path": str(pipe),
        "train.guidance": 1.0,
        **more,
    }


def their_loss(pipe, config, guidance):
    """Returns the loss of the first step's batch by diffusers' transformer, told a guidance."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(pipe / "transformer")
    cfg = flux.FluxConfig(48, 3, 2, 2, (4, 6, 6), True, vec_in_dim=24, context_in_dim=32)
    codecs = encoders.build(config, cfg, CPU)
    data = pipeline.batches(config, sources.build(config, "train"), codecs.tokenize, batch_size=2, posterior_noise=True)
    batch = step.train_batch(next(data), codecs, config, cfg, CPU)
    t = batch["timesteps"][:, None, None, None]
    noisy = (1 - t) * batch["latents"] + t * batch["noise"]
    with torch.no_grad():
        velocity = model(
            hidden_states=flux.patchify(noisy),
            timestep=batch["timesteps"],
            guidance=torch.full((2,), guidance),
            pooled_projections=batch["y"],
            encoder_hidden_states=batch["txt"],
            img_ids=flux.image_ids(4, 4)[0],
            txt_ids=torch.zeros(batch["txt"].shape[1], 3),
        ).sample
    return float((velocity - flux.patchify(batch["noise"] - batch["latents"])).square().mean())


def test_the_first_loss_is_that_of_diffusers_model_told_the_same_guidance(pipe, tmp_path):
    given = fields(pipe, **{"train.steps": 1})
    [record] = train(tmp_path, given)
    assert record["loss"] == pytest.approx(their_loss(pipe, tiny_run.config(given), 1.0), rel=1e-5)
    assert record["loss"] != pytest.approx(their_loss(pipe, tiny_run.config(given), 20.0), rel=1e-3)


def test_a_run_goes_on_without_the_weights_it_started_from(pipe, tmp_path):
    for name in ("transformer", "all"):
        shutil.copytree(pipe, tmp_path / name)
    common = fields(tmp_path / "all", **{"model.weights": str(tmp_path / "transformer"), "ema.decay": 0.5})
    whole = losses(train(tmp_path / "whole", {**common, "train.steps": 4}))
    first = losses(train(tmp_path / "parts", {**common, "train.steps": 2}))
    shutil.rmtree(tmp_path / "transformer")
    second = losses(train(tmp_path / "parts", {**common, "train.steps": 4}))
    assert first == whole[:2] and second == whole
    assert identical(stored(tmp_path / "whole", 4), stored(tmp_path / "parts", 4))
    model = checkpoint.read_model(tmp_path / "parts", 4)
    assert (model.hidden_size, model.guidance_embed, model.context_in_dim) == (48, True, 32)


def test_other_weights_do_not_join_a_run_that_has_begun(pipe, tmp_path):
    train(tmp_path / "run", fields(pipe, **{"train.steps": 1}))
    other = shutil.copytree(pipe, tmp_path / "other")
    with pytest.raises(UserError) as raised:
        train(tmp_path / "run", fields(pipe, **{"train.steps": 2, "model.weights": str(other)}))
    said = f"model.weights is '{other}', but the checkpoint in the workdir was written with '{pipe}': set it back"
    assert str(raised.value).startswith(said)


def test_a_run_starts_from_another_runs_weights(pipe, tmp_path):
    train(tmp_path / "first", fields(pipe, **{"train.steps": 2, "optimizer.lr": 1e-2}))
    given = fields(pipe, **{"model.weights": str(tmp_path / "first"), "train.steps": 1, "optimizer.lr": 0.0})
    train(tmp_path / "second", given)
    before, after = stored(tmp_path / "first", 2), stored(tmp_path / "second", 1)
    names = [name for name in before if name.startswith("params.")]
    assert names and all(torch.equal(before[name], after[name]) for name in names)


def test_the_config_for_tuning_dev_tunes_a_tiny_one_and_its_workdir_is_sampled(pipe, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, data in tiny_data.members(6).items():
        (images / name).write_bytes(data)
    given = {
        "model.weights": pipe,
        "autoencoder.path": pipe,
        "text.path": pipe,
        "data.path": images,
        "data.image_size": 16,
        "data.validation_fraction": 0.4,
        "data.workers": 0,
        "text.max_length": 8,
        "train.steps": 2,
        "validate.every": 2,
        "validate.samples": 2,
        "sample.every": 2,
        "sample.steps": 2,
        "metrics.tensorboard": False,
    }
    flags = [f"--config.{field}={value}" for field, value in given.items()]
    workdir = tmp_path / "run"
    assert tiny_run.program(train_main, f"--config={FINETUNE}", f"--workdir={workdir}", *flags) == 0
    [record] = records(workdir)
    assert record["step"] == 2 and 0 < record["loss"] < 100
    # The last checkpoint is for drawing from and for passing on: weights alone, in bfloat16.
    final = stored(workdir, 2)
    assert {leaf.dtype for leaf in final.values()} == {torch.bfloat16}
    assert {name.split(".")[0] for name in final} == {"params"}
    flags = [f"--workdir={workdir}", "--prompt=a red bird", f"--out={tmp_path / 'out'}", "--steps=2"]
    assert tiny_run.program(sample_main, *flags) == 0
    picture = Image.open(tmp_path / "out" / "000_a-red-bird.png")
    assert picture.size == (16, 16) and json.loads(picture.text["guidance"]) == 3.5
    assert json.loads(picture.text["dtype"]) == "bfloat16"


def test_weights_are_read_leaf_by_leaf(pipe):
    """What has been read is let go before the next is: beside the parameters there is a leaf at most."""
    weights = state.find_weights(str(pipe), "transformer", "model.weights")
    seen, most = [], []

    def read(name, first, last):
        rows = weights.read(name, first, last)
        seen.append(weakref.ref(rows))
        most.append(sum(ref() is not None for ref in seen))
        return rows

    params = state.read_weights(dataclasses.replace(weights, read=read), torch.bfloat16, CPU)
    assert len(seen) >= len(tree.leaves(params)) and max(most) <= 8
