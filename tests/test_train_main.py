"""The program, on every kind of data and encoder: from training to sampled pictures."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flux_func import config as configs
from flux_func import sample_main, train_main
from flux_func.data import images, sources
from flux_func.train import checkpoint, origin
from tests.helpers import tiny_data, tiny_pipeline, tiny_run
from tests.helpers.tiny_run import records

DRAWN = {"sample.every": 1, "sample.steps": 1, "validate.every": 1, "validate.samples": 2, "validate.images": 2}
PROMPT = "a photograph of a red bird"


def check_run_through(workdir, fields, size):
    """Trains a step, which draws and validates, and samples from its checkpoint; checks every picture's size."""
    fields = {"train.steps": 1, "data.image_size": size, **DRAWN, **fields}
    assert tiny_run.program(train_main, *tiny_run.arguments(workdir, fields)) == 0
    [training], [validation] = records(workdir), records(workdir, "validation_loss")
    assert 0 < training["loss"] < 100 and 0 < validation["validation_loss"] < 100
    config = origin.read_config(str(workdir))
    source = sources.build(config, "validation")
    rows = map(source.read, source) if config.data.streaming else (source[i % len(source)] for i in range(4))
    captions = [caption for _, caption in itertools.islice(rows, 4)]
    for name, texts in (("step_000001", captions), ("validation_000001", captions[:2])):
        page = images.grid([np.zeros((3, size, size))] * len(texts), texts)
        assert Image.open(workdir / "samples" / f"{name}.png").size == page.size
    out = workdir / "out"
    assert tiny_run.program(sample_main, f"--workdir={workdir}", f"--prompt={PROMPT}", f"--out={out}") == 0
    picture = np.asarray(Image.open(out / "000_a-photograph-of-a-red-bird.png"))
    assert picture.shape == (size, size, 3) and picture.std() > 1


@pytest.mark.skipif(not tiny_data.PHOTOGRAPHS.exists(), reason=f"{tiny_data.PHOTOGRAPHS.name} is not there")
def test_photographs_from_a_tar_at_256_pixels(tmp_path):
    check_run_through(tmp_path / "run", {"data.source": "wds", "data.path": tiny_data.PHOTOGRAPHS}, 256)


def test_tars_made_here(tmp_path):
    tar = tiny_data.write_tar(tmp_path / "0000.tar", tiny_data.members(12))
    check_run_through(tmp_path / "run", {"data.source": "wds", "data.path": tar}, 16)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_data_set_on_disk(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    pictures = [tiny_data.picture(i, (40, 36)) for i in range(6)]
    table = datasets.Dataset.from_dict({"image": pictures, "caption": [f"caption {i}" for i in range(6)]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "rows")
    fields = {"data.source": "hf", "data.path": tmp_path / "rows", "data.validation_fraction": 0.5}
    check_run_through(tmp_path / "run", {**fields, "data.streaming": streaming}, 32)


def test_flux_autoencoder_t5_and_clip_with_random_weights(tmp_path):
    folder = tiny_pipeline.build(tmp_path / "flux", 4096, 768, layers=1, weights=False)
    text = {"text.kind": "hf", "text.path": folder, "text.random_init": True, "text.max_length": 6}
    check_run_through(tmp_path / "run", {**text, "autoencoder.kind": "kl", "autoencoder.random_init": True}, 32)


def test_guidance_average_and_precision_from_training_to_pictures(tmp_path):
    fields = {"model.guidance_embed": True, "ema.decay": 0.5, "numerics.compute": "bfloat16", "model.init": "nonzero"}
    prompts = "('a handwritten three', 'a five')"
    arguments = tiny_run.arguments(tmp_path, {**fields, "train.steps": 2, "sample.prompts": prompts, "sample.steps": 2})
    assert tiny_run.program(train_main, *arguments) == 0
    pictures = {}
    for flags in ([], ["--ema"], ["--guidance=9"], ["--cfg_scale=3"], ["--seed=1"], ["--step=2"]):
        out = tmp_path / "-".join(["out", *flags])
        assert tiny_run.program(sample_main, f"--workdir={tmp_path}", "--prompt=a five", f"--out={out}", *flags) == 0
        pictures[tuple(flags)] = (out / "grid.png").read_bytes()
    assert pictures[()] == pictures[("--step=2",)]
    assert len(set(pictures.values())) == 5


def test_bad_input_ends_the_process_with_one_line_and_exit_code_2(tmp_path):
    """Of all input this imports most, and libraries like to log when they are imported."""
    arguments = tiny_run.arguments(tmp_path / "run", {"data.source": "hf", "data.path": tmp_path / "none"})
    command = [sys.executable, "-m", "flux_func.train_main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tiny_run.ROOT)})
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"train_main.py: error: data.path is '.*/none': cannot be loaded .*\n", done.stderr), (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_every_field_of_the_workdirs_config_comes_back(tmp_path):
    arguments = tiny_run.arguments(
        tmp_path, {"train.steps": 1, "sample.prompts": "('a',)", "model.guidance_embed": True}
    )
    assert tiny_run.program(train_main, *arguments) == 0
    config = dict(configs.flat(origin.read_config(str(tmp_path))))
    assert config["sample.prompts"] == ["a"] and config["model.guidance_embed"] is True
    assert config == dict(configs.flat(checkpoint.read_config(tmp_path, 1)))


def loaded(code, names):
    """Which of these modules a fresh interpreter has loaded when `code` calls `end`."""
    end = f"def end(*_, **__): print(*(n for n in {names} if n in sys.modules), file=sys.stderr); os._exit(0)"
    command = [sys.executable, "-c", f"import atexit, os, sys\n{end}\n{code}"]
    environment = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stderr.splitlines()[-1].split()


def test_help_loads_nothing_of_what_training_needs():
    heavy = ["jax", "orbax", "grain", "transformers", "datasets", "matplotlib", "sklearn", "tensorboard", "torchao"]
    heavy += ["torch._dynamo", "torch.distributed.tensor"]
    code = "sys.argv += ['--help']\natexit.register(end)\nfrom flux_func import train_main\ntrain_main.run()"
    assert loaded(code, heavy) == []


def test_training_comes_to_its_first_step_without_what_only_others_need(tmp_path):
    heavy = ["transformers", "datasets", "matplotlib", "torchao", "wandb", "torch._dynamo"]
    ready = f"sys.argv += {tiny_run.arguments(tmp_path)}\nfrom flux_func.train import step\nstep.train_step = end"
    assert loaded(f"{ready}\nfrom flux_func import train_main\ntrain_main.run()", heavy) == []
