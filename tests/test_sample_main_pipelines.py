"""sample_main on whole pipelines against diffusers' FluxPipeline: the same noise and prompts, the same pixels."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_func import random, sample_main
from flux_func.errors import UserError
from flux_func.train import encoders, origin
from tests.helpers import tiny_pipeline, tiny_run

PROMPTS = ["a photograph of a red bird", "two people walk along the beach", "a bowl of fruit!"]
NOT_THIS = "the old city's towers against a dark sky"
FLAGS = {
    "workdir": None,
    "step": None,
    "ema": False,
    "prompts_file": None,
    "lora": [],
    "negative_prompt": None,
    "seed": 3,
    "guidance": None,
    "cfg_scale": None,
    "dtype": None,
    "max_length": 16,
    "batch_size": 8,
    "overwrite": False,
    "shard": -1,
}
# {name: (pipeline, prompts, height, width, steps, guidance, true CFG)}
CASES = {
    "dev": ("dev", 1, 64, 64, 6, 3.5, 1.0),
    "dev, wide, batch of 2": ("dev", 2, 32, 80, 3, 3.5, 1.0),
    "dev, tall, batch of 3, guidance 1.5": ("dev", 3, 96, 16, 4, 1.5, 1.0),
    "dev, true CFG on top": ("dev", 2, 48, 32, 3, 3.5, 2.5),
    "schnell": ("schnell", 2, 48, 64, 4, None, 1.0),
    "schnell, one step": ("schnell", 1, 32, 32, 1, None, 1.0),
    "from scratch, true CFG": ("scratch", 2, 32, 48, 5, None, 4.0),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of dev's kind, of schnell's, and of a model without guidance embedding whose schedule is shifted."""
    root = tmp_path_factory.mktemp("pipelines")
    kinds = {"dev": (True, True), "schnell": (False, False), "scratch": (False, True)}
    return {name: tiny_pipeline.whole(root / name, *kind) for name, kind in kinds.items()}


