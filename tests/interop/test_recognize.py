"""Weights found by content in files and folders as they are on disk: hubs' snapshots, caches, links, checkpoints."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import formats, recognize, safetensors_io, weights
from flux_func.models import autoencoder, flux

CFG = dataclasses.replace(flux.flavor("flux-tiny"), depth=1, depth_single_blocks=1, vec_in_dim=8, context_in_dim=8)
KL = autoencoder.AutoencoderConfig(kind="kl", ch=32, ch_mult=(1, 2), num_res_blocks=1)
PARAMS, KL_PARAMS = flux.init(CFG, scheme="nonzero"), autoencoder.init(KL)


def holds_transformer(stored):
    return stored.cfg == CFG and torch.equal(stored.leaf("img_in.weight"), PARAMS["img_in"]["weight"])


def holds_autoencoder(stored):
    return stored.cfg == KL and torch.equal(
        stored.leaf("encoder.conv_in.weight"), KL_PARAMS["encoder"]["conv_in"]["weight"]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A repository as FLUX.1-dev's: BFL's files and a pipeline, the transformer in shards; made once, never changed."""
    root = tmp_path_factory.mktemp("files")
    weights.save(root / "flux1-dev.safetensors", PARAMS, CFG)
    weights.save(root / "ae.safetensors", KL_PARAMS, KL)
    weights.save(root / "transformer", PARAMS, CFG, "diffusers")
    weights.save(root / "vae", KL_PARAMS, KL, "diffusers")
    shard(root / "transformer")
    (root / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return root


def shard(folder: Path) -> None:
    tensors, stem = load_file(folder / "diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model"
    (folder / f"{stem}.safetensors").unlink()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    metadata = formats.metadata(CFG)
    dtypes = dict.fromkeys(shapes, torch.float32)
    safetensors_io.write_sharded(folder, stem, shapes, dtypes, tensors.__getitem__, 400_000, metadata)


@pytest.fixture
def snapshot(files, tmp_path) -> Path:
    """That repository in the hub's cache: a snapshot of links to blobs."""
    cache = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in files.rglob("*") if path.is_file())):
        shutil.copy(path, cache / "blobs" / f"{number:064x}")
        link = cache / "snapshots" / "0123abcd" / path.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / f"{number:064x}")
    return cache / "snapshots" / "0123abcd"


def test_a_snapshot_of_a_repository(snapshot):
    assert len(list((snapshot / "transformer").glob("*-of-*.safetensors"))) >= 3
    for path, part in {
        snapshot: None,
        snapshot / "model_index.json": None,
        snapshot / "transformer": None,
        snapshot / "transformer" / "config.json": None,
        snapshot / "transformer" / "diffusion_pytorch_model.safetensors.index.json": None,
        snapshot / "flux1-dev.safetensors": None,
        snapshot.parents[1]: "transformer",
    }.items():
        assert holds_transformer(recognize.find(path, part)), path
    assert recognize.find(snapshot).format == "diffusers"
    for path, part in {
        snapshot: "autoencoder",
        snapshot / "vae": None,
        snapshot / "vae" / "diffusion_pytorch_model.safetensors": None,
        snapshot / "ae.safetensors": None,
    }.items():
        assert holds_autoencoder(recognize.find(path, part)), path


def test_a_snapshot_of_bfls_files_alone(snapshot):
    for folder in ("transformer", "vae"):
        shutil.rmtree(snapshot / folder)
    for _ in range(2):  # with model_index.json, and without
        assert holds_transformer(recognize.find(snapshot)) and recognize.find(snapshot).format == "bfl"
        assert holds_autoencoder(recognize.find(snapshot, "autoencoder"))
        (snapshot / "model_index.json").unlink(missing_ok=True)
    (snapshot / "flux1-dev.safetensors").unlink()
    assert holds_autoencoder(recognize.find(snapshot))
    with pytest.raises(UserError, match="is FLUX's autoencoder; its transformer is wanted"):
        recognize.find(snapshot, "transformer")


def test_a_snapshot_of_bfls_files_and_all_the_configurations(snapshot):
    for path in (snapshot / "transformer").glob("*.safetensors*"):
        path.unlink()
    assert holds_transformer(recognize.find(snapshot)) and recognize.find(snapshot).format == "bfl"


