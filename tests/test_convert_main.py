"""Conversions by the program: every format and back, runs of our own, whole pipelines, and the hub."""

import dataclasses
import os
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import flux_func as ff
from flux_func import convert_main, train_main, tree
from flux_func.interop import formats
from flux_func.models.autoencoder import AutoencoderConfig
from tests.helpers import tiny_hub, tiny_pipeline, tiny_run

CFG = dataclasses.replace(ff.flavor("flux-tiny"), guidance_embed=True, context_in_dim=32, vec_in_dim=24)
VAE = AutoencoderConfig(kind="kl", ch=32, ch_mult=(1, 2), num_res_blocks=1)


def convert(source, to, format, *more):
    return tiny_run.program(convert_main, f"--from={source}", f"--to={to}", f"--format={format}", *more)


def random(cfg, types):
    """Returns random weights by BFL's names, their types one after another."""
    generator = torch.Generator().manual_seed(0)
    shapes = formats.layout(cfg, "bfl").ours.items()
    return {
        path: torch.randn(shape, generator=generator).to(types[i % len(types)])
        for i, (path, shape) in enumerate(shapes)
    }


def contents(path):
    """Returns {name: (shape, type, bytes)} of a safetensors file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return {
        name: (tuple(leaf.shape), leaf.dtype, leaf.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, leaf in tensors.items()
    }


@pytest.fixture(scope="module")
def bfl(tmp_path_factory):
    """BFL's file of a transformer, as they would write it."""
    path = tmp_path_factory.mktemp("bfl") / "flux1-tiny.safetensors"
    save_file(random(CFG, [torch.bfloat16]), path)
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A whole pipeline, written by diffusers."""
    return tiny_pipeline.whole(tmp_path_factory.mktemp("pipeline") / "whole")


def test_round_the_formats_and_back(bfl, tmp_path):
    source = bfl
    for format in ("orbax", "diffusers", "torchtitan"):
        assert convert(source, tmp_path / format, format) == 0
        source = tmp_path / format
    assert convert(source, tmp_path / "back.safetensors", "bfl") == 0
    assert contents(tmp_path / "back.safetensors") == contents(bfl)


def test_round_the_formats_and_back_as_an_autoencoder_of_mixed_types(tmp_path):
    save_file(random(VAE, [torch.float16, torch.float32, torch.bfloat16]), tmp_path / "ae.safetensors")
    source = tmp_path / "ae.safetensors"
    for format, name in (("diffusers", "vae"), ("orbax", "orbax"), ("torchtitan", "tt.safetensors"), ("bfl", "b")):
        assert convert(source, tmp_path / name, format) == 0
        source = tmp_path / name
    assert contents(tmp_path / "b/ae.safetensors") == contents(tmp_path / "ae.safetensors")


def test_dtype(bfl, tmp_path):
    assert convert(bfl, tmp_path / "wide.safetensors", "bfl", "--dtype=float32") == 0
    assert convert(tmp_path / "wide.safetensors", tmp_path / "back.safetensors", "bfl", "--dtype=bfloat16") == 0
    assert {dtype for _, dtype, _ in contents(tmp_path / "wide.safetensors").values()} == {torch.float32}
    assert contents(tmp_path / "back.safetensors") == contents(bfl)


def test_what_it_says(bfl, tmp_path, capfd):
    count = sum(torch.Size(shape).numel() for shape in formats.layout(CFG, "bfl").ours.values())
    capfd.readouterr()
    assert convert(bfl, tmp_path / "t", "diffusers") == 0
    assert capfd.readouterr().out.splitlines() == [
        f"{bfl}: transformer, {count:,} parameters, bfloat16, in format bfl",
        f"{tmp_path}/t: written in format diffusers, {count * 2 / 1e6:.2f}MB",
    ]


def test_paths_relative_and_from_home(bfl, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(bfl.parent))
    assert convert("~/flux1-tiny.safetensors", ".", "diffusers") == 0
    monkeypatch.chdir(tmp_path)
    assert convert("here", "back.safetensors", "bfl") == 0
    assert contents("back.safetensors") == contents(bfl)


def test_help_answers_with_every_flag(capfd):
    assert tiny_run.program(convert_main, "--help") == 0
    out = capfd.readouterr().out
    for word in (
        "--from",
        "--to",
        "--format",
        "--dtype",
        "--part",
        "--step",
        "--ema",
        "--overwrite",
        "Converts FLUX's",
    ):
        assert word in out


# Runs of train_main.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    fields = {"train.steps": 3, "checkpoint.every": 2, "ema.decay": 0.5}
    assert tiny_run.program(train_main, *tiny_run.arguments(workdir, fields)) == 0
    return workdir


@pytest.mark.parametrize(("ema", "step"), [(False, None), (True, None), (True, 2)])
def test_a_run_becomes_what_diffusers_loads(workdir, tmp_path, capfd, ema, step):
    more = [f"--{'' if ema else 'no'}ema", *([f"--step={step}"] if step else [])]
    capfd.readouterr()
    assert convert(workdir, tmp_path / "transformer", "diffusers", *more) == 0
    out = capfd.readouterr().out
    assert "left out: " in out and "opt (" in out and f"{'params' if ema else 'ema'} (" in out
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    saved = tiny_run.stored(workdir, step or 3)
    member = "ema" if ema else "params"
    params = tree.unflatten({path.partition(".")[2]: leaf for path, leaf in saved.items() if path.startswith(member)})
    loaded = tree.flatten(ff.load(workdir, step=step, ema=ema)[0])
    assert all(torch.equal(loaded[path], leaf) for path, leaf in tree.flatten(params).items())
    given = {
        "img": torch.randn(1, 4, 64),
        "img_ids": torch.randint(0, 4, (1, 4, 3)).float(),
        "txt": torch.randn(1, 2, 4096),
        "txt_ids": torch.zeros(1, 2, 3),
        "timesteps": torch.tensor([0.3]),
        "y": torch.randn(1, 768),
    }
    ours = ff.apply(params, ff.flavor("flux-tiny"), **given)
    with torch.no_grad():
        theirs = model(
            hidden_states=given["img"],
            img_ids=given["img_ids"][0],
            encoder_hidden_states=given["txt"],
            txt_ids=given["txt_ids"][0],
            timestep=given["timesteps"],
            pooled_projections=given["y"],
        ).sample
    assert ours.norm() > 0.01 and (ours - theirs).norm() < 1e-5 * ours.norm()


def test_what_a_run_does_not_have(workdir, tmp_path, capfd):
    other = f"{workdir}: is a checkpoint of the transformer; the autoencoder is wanted, give its path"
    for more, says in (
        (["--step=5"], f"step is 5: '{workdir}' has no such checkpoint; it has those of steps 2, 3"),
        (["--step=2", "--part=autoencoder"], other),
        (["--part=autoencoder"], other),
    ):
        capfd.readouterr()
        assert convert(workdir, tmp_path / "no", "diffusers", *more) == 2
        assert says in capfd.readouterr().err and not (tmp_path / "no").exists()


# Whole pipelines.


def draw(folder, **options):
    """Returns the pixels [1, H, W, 3] that diffusers draws."""
    drawing = diffusers.FluxPipeline.from_pretrained(folder, **options)
    drawing.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    prompt = "a photograph of a red bird"
    return drawing(prompt, height=32, width=48, num_inference_steps=3, generator=seed, output_type="np").images


def test_a_pipeline_becomes_a_pipeline_that_draws_the_same(pipeline, tmp_path, capfd):
    capfd.readouterr()
    assert convert(pipeline, tmp_path / "again", "diffusers") == 0
    out = capfd.readouterr().out
    assert (
        "copied as they are: model_index.json, scheduler, text_encoder, text_encoder_2, tokenizer, tokenizer_2" in out
    )
    assert "left out" not in out
    # Weights that lie otherwise in memory give other roundings.
    np.testing.assert_allclose(draw(tmp_path / "again"), draw(pipeline), atol=1e-4)
    for part in ("transformer", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert contents(tmp_path / "again" / file) == contents(pipeline / file)


def test_a_pipeline_in_another_type(pipeline, tmp_path):
    (pipeline / "README.md").write_text("words")
    assert convert(pipeline, tmp_path / "half", "diffusers", "--dtype=bfloat16") == 0
    for part in ("transformer", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        half, whole = (safe_open(folder / file, "pt") for folder in (tmp_path / "half", pipeline))
        for name in whole.keys():  # noqa: SIM118 (no dict)
            assert torch.equal(half.get_tensor(name), whole.get_tensor(name).bfloat16())
    assert np.isfinite(draw(tmp_path / "half", torch_dtype=torch.bfloat16)).all()


def test_a_pipeline_becomes_bfls_files_and_these_its_parts_again(pipeline, tmp_path, capfd):
    assert convert(pipeline, tmp_path / "bfl", "bfl") == 0
    assert "left out: scheduler, text_encoder, text_encoder_2, tokenizer, tokenizer_2" in capfd.readouterr().out
    assert sorted(os.listdir(tmp_path / "bfl")) == ["ae.safetensors", "flux1-custom.safetensors"]
    assert convert(tmp_path / "bfl", tmp_path / "parts", "diffusers") == 0
    for part in ("transformer", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert contents(tmp_path / "parts" / file) == contents(pipeline / file)
    # In place of a pipeline's own, they draw what it draws.
    shutil.copytree(pipeline, tmp_path / "copy")
    assert convert(tmp_path / "bfl", tmp_path / "copy/vae", "diffusers", "--part=autoencoder", "--overwrite") == 0
    np.testing.assert_allclose(draw(tmp_path / "copy"), draw(pipeline), atol=1e-4)


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_one_part_of_a_pipeline(pipeline, tmp_path, capfd, part):
    capfd.readouterr()
    other = {"transformer": "autoencoder", "autoencoder": "transformer"}[part]
    assert convert(pipeline, tmp_path / "one", "diffusers", f"--part={part}") == 0
    assert f"left out: {other}, scheduler, text_encoder" in capfd.readouterr().out
    kind = {"transformer": diffusers.FluxTransformer2DModel, "autoencoder": diffusers.AutoencoderKL}[part]
    assert kind.from_pretrained(tmp_path / "one").num_parameters() > 0
    for format, name in (("bfl", "one.safetensors"), ("torchtitan", "dcp")):
        assert convert(pipeline, tmp_path / name, format, f"--part={part}") == 0
        assert convert(tmp_path / name, tmp_path / f"{name}.back", "diffusers") == 0
        file = "diffusion_pytorch_model.safetensors"
        assert contents(tmp_path / f"{name}.back" / file) == contents(tmp_path / "one" / file)


# The hub.


def hub_environment(served, home, **more):
    return {**os.environ, "PYTHONPATH": str(tiny_run.ROOT), "HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0"} | {
        "HF_HOME": str(home),
        **more,
    }


def test_one_command_fetches_all_that_training_with_real_encoders_needs(pipeline, tmp_path):
    """As configs/flux_dev.py does: its transformer trained from scratch, with encoders from the pipeline's folder."""
    root = tmp_path / "repos/owner/dev"
    shutil.copytree(pipeline, root)
    for folder in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(root / folder)
    tiny_pipeline.build(root, 4096, 768, layers=1)
    (root / "flux1-dev.safetensors").write_text("not wanted")
    (root / "text_encoder/pytorch_model.bin").write_text("not wanted")
    to = tmp_path / "dev"
    command = [sys.executable, "-m", "flux_func.convert_main", "--from=hf://owner/dev", f"--to={to}"]
    with tiny_hub.serve(tmp_path / "repos") as served:
        served.gated.add("owner/dev")
        environment = hub_environment(served, tmp_path / "home", HF_TOKEN=served.TOKEN)
        done = subprocess.run([*command, "--format=diffusers"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"{to}: written in format diffusers" in done.stdout
    assert {name.removeprefix("owner/dev/").split("/")[0] for name in served.downloaded} == set(os.listdir(to))
    assert not any("not wanted" in file.read_text(errors="ignore") for file in to.rglob("*") if file.is_file())
    fields = {"autoencoder.kind": "kl", "autoencoder.path": to, "text.kind": "hf", "text.path": to, "train.steps": 1}
    assert tiny_run.program(train_main, *tiny_run.arguments(tmp_path / "run", fields)) == 0
    [record] = tiny_run.records(tmp_path / "run")
    assert np.isfinite(record["loss"])


def test_a_licence_that_is_not_accepted_is_one_line(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "repos/owner/dev")
    command = [sys.executable, "-m", "flux_func.convert_main", "--from=hf://owner/dev", f"--to={tmp_path / 'dev'}"]
    with tiny_hub.serve(tmp_path / "repos") as served:
        served.gated.add("owner/dev")
        environment = hub_environment(served, tmp_path / "home")
        environment.pop("HF_TOKEN", None)
        done = subprocess.run([*command, "--format=diffusers"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "dev").exists()
    error = done.stderr.splitlines()[-1]
    assert error.startswith("convert_main.py: error: --from is 'hf://owner/dev': not permitted: accept the licence on")