def theirs(folder, prompts, height, width, steps, guidance, scale):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = np.stack([random.normal(3, "sample", i, (16, height // 8, width // 8)) for i in range(len(prompts))])
    packed = pipe._pack_latents(torch.from_numpy(noise), len(prompts), 16, height // 8, width // 8)
    done = pipe(
        prompts,
        negative_prompt=[NOT_THIS] * len(prompts) if scale != 1 else None,
        true_cfg_scale=scale,
        guidance_scale=0.0 if guidance is None else guidance,
        height=height,
        width=width,
        num_inference_steps=steps,
        latents=packed,
        max_sequence_length=16,
    )
    return np.stack([np.asarray(image) for image in done.images]).astype(int)


def ours(out, folder, prompts, height, width, steps, guidance, scale, **flags):
    given = {"height": height, "width": width, "steps": steps, "guidance": guidance, "cfg_scale": scale}
    given |= {"negative_prompt": NOT_THIS} if scale != 1 else {}
    run(out, folder, prompts, **{**given, **flags})
    files = sorted(path for path in out.glob("*.png") if path.name != "grid.png")
    return np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)


def run(into, folder, prompts, **flags):
    given = {
        **FLAGS,
        "height": 32,
        "width": 32,
        "steps": 1,
        "weights": str(folder),
        "prompt": prompts,
        "out": str(into),
    }
    sample_main.sample(types.SimpleNamespace(**{**given, **flags}), tiny_run.CPU)


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_diffusers(pipelines, tmp_path, name, record_property):
    pipeline, count, *rest = CASES[name]
    expected = theirs(pipelines[pipeline], PROMPTS[:count], *rest)
    found = ours(tmp_path, pipelines[pipeline], PROMPTS[:count], *rest)
    assert found.shape == expected.shape == (count, rest[0], rest[1], 3)
    assert expected.std() > 20 and expected.min() < 64 and expected.max() > 192  # there is something to be seen
    record_property("difference", int(np.abs(found - expected).max()))
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01


def test_anything_done_differently_shows_in_the_pixels(pipelines, tmp_path):
    """What the comparison above would not forgive: each is far beyond one step of 255."""
    case = (PROMPTS[:1], 32, 48, 3, 3.5, 2.5)
    expected = theirs(pipelines["dev"], *case)

    def differs(name, folder=pipelines["dev"], case=case, **flags):
        return np.abs(ours(tmp_path / name, folder, *case, **flags) - expected).max()

    assert differs("nothing") <= 1
    assert differs("prompt", case=(PROMPTS[1:2], *case[1:])) > 20
    assert differs("steps", case=(*case[:3], 4, *case[4:])) > 20
    assert differs("guidance", case=(*case[:4], 4.5, 2.5)) > 20
    assert differs("scale", case=(*case[:5], 1.0)) > 20
    assert differs("negative", negative_prompt="") > 20
    assert differs("length", max_length=24) > 5
    assert differs("seed", seed=4) > 20
    for part, file, field, value in (
        ("scheduler", "scheduler_config.json", {"use_dynamic_shifting": False, "shift": 1.0}, "schedule"),
        ("vae", "config.json", {"scaling_factor": 0.2, "shift_factor": 0.0}, "autoencoder"),
    ):
        folder = shutil.copytree(pipelines["dev"], tmp_path / f"other {value}")
        change(folder / part / file, field)
        assert differs(value, folder) > 20


def change(path, fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dev", {"steps": 50, "guidance": 3.5, "max_length": 512}),
        ("schnell", {"steps": 4, "guidance": None, "max_length": 256}),
    ],
)
def test_what_is_left_out_is_as_the_model_is_meant_to_be_sampled(pipelines, name, expected):
    source = origin.of_pipeline(str(pipelines[name]))
    left_out = {**dict.fromkeys(sample_main.FROM_CONFIG), "negative_prompt": None, "batch_size": 8}
    settings = sample_main.choose_settings(source, left_out)
    common = {"height": 1024, "width": 1024, "cfg_scale": 1.0, "seed": 0, "dtype": "float32"}
    assert {key: settings[key] for key in (*expected, *common)} == {**expected, **common}
    assert source.config.sample.shift == (name == "dev")


def test_weights_that_are_stored_in_bfloat16_are_computed_with_in_it(pipelines, tmp_path):
    folder = shutil.copytree(pipelines["dev"], tmp_path / "half")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: leaf.bfloat16() for name, leaf in load_file(file).items()}, file)
    run(tmp_path / "left out", folder, PROMPTS[:1])
    run(tmp_path / "asked for", pipelines["dev"], PROMPTS[:1], dtype="bfloat16")
    run(tmp_path / "float32", folder, PROMPTS[:1], dtype="float32")
    images = [np.asarray(Image.open(tmp_path / name / "grid.png")) for name in ("left out", "asked for", "float32")]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_the_text_models_are_gone_when_the_model_is_read(pipelines, tmp_path, monkeypatch):
    import gc
    import weakref

    from flux_func import tree
    from flux_func.models import text
    from flux_func.train import state

    alive, at_reading = [], []
    load, read = text.load, state.read_weights

    def watched(*args):
        params = load(*args)
        alive.extend(weakref.ref(leaf) for leaf in tree.leaves(params))
        return params

    def counting(*args):
        gc.collect()
        at_reading.append(sum(ref() is not None for ref in alive))
        return read(*args)

    monkeypatch.setattr(text, "load", watched)
    monkeypatch.setattr(state, "read_weights", counting)
    run(tmp_path, pipelines["dev"], PROMPTS[:2])
    assert alive and at_reading == [0]


def test_settings_and_where_they_came_from_are_in_the_metadata(pipelines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        run("", pipelines["schnell"], PROMPTS[:1], out=None, cfg_scale=2.0, negative_prompt="fog")
        folder = tmp_path / "samples" / f"sample_main_{number:03d}"
        assert str(folder.relative_to(tmp_path)) in capsys.readouterr().out
    text = Image.open(folder / "000_a-photograph-of-a-red-bird.png").text
    assert text.pop("prompt") == PROMPTS[0]
    assert {key: json.loads(value) for key, value in text.items()} == {
        "index": 0,
        "seed": 3,
        "height": 32,
        "width": 32,
        "steps": 1,
        "guidance": None,
        "cfg_scale": 2.0,
        "negative_prompt": "fog",
        "max_length": 16,
        "dtype": "float32",
        "batch_size": 8,
        "shift": False,
        "weights": str(pipelines["schnell"]),
    }


def test_the_program(pipelines, tmp_path):
    flags = [f"--weights={pipelines['schnell']}", "--prompt=a bird", "--height=32", "--width=48", "--max_length=8"]
    assert tiny_run.program(sample_main, *flags, f"--out={tmp_path / 'out'}") == 0
    assert Image.open(tmp_path / "out" / "000_a-bird.png").size == (48, 32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"step": 0}, "--step is 0: is read only with --workdir; leave it out"),
        ({"ema": True}, "--ema is True: is read only with --workdir; leave it out"),
        (
            {"guidance": 3.0},
            "--guidance is 3.0: the model of this pipeline has no guidance embedding; leave it out",
        ),
        ({"negative_prompt": "x"}, "--negative_prompt is 'x': is read only where --cfg_scale is not 1"),
        (
            {"weights": "/none"},
            "--weights is '/none': is not there; should be a pipeline's folder as diffusers",
        ),
        ({"workdir": "/run"}, "--workdir is '/run' and --weights is "),
    ],
)
def test_a_wrong_flag_is_one_line_and_writes_nothing(pipelines, tmp_path, flags, said):
    with pytest.raises(UserError) as raised:
        run(tmp_path / "out", pipelines["schnell"], PROMPTS[:1], **flags)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


