import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux_func import config as configs
from flux_func import sample_main
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.train import checkpoint, encoders, generate, origin

CFG = flux.flavor("flux-tiny")
NO_FLAGS = {
    "workdir": None,
    "weights": None,
    "step": None,
    "ema": False,
    "prompt": [],
    "prompts_file": None,
    "lora": [],
    "negative_prompt": None,
    "seed": None,
    "height": None,
    "width": None,
    "steps": None,
    "guidance": None,
    "cfg_scale": None,
    "max_length": None,
    "dtype": None,
    "batch_size": 8,
    "out": None,
    "overwrite": False,
    "shard": -1,
}
CPU = torch.device("cpu")


def weights(seed):
    return flux.init(CFG, seed=seed, scheme="nonzero")


def run_config():
    config = configs.default()
    config.model.flavor = "flux-tiny"
    config.text.max_length = 4
    config.data.image_size = 32
    config.sample.update({"steps": 2, "seed": 11})
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run's folder with checkpoints of the steps 4 (with moments) and 10 (weights only, with an average)."""
    workdir = tmp_path_factory.mktemp("run")
    config = json.loads(json.dumps(run_config().to_dict()))
    (workdir / "config.json").write_text(json.dumps(config))
    with checkpoint.Checkpoints(workdir, keep_last=0) as checkpoints:
        checkpoints.save(4, {"params": weights(4), "opt": {"step": torch.zeros(())}}, CFG, config, wait=True)
        checkpoints.save(10, {"params": weights(10), "ema": weights(11)}, CFG, config, wait=True)
    return workdir


