"""Wrong weights and wrong targets to convert_main: one line, exit code 2, nothing written; no pickle is ever opened."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import flux_func as ff
from flux_func import convert_main, tree
from flux_func.interop import target
from tests.helpers import tiny_pipeline, tiny_run

TINY = ff.flavor("flux-tiny")
FORMATS = {"bfl": "new.safetensors", "diffusers": "new", "torchtitan": "new", "orbax": "new"}


class Payload:
    """What, unpickled, writes a file: as a hostile checkpoint would do worse."""

    marker: str

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def pickles(root):
    """Writes the same hostile pickle under every name that weights come by; returns them and the file it writes."""
    Payload.marker = str(root / "opened")
    plain = pickle.dumps(Payload())
    for name in ("flux.ckpt", "flux.pkl", "disguised.safetensors"):
        (root / name).write_bytes(plain)
    for name in ("flux.pt", "flux.pth", "pytorch_model.bin", "zipped.safetensors"):
        with zipfile.ZipFile(root / name, "w") as file:
            file.writestr("archive/data.pkl", plain)
    (root / "folder").mkdir()
    shutil.copy(root / "pytorch_model.bin", root / "folder/diffusion_pytorch_model.bin")
    (root / "folder/config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    return Path(Payload.marker)


def zeros(*names):
    return {name: torch.zeros(2, 2) for name in names}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files and folders that are wrong each in its way, and one that is right."""
    root = tmp_path_factory.mktemp("weights")
    right = tree.flatten(ff.init(TINY, seed=0, scheme="nonzero"))
    save_file(right, root / "right.safetensors")
    whole = (root / "right.safetensors").read_bytes()
    for name, data in (("cut", whole[:-9]), ("cut_header", whole[:200]), ("empty", b""), ("short", whole[:5])):
        (root / f"{name}.safetensors").write_bytes(data)
    (root / "page.safetensors").write_text("<!DOCTYPE html><html>log in</html>")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (root / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    ff.save(root / "sharded", ff.init(TINY), TINY, "diffusers")
    file = "diffusion_pytorch_model.safetensors"
    index = {name: file.replace(".", "-00002-of-00002.", 1) for name in load_file(root / "sharded" / file)}
    (root / "sharded" / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (root / "sharded" / file).unlink()
    others = {
        "peft_lora": zeros("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"),
        "kohya_lora": zeros("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        "sdxl": zeros("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln_final.weight"),
        "sd1": zeros("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x.weight"),
        "sd3": zeros("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        "flux2": zeros("double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"),
        "fp8": {**zeros("double_blocks.0.img_attn.qkv.weight", "scaled_fp8")},
        "t5": zeros("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        "clip": zeros("text_model.encoder.layers.0.mlp.fc1.weight"),
        "unknown": zeros("lm_head.weight"),
    }
    for name, tensors in others.items():
        save_file(tensors, root / f"{name}.safetensors")
    lacking = {name: leaf for name, leaf in right.items() if name != "img_in.bias"} | {"img_inn.bias": torch.ones(128)}
    save_file(lacking | {"txt_in.bias": torch.ones(3)}, root / "lacking.safetensors")
    (root / "sdxl_pipeline/unet").mkdir(parents=True)
    (root / "sdxl_pipeline/model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    (root / "nothing").mkdir()
    pickles(root)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole pipeline."""
    return tiny_pipeline.whole(tmp_path_factory.mktemp("pipeline") / "whole")


def refused(capfd, root, *arguments):
    return tiny_run.refused(capfd, root, convert_main, *arguments)


SOURCES = [
    ("none.safetensors", "there is no such file or folder"),
    ("cut.safetensors", "is cut short or no safetensors file"),
    ("cut_header.safetensors", "is cut short or no safetensors file"),
    ("short.safetensors", "is cut short or no safetensors file"),
    ("empty.safetensors", "is empty; get it again"),
    ("page.safetensors", "is a web page; download the file again"),
    ("pointer.safetensors", "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
    ("model.gguf", "is a GGUF file, quantized; use the model's full weights"),
    ("sharded", "diffusion_pytorch_model-00002-of-00002.safetensors"),
    ("peft_lora.safetensors", "has no B for"),
    ("kohya_lora.safetensors", "has no B for"),
    ("sdxl.safetensors", "is SDXL"),
    ("sd1.safetensors", "is Stable Diffusion 1 or 2"),
    ("sd3.safetensors", "is Stable Diffusion 3"),
    ("flux2.safetensors", "is FLUX.2"),
    ("fp8.safetensors", "is quantized with scales (ComfyUI's fp8)"),
    ("t5.safetensors", "is T5"),
    ("clip.safetensors", "is CLIP"),
    ("unknown.safetensors", "is not recognized as FLUX's (it holds lm_head.weight ...)"),
    ("lacking.safetensors", "does not hold exactly the transformer that it seems to be, "),
    ("sdxl_pipeline", "transformer"),
    ("nothing", "holds no weights (but nothing)"),
]


@pytest.mark.parametrize(("name", "says"), SOURCES, ids=[name for name, _ in SOURCES])
@pytest.mark.parametrize("format", ["bfl", "diffusers"])
def test_wrong_weights(inputs, capfd, name, says, format):
    line = refused(capfd, inputs, f"--from={inputs / name}", f"--to={inputs / FORMATS[format]}", f"--format={format}")
    assert line.startswith(f"{inputs / name}") and says in line, line


def test_all_that_is_missing_surplus_or_misshapen_is_in_the_line(inputs, capfd):
    line = refused(capfd, inputs, f"--from={inputs}/lacking.safetensors", f"--to={inputs}/new", "--format=diffusers")
    for said in ("img_in.bias", "img_inn.bias", "txt_in.bias"):
        assert said in line, line


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: shutil.rmtree(root / "tokenizer"), "/tokenizer is not there; get it too"),
        (lambda root: (root / "scheduler/linked.json").symlink_to("nowhere"), "is a broken link; get what it leads to"),
        (lambda root: (root / "model_index.json").write_text("{"), "is no JSON"),
        (
            lambda root: (root / "model_index.json").write_text('{"../up": ["a", "B"]}'),
            "names '../up', which is no part",
        ),
        (lambda root: (root / "vae/config.json").unlink(), "/vae/config.json is not there; get it too"),
        (lambda root: os.truncate(root / "vae/diffusion_pytorch_model.safetensors", 5000), "is cut short"),
    ],
)
def test_a_pipeline_that_is_not_whole(whole, tmp_path, capfd, damage, says):
    shutil.copytree(whole, tmp_path / "pipeline")
    damage(tmp_path / "pipeline")
    line = refused(capfd, tmp_path, f"--from={tmp_path}/pipeline", f"--to={tmp_path}/new", "--format=diffusers")
    assert says in line, line


def test_a_pipeline_is_overwritten_if_it_is_nothing_else(whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "new")
    command = [f"--from={whole}", f"--to={tmp_path}/new", "--format=diffusers", "--dtype=bfloat16", "--overwrite"]
    assert tiny_run.program(convert_main, *command) == 0
    assert {leaf.dtype for leaf in tree.leaves(ff.load(tmp_path / "new", part="autoencoder")[0])} == {torch.bfloat16}
    part = [f"--from={whole}/transformer", f"--to={tmp_path}/new", "--overwrite"]
    for format in ("bfl", "diffusers", "orbax", "torchtitan"):
        line = refused(capfd, tmp_path, *part, f"--format={format}")
        assert "holds a folder 'scheduler', which would be lost, and is not overwritten" in line, line
    (tmp_path / "new/README.md").write_text("precious")
    assert "holds 'README.md' beside weights and is not overwritten" in refused(capfd, tmp_path, *command)


PICKLES = ("flux.ckpt", "flux.pkl", "flux.pt", "flux.pth", "pytorch_model.bin")


@pytest.mark.parametrize("name", [*PICKLES, "disguised.safetensors", "zipped.safetensors", "folder"])
def test_a_pickle_is_never_opened(inputs, capfd, name):
    marker = inputs / "opened"
    line = refused(capfd, inputs, f"--from={inputs / name}", f"--to={inputs}/new", "--format=diffusers")
    assert "is a pickle, which can run code and is never opened; " in line and "safetensors.torch.save_file(" in line
    assert line.startswith(f"{inputs / name}") and not marker.exists()


def test_the_pickles_would_have_written_their_file(tmp_path):
    marker = pickles(tmp_path)
    pickle.loads((tmp_path / "flux.ckpt").read_bytes())
    assert marker.exists()
    marker.unlink()
    with zipfile.ZipFile(tmp_path / "flux.pt") as file:
        pickle.loads(file.read("archive/data.pkl"))
    assert marker.exists()


# Targets.


def right(inputs, to, format="bfl"):
    return [f"--from={inputs / 'right.safetensors'}", f"--to={to}", f"--format={format}"]


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_unasked(inputs, tmp_path, capfd, format):
    to = tmp_path / FORMATS[format]
    assert tiny_run.program(convert_main, *right(inputs, to, format)) == 0
    line = refused(capfd, tmp_path, *right(inputs, to, format))
    assert line.startswith(f"{to}: is there already"), line
    assert tiny_run.program(convert_main, *right(inputs, to, format), "--overwrite", "--dtype=bfloat16") == 0
    assert {leaf.dtype for leaf in tree.leaves(ff.load(to)[0])} == {torch.bfloat16}
    assert os.listdir(tmp_path) == [to.name]


@pytest.mark.parametrize("name", ["thesis.tex", "transformer/train.py"])
def test_a_folder_with_anything_but_weights_is_never_overwritten(inputs, tmp_path, capfd, name):
    (tmp_path / "new" / name).parent.mkdir(parents=True)
    (tmp_path / "new" / name).write_text("precious")
    line = refused(capfd, tmp_path, *right(inputs, tmp_path / "new", "diffusers"), "--overwrite")
    assert line.startswith(f"{tmp_path}/new: holds '{name}' beside weights and is not overwritten"), line


@pytest.mark.parametrize("format", ["diffusers", "torchtitan", "orbax", "bfl"])
def test_a_file_of_anything_but_weights_is_never_overwritten(inputs, tmp_path, capfd, format):
    (tmp_path / "thesis").write_text("precious")
    line = refused(capfd, tmp_path, *right(inputs, tmp_path / "thesis", format), "--overwrite")
    assert line.startswith(f"{tmp_path}/thesis: is no safetensors file and is not overwritten"), line


def test_what_another_process_writes_is_left_to_it(inputs, tmp_path, capfd):
    to = tmp_path / "new.safetensors"
    with target.beside(to) as partial:
        partial.write_text("half")
        line = fails_in_the_middle(capfd, tmp_path, right(inputs, to))
    assert line.startswith(f"convert_main: error: {to}: is being written by another process"), line
    assert to.read_text() == "half" and os.listdir(tmp_path) == [to.name]


@pytest.mark.parametrize("name", ["right.safetensors", ""])
def test_a_target_that_holds_what_is_read(inputs, tmp_path, capfd, name):
    shutil.copy(inputs / "right.safetensors", tmp_path)
    format = "bfl" if name else "diffusers"
    line = refused(capfd, tmp_path, *right(tmp_path, tmp_path / name, format), "--overwrite")
    assert "holds what is read (" in line and "right.safetensors); choose another path" in line, line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--format=gguf"], "--format=gguf: value should be one of <bfl|diffusers|torchtitan|orbax|kohya>"),
        (["--dtype=int8"], "--dtype=int8: value should be one of <float32|bfloat16|float16>"),
        (["--part=vae"], "--part=vae: value should be one of <transformer|autoencoder>"),
        (["--to="], "should name a file or folder"),
        (["--to=hf://me/mine"], "hf://me/mine: nothing is written to the hub; name a file or folder here"),
        (["--from="], "should name a file or folder"),
        (["--form=x"], "form"),
        (["--step=3"], "there is no checkpoint in it; train_main writes them"),
        (["--ema"], "there is no checkpoint in it; train_main writes them"),
        (["--part=autoencoder"], "is FLUX's transformer; its autoencoder is wanted"),
        (["--format=orbax"], "format orbax is a folder, whose name should not end in .safetensors"),
        (["--from=hf://owner"], "should be hf://owner/repo"),
        (["--from=hf://owner/repo"], "not in the cache, and HF_HUB_OFFLINE is set: unset it to download"),
    ],
)
def test_a_wrong_flag(inputs, tmp_path, capfd, more, says):
    line = refused(capfd, tmp_path, *right(inputs, tmp_path / "new.safetensors"), *more)
    assert says in line, line


def test_a_value_beyond_the_type_asked_for(tmp_path, capfd):
    params = ff.init(TINY)
    params["img_in"]["bias"][3] = 1e5
    ff.save(tmp_path / "large.safetensors", params, TINY)
    command = [f"--from={tmp_path}/large.safetensors", f"--to={tmp_path}/new.safetensors", "--format=bfl"]
    before = set(os.listdir(tmp_path))
    assert tiny_run.program(convert_main, *command, "--dtype=float16") == 2
    assert "dtype is float16: img_in.bias reaches 1e+05, beyond 6.55e+04; use bfloat16" in capfd.readouterr().err
    assert set(os.listdir(tmp_path)) == before


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nobody may write, whoever runs the tests."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if not os.access(folder, os.W_OK):
        yield folder
        return
    # The superuser is kept out by nothing but the file system itself.
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("this user may write anywhere, and the file system has no immutable folders")
    yield folder
    subprocess.run(["chattr", "-i", folder], check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_read_only_target(inputs, read_only, capfd, format):
    line = refused(capfd, read_only, *right(inputs, read_only / FORMATS[format], format))
    assert line.startswith(f"{read_only / FORMATS[format]}: cannot be written, {read_only} is read-only"), line


def test_a_read_only_target_as_the_system_says(inputs, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(capfd, tmp_path, *right(inputs, tmp_path / "new.safetensors"))
    assert line.startswith(f"{tmp_path}/new.safetensors: cannot be written, {tmp_path} is read-only"), line


@pytest.mark.parametrize("name", ["file/below.safetensors", "file/far/below.safetensors"])
def test_a_target_below_a_file(inputs, tmp_path, capfd, name):
    (tmp_path / "file").write_text("precious")
    line = refused(capfd, tmp_path, *right(inputs, tmp_path / name))
    assert "cannot be written" in line, line


@pytest.mark.parametrize("format", FORMATS)
def test_no_room_on_the_disk(inputs, tmp_path, capfd, monkeypatch, format):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=2**40, free=10**6))
    line = refused(capfd, tmp_path, *right(inputs, tmp_path / "deep/in" / FORMATS[format], format))
    assert "needs 0.01 GB" in line and "has 0.00 GB free; make room or choose another path" in line, line


def fails_in_the_middle(capfd, folder, arguments):
    """Runs convert_main, which finds on the way that it cannot write; returns its last line."""
    before = tiny_run.snapshot(folder)
    capfd.readouterr()
    assert tiny_run.program(convert_main, *arguments) == 2
    assert {path: digest for path, (_, digest) in tiny_run.snapshot(folder).items()} == {
        path: digest for path, (_, digest) in before.items()
    }
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("format", FORMATS)
def test_a_system_that_refuses_in_the_middle_of_a_file(inputs, tmp_path, capfd, format):
    (tmp_path / "kept").write_text("precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        line = fails_in_the_middle(capfd, tmp_path, right(inputs, tmp_path / FORMATS[format], format))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith(f"convert_main: error: {tmp_path / FORMATS[format]}"), line
    assert line.endswith(": cannot be written (File too large); it is as it was"), line


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk to fill up")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_fills_up(inputs, small_disk, capfd, monkeypatch, format):
    to = small_disk / FORMATS[format]
    line = refused(capfd, small_disk, *right(inputs, to, format))
    assert line.startswith(f"{to}: needs 0.01 GB, {small_disk} has 0.00 GB free"), line
    # As if another program had taken the room in the meantime.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=0, free=2**40))
    line = fails_in_the_middle(capfd, small_disk, right(inputs, to, format))
    assert line.startswith(f"convert_main: error: {to}"), line
    assert line.endswith(": cannot be written (No space left on device); it is as it was"), line