SPOILT = {
    "transformer/diffusion_pytorch_model.safetensors": "transformer",
    "vae/diffusion_pytorch_model.safetensors": "vae",
    "text_encoder_2/model.safetensors": "text_encoder_2 cannot be read",
    "tokenizer/tokenizer_config.json": "tokenizer/tokenizer_config.json is missing; it should be a folder with",
    "text_encoder": "model_index.json: names text_encoder, a folder that is not there; the whole pipeline is needed",
    "scheduler/scheduler_config.json": "scheduler_config.json: cannot be read (No such file or directory)",
}


@pytest.mark.parametrize("missing", SPOILT)
def test_a_part_that_is_missing_is_named(pipelines, tmp_path, missing):
    folder = shutil.copytree(pipelines["schnell"], tmp_path / "pipe")
    remove(folder / missing)
    with pytest.raises(UserError) as raised:
        run(tmp_path / "out", folder, PROMPTS[:1])
    assert str(raised.value).startswith(f"--weights is '{folder}': ") and SPOILT[missing] in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).count("--weights") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("channels", "kind"), [(384, "FLUX.1 Fill"), (128, "FLUX.1 Canny and Depth")])
def test_models_that_need_more_than_text_are_said_to_be_such(tmp_path, channels, kind):
    folder = tiny_pipeline.whole(tmp_path / "pipe", transformer={"in_channels": channels, "out_channels": 64})
    with pytest.raises(UserError) as raised:
        run(tmp_path / "out", folder, PROMPTS[:1])
    assert str(raised.value).startswith(f"--weights is '{folder}': the transformer takes {channels} channels, not 64")
    assert kind in str(raised.value) and not (tmp_path / "out").exists()


def test_encoders_that_were_ahead_give_what_was_encoded(pipelines):
    config = origin.of_pipeline(str(pipelines["dev"])).config
    config.text.max_length = 8
    codecs = origin.of_pipeline(str(pipelines["dev"])).encoders(config, torch.device("cpu"))
    done = []
    known = encoders.ahead(codecs, [*PROMPTS, "", PROMPTS[0]], batch_size=3, progress=done.append)
    assert done == [3, 1]
    wanted = ["", PROMPTS[2], "", PROMPTS[0]]
    for found, expected in zip(
        known.encode_text(known.tokenize(wanted)), codecs.encode_text(codecs.tokenize(wanted)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert known.decode is codecs.decode