@pytest.fixture
def workdir(source, tmp_path):
    """The same, in a folder of this test's own, whose checkpoints are links."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    (folder / "checkpoints").symlink_to(source / "checkpoints")
    return folder


def sample(workdir, **flags):
    sample_main.sample(types.SimpleNamespace(**{**NO_FLAGS, "workdir": workdir and str(workdir), **flags}), CPU)


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def expected(params, prompts, **changes):
    config = run_config()
    settings = {"seed": 11, "height": 32, "width": 32, "steps": 2, **changes}
    return generate.generate(params, CFG, encoders.build(config, CFG, CPU), prompts, **settings)


def pixels(path):
    return np.asarray(Image.open(path))


def as_bytes(image):
    return ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round()


def test_images_grid_and_settings_are_written(workdir, capsys):
    prompts = ["a handwritten three", "Ünïcode / ../ five?", "三"]
    sample(workdir, prompt=prompts, batch_size=2)
    out = workdir / "samples" / "sample_main_000"
    names = ["000_a-handwritten-three.png", "001_unicode-five.png", "002.png", "grid.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    for i, (name, image) in enumerate(zip(names, expected(weights(10), prompts), strict=False)):
        assert np.abs(pixels(out / name) - as_bytes(image)).max() <= 1  # batches round differently
        text = Image.open(out / name).text
        assert text.pop("prompt") == prompts[i]
        assert {key: json.loads(value) for key, value in text.items()} == {
            "index": i,
            "seed": 11,
            "height": 32,
            "width": 32,
            "steps": 2,
            "guidance": None,
            "cfg_scale": 1.0,
            "negative_prompt": "",
            "max_length": 4,
            "dtype": "float32",
            "batch_size": 2,
            "shift": True,
            "step": 10,
            "ema": False,
            "flavor": "flux-tiny",
        }
    assert str(out) in capsys.readouterr().out
    sample(workdir, prompt=prompts[:1])
    assert (out.parent / "sample_main_001" / names[0]).is_file()


@pytest.mark.parametrize(
    ("flags", "params", "changes"),
    [
        ({"step": 4}, 4, {}),
        ({"ema": True}, 11, {}),
        ({"seed": 3, "height": 16, "width": 48, "steps": 1}, 10, {"seed": 3, "height": 16, "width": 48, "steps": 1}),
        ({"cfg_scale": 3.0}, 10, {"cfg_scale": 3.0}),
        ({"cfg_scale": 3.0, "negative_prompt": "five"}, 10, {"cfg_scale": 3.0, "negative_prompt": "five"}),
    ],
)
def test_flags_choose_weights_and_settings(workdir, flags, params, changes):
    sample(workdir, prompt=["a three"], out=str(workdir / "out"), **flags)
    image = expected(weights(params), ["a three"], **changes)[0]
    assert np.abs(pixels(workdir / "out" / "000_a-three.png") - as_bytes(image)).max() <= 1


def test_prompts_come_from_a_file_and_an_image_keeps_its_noise_in_any_batch(workdir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a three\n\n  a four \na five\n", encoding="utf-8")
    for batch_size in (1, 3):
        out = str(tmp_path / str(batch_size))
        sample(workdir, prompts_file=str(prompts), batch_size=batch_size, out=out)
    assert everything(tmp_path / "1") == ["000_a-three.png", "001_a-four.png", "002_a-five.png", "grid.png"]
    for name in everything(tmp_path / "1"):
        one, three = pixels(tmp_path / "1" / name), pixels(tmp_path / "3" / name)
        assert np.abs(one.astype(int) - three).max() <= 1


def test_what_is_there_is_overwritten_only_when_asked(workdir, tmp_path):
    out = tmp_path / "out"
    sample(workdir, prompt=["a three"], out=str(out), steps=1)
    before = (out / "000_a-three.png").read_bytes()
    with pytest.raises(UserError, match="it is not empty; name another folder, or add --overwrite"):
        sample(workdir, prompt=["a three"], out=str(out), seed=1, steps=1)
    assert (out / "000_a-three.png").read_bytes() == before
    sample(workdir, prompt=["a three"], out=str(out), seed=1, steps=1, overwrite=True)
    assert (out / "000_a-three.png").read_bytes() != before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workdir": "/nowhere"}, "--workdir is '/nowhere': /nowhere/config.json cannot be read"),
        ({"step": 5}, "--step is 5: should be one of 4, 10, which "),
        ({"step": 4, "ema": True}, "--ema is True: the checkpoint of step 4 holds no average"),
        ({"prompt": []}, "--prompt is [] and --prompts_file is None: give one of them"),
        ({"prompts_file": "p.txt"}, "--prompts_file is 'p.txt': give one of them"),
        ({"prompt": [], "prompts_file": "/nowhere.txt"}, "--prompts_file is '/nowhere.txt': cannot be read"),
        ({"height": 40}, "--height is 40: should be a multiple of 16, such as 32"),
        ({"width": 0}, "--width is 0: should be a multiple of 16, such as 16"),
        ({"steps": 0}, "--steps is 0: should be at least 1"),
        ({"batch_size": -1}, "--batch_size is -1: should be at least 1"),
        ({"guidance": 3.5}, "--guidance is 3.5: the model of this run has no guidance embedding"),
        ({"max_length": 0}, "--max_length is 0: should be at least 1"),
        ({"negative_prompt": "five"}, "--negative_prompt is 'five': is read only where --cfg_scale is not 1"),
        ({"weights": "pipe"}, "' and --weights is 'pipe': give one of them"),
        ({"shard": 2}, "--shard is 2: should be -1 or divide the 1 process: 1"),
        ({"shard": 0}, "--shard is 0: should be -1 or divide the 1 process: 1"),
        ({"workdir": None}, "--workdir is None and --weights is None: give one of them"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(workdir, flags, message):
    before = everything(workdir)
    with pytest.raises(UserError) as raised:
        sample(**{"workdir": str(workdir), "prompt": ["a three"], **flags})
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert everything(workdir) == before


def test_more_bad_input(workdir, tmp_path):
    empty, binary, file = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "file"
    empty.write_text(" \n\n")
    binary.write_bytes(b"\xff\xfe\xff")
    file.write_text("")
    with pytest.raises(UserError, match="it has no prompts; write one a line"):
        sample(workdir, prompts_file=str(empty))
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        sample(workdir, prompts_file=str(binary))
    with pytest.raises(UserError, match="--out is '.*file': should be a folder"):
        sample(workdir, prompt=["x"], out=str(file))
    with pytest.raises(UserError, match="--out is '.*file/x': cannot be made"):
        sample(workdir, prompt=["x"], out=str(file / "x"))


def test_a_run_without_a_checkpoint_or_of_another_version(workdir, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_bytes((workdir / "config.json").read_bytes())
    with pytest.raises(UserError, match="there is no checkpoint in it yet"):
        sample(young, prompt=["x"])
    for text in ("{", '{"model": {"flavour": "flux-tiny"}}', '{"train": {"steps": "many"}}', "[1]"):
        (young / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json is not a config of this version") as raised:
            sample(young, prompt=["x"])
        assert "\n" not in str(raised.value)


def test_guidance_is_read_where_the_model_has_it(workdir):
    source = origin.of_run(str(workdir))
    guided = dataclasses.replace(source, cfg=dataclasses.replace(CFG, guidance_embed=True))
    given = {**dict.fromkeys(sample_main.FROM_CONFIG), "batch_size": 2, "negative_prompt": None}
    assert sample_main.choose_settings(source, given)["guidance"] is None
    assert sample_main.choose_settings(guided, given)["guidance"] == source.config.sample.guidance == 3.5
    assert sample_main.choose_settings(guided, {**given, "guidance": 0.0})["guidance"] == 0.0
    assert sample_main.choose_settings(guided, {**given, "seed": 0})["seed"] == 0


def test_what_is_computed_in_is_the_runs_or_the_flags(workdir):
    images = {}
    for dtype in (None, "float32", "bfloat16"):
        sample(workdir, prompt=["a three"], out=str(workdir / str(dtype)), dtype=dtype)
        images[dtype] = pixels(workdir / str(dtype) / "000_a-three.png").astype(int)
    assert np.array_equal(images[None], images["float32"])
    assert 0 < np.abs(images["bfloat16"] - images["float32"]).max() < 40


def test_more_prompts_than_are_encoded_ahead_give_the_same_pictures(workdir, monkeypatch):
    prompts = ["a three", "a four", "a five"]
    for name, most in (("ahead", 3), ("along", 2)):
        monkeypatch.setattr(sample_main, "ENCODED_AHEAD", most)
        sample(workdir, prompt=prompts, out=str(workdir / name), cfg_scale=2.0)
    for name in everything(workdir / "ahead"):
        assert np.array_equal(pixels(workdir / "ahead" / name), pixels(workdir / "along" / name))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120))
def test_a_slug_is_a_safe_file_name(text):
    assert re.fullmatch(r"([a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?)?", sample_main.slug(text))


def test_a_thousand_prompts_stay_sorted_and_the_grid_is_bounded(tmp_path):
    prompts = [f"prompt {i}" for i in range(1001)]
    sample_main.write(tmp_path, torch.zeros(1001, 3, 16, 16).split(100), prompts, {"seed": 0})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "0000_prompt-0.png" and names[1000] == "1000_prompt-1000.png" and names[1001] == "grid.png"
    width, height = Image.open(tmp_path / "grid.png").size
    assert width * height < 300 * 100 * 100


def program(*flags):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "flux_func.sample_main", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_the_program(workdir, tmp_path):
    out = tmp_path / "out"
    done = program(f"--workdir={workdir}", "--prompt=a three", "--prompt=a four", "--steps=3", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert everything(out) == ["000_a-three.png", "001_a-four.png", "grid.png"]
    assert "3/3" in done.stderr and f"2 images and grid.png are in {out}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--step=7"], "--step is 7: should be one of 4, 10"),
        (["--device=tpu"], "device"),
    ],
)
def test_the_program_answers_bad_input_with_one_line(workdir, flags, line):
    done = program(f"--workdir={workdir}", "--prompt=a three", *flags)
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (workdir / "samples").exists()