def test_a_cache_with_several_snapshots_is_mains(snapshot):
    cache = snapshot.parents[1]
    (cache / "snapshots" / "4567").mkdir()
    with pytest.raises(UserError, match="holds 2 snapshots"):
        recognize.find(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    assert holds_transformer(recognize.find(cache))


def test_an_interrupted_download_is_named(snapshot):
    link = sorted((snapshot / "transformer").glob("*-of-*.safetensors"))[1]
    link.resolve().unlink()
    with pytest.raises(UserError, match=f"names '{link.name}', which is not there"):
        recognize.find(snapshot)
    with pytest.raises(UserError, match="is a broken link"):
        recognize.find(link)
    index = snapshot / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.unlink()
    with pytest.raises(UserError, match="holds shards and no index"):
        recognize.find(snapshot)
    with pytest.raises(UserError, match="is one shard of several"):
        recognize.find(sorted((snapshot / "transformer").glob("*-of-*.safetensors"))[0])


def test_another_programs_folder_of_checkpoints(files, tmp_path):
    folder = tmp_path / "models" / "checkpoints" / "flux"
    folder.mkdir(parents=True)
    shutil.copy(files / "flux1-dev.safetensors", folder)
    assert holds_transformer(recognize.find(folder))
    with pytest.raises(UserError, match=r"holds no weights \(but checkpoints\)"):
        recognize.find(tmp_path / "models")


def test_content_decides_and_not_the_name(files, tmp_path):
    shutil.copy(files / "ae.safetensors", tmp_path / "flux1-dev.bin")
    assert holds_autoencoder(recognize.find(tmp_path / "flux1-dev.bin"))


def test_a_folder_with_several_transformers_is_ambiguous(files, tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        shutil.copy(files / "flux1-dev.safetensors", tmp_path / name)
    shutil.copy(files / "ae.safetensors", tmp_path / "ae.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match=r"several files of a transformer \(one.safetensors, two.safetensors\)"):
        recognize.find(tmp_path)
    assert holds_autoencoder(recognize.find(tmp_path, "autoencoder"))


def test_a_variant_beside_the_usual_file_of_a_diffusers_folder(files, tmp_path):
    shutil.copytree(files / "vae", tmp_path / "vae")
    shutil.copy(files / "ae.safetensors", tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert holds_autoencoder(recognize.find(tmp_path / "vae"))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    assert holds_autoencoder(recognize.find(tmp_path / "vae"))


def test_config_json_says_what_shapes_do_not(files, tmp_path):
    shutil.copytree(files / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path)  # without our metadata
    saved = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps(saved | {"scaling_factor": 1.5305, "shift_factor": 0.0609})
    )
    for found in (tmp_path / "vae", path):
        assert recognize.find(found).cfg == dataclasses.replace(KL, scale_factor=1.5305, shift_factor=0.0609)
    (tmp_path / "vae" / "config.json").unlink()
    assert recognize.find(tmp_path / "vae").cfg == KL


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scaling_factor": None}, "scale_factor None should be a finite number"),
        ({"shift_factor": "0.1"}, "shift_factor '0.1' should be a finite number"),
        ({"block_out_channels": [0, 64]}, "division"),
        ({"block_out_channels": []}, "index out of range"),
        ({"layers_per_block": [2, 2]}, "num_res_blocks"),
    ],
)
def test_an_autoencoders_config_json_that_cannot_be(files, tmp_path, change, words):
    shutil.copytree(files / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path)  # without our metadata
    saved = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(saved | change))
    with pytest.raises(UserError, match=f"vae: does not tell its model: .*{words}"):
        recognize.find(tmp_path / "vae")


@pytest.mark.parametrize(
    "saved, words",
    [
        ({"_class_name": "SD3Transformer2DModel"}, "is a SD3Transformer2DModel"),
        ({"_class_name": "Flux2Transformer2DModel"}, "is a Flux2Transformer2DModel"),
        ({"architectures": ["T5EncoderModel"]}, "is a T5EncoderModel"),
        ({"_class_name": "FluxTransformer2DModel", "quantization_config": {}}, "is quantized"),
        ({"_class_name": "AutoencoderKL", "latent_channels": 4}, "an autoencoder of 4 channels"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": "x"}, "does not tell its model"),
        ({"_class_name": "FluxTransformer2DModel", "num_attention_heads": 0}, "does not tell its model: hidden_size 0"),
        ({"architectures": None}, "is a model of no class, by its config.json"),
        ({"architectures": []}, "is a model of no class, by its config.json"),
        ({"architectures": [1, "T5"]}, "is a 1, T5, by its config.json"),
        ({"_class_name": None}, "is a model of no class, by its config.json"),
    ],
)
def test_other_models_folders_are_named(files, tmp_path, saved, words):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    shard_free = recognize.find(files / "transformer")
    save_file({name: shard_free.read(name, 0, shape[0]) for name, shape in shard_free.layout.theirs.items()}, path)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=words):
        recognize.find(tmp_path)


def test_another_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline without safetensors files in transformer/"):
        recognize.find(tmp_path)


def test_what_is_not_there_and_what_holds_nothing(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        recognize.find(tmp_path / "none")
    with pytest.raises(UserError, match="holds no weights"):
        recognize.find(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: is no JSON"):
        recognize.find(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "README.md").write_text("<!-- words -->")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: is a pickle"):
        recognize.find(tmp_path)
    with pytest.raises(UserError, match="part is 'vae': should be transformer or autoencoder"):
        recognize.find(tmp_path, "vae")


# Checkpoints.


def test_torchtitans_checkpoints(tmp_path):
    run = tmp_path / "outputs"
    for step in (5, 10):
        weights.save(run / "checkpoint" / f"step-{step}", PARAMS, CFG, "torchtitan")
    (run / "checkpoint" / "step-20").mkdir()  # not complete
    for path in (run, run / "checkpoint", run / "checkpoint" / "step-5", run / "checkpoint" / "step-10" / ".metadata"):
        stored = recognize.find(path)
        assert holds_transformer(stored) and stored.format == "torchtitan"
        assert stored.path.endswith("step-5" if path.name == "step-5" else "step-10")
    for content in (b"\xff\xfe", b"{", b"[]"):
        (run / "checkpoint" / "step-10" / "flux_func.json").write_bytes(content)
        with pytest.raises(UserError, match="step-10/flux_func.json: is no JSON"):
            recognize.find(run)
    # torchtitan itself does not say the model.
    (run / "checkpoint" / "step-10" / "flux_func.json").unlink()
    assert recognize.find(run).cfg == dataclasses.replace(CFG, qk_norm_eps=1e-5)


def test_our_own_checkpoints(tmp_path):
    weights.save(tmp_path / "run", PARAMS, CFG, "orbax")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "0"):
        stored = recognize.find(path)
        assert holds_transformer(stored) and stored.format == "orbax"
        with pytest.raises(UserError, match="is a checkpoint of the transformer; the autoencoder is wanted"):
            recognize.find(path, "autoencoder")
        params, cfg = weights.load(path)
        assert cfg == CFG and tree.flatten(params).keys() == tree.flatten(PARAMS).keys()
