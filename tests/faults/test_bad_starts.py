"""Weights and pipelines that do not serve: exit code 2, one line that names field and remedy, and nothing written."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from flux_func import sample_main, train_main
from tests.helpers import tiny_data, tiny_pipeline, tiny_run
from tests.helpers.tiny_run import refused


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files and folders that are wrong each in its way, and one pipeline that is right."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "few").mkdir()
    for name, data in tiny_data.members(4).items():
        (root / "few" / name).write_bytes(data)
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, root / "ae.safetensors")
    lora = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}
    save_file(lora, root / "lora.safetensors")
    (root / "cut.safetensors").write_bytes((root / "ae.safetensors").read_bytes()[:-4])
    (root / "flux.pt").write_bytes(b"\x80\x04K\x01.")
    tiny_pipeline.whole(root / "pipe")
    tiny_pipeline.whole(root / "fill", transformer={"in_channels": 384, "out_channels": 64})
    for name in ("sdxl", "karras"):
        shutil.copytree(root / "pipe", root / name)
    (root / "sdxl" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    scheduler = root / "karras" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"use_karras_sigmas": false', '"use_karras_sigmas": true'))
    return root


TRAINING = [
    ("model.flavor=", "model.weights is '': should name what to start from, as model.flavor is ''"),
    ("model.weights={}/none", "model.weights is '{}/none': there is no such file or folder"),
    ("model.weights={}/lora.safetensors", "model.weights is '{}/lora.safetensors': "),
    ("model.weights={}/cut.safetensors", "model.weights is '{}/cut.safetensors': is cut short"),
    ("model.weights={}/flux.pt", "model.weights is '{}/flux.pt': "),
    ("model.weights={}/ae.safetensors", "model.weights is '{}/ae.safetensors': "),
    ("model.weights={}/few", "model.weights is '{}/few': "),
    ("model.weights={}/pipe model.init=nonzero", "model.init is 'nonzero': is read only where model.weights is ''"),
    ("model.weights={0}/pipe", "model.flavor is 'flux-tiny': the weights in {0}/pipe have hidden_size 48 (not 128), "),
    (
        "model.weights={0}/pipe model.flavor= model.guidance_embed=False",
        "model.guidance_embed is False: the weights in {0}/pipe have a guidance embedding; set --config.model.guidance",
    ),
    ("model.weights={0}/fill model.flavor=", "model.weights is '{}/fill': the transformer takes 384 channels, not 64"),
    ("autoencoder.kind=kl autoencoder.path={}/flux.pt", "autoencoder.path is '{}/flux.pt': "),
    ("autoencoder.kind=kl autoencoder.path={}/pipe/transformer", "autoencoder.path is '{}/pipe/transformer': "),
    ("text.t5={}/few", "text.t5 is '{}/few': is read only where text.kind is 'hf'"),
    ("text.kind=hf text.t5={}/few", "text.path is '': should be set, as text.kind is 'hf' (or both of text.t5 and"),
    ("text.kind=hf text.path={0}/pipe text.t5={0}/none", "text.t5 is '{}/none': there is no such folder, nor such a"),
    ("text.kind=hf text.path={0}/pipe text.clip={0}/few", "text.clip is '{}/few': config.json is missing; it should"),
]


@pytest.mark.parametrize(("fields", "said"), TRAINING, ids=[fields for fields, _ in TRAINING])
def test_training_from_what_does_not_serve(tmp_path, capfd, inputs, fields, said):
    given = dict(part.format(inputs).split("=") for part in fields.split())
    line = refused(capfd, tmp_path, train_main, *tiny_run.arguments(tmp_path / "run", given))
    assert line.startswith(said.format(inputs)), line


SAMPLING = [
    ("--weights={}/none", "--weights is '{}/none': is not there; should be a pipeline's folder as diffusers saves it"),
    ("--weights={}/few", "--weights is '{}/few': has no model_index.json; should be a pipeline's folder as diffusers"),
    ("--weights={}/lora.safetensors", "--weights is '{}/lora.safetensors': is a file; should be a pipeline's folder"),
    ("--weights={}/sdxl", "--weights is '{}/sdxl': holds Stable Diffusion XL, a StableDiffusionXLPipeline; a FLUX.1 "),
    ("--weights={}/karras", "--weights is '{0}/karras': {0}/karras/scheduler/scheduler_config.json: use_karras_sigmas"),
    ("--weights={}/fill", "--weights is '{}/fill': the transformer takes 384 channels, not 64"),
    ("--weights={}/pipe --step=3", "--step is 3: is read only with --workdir; leave it out"),
    ("--weights={}/pipe --ema", "--ema is True: is read only with --workdir; leave it out"),
    ("--weights={}/pipe --steps=0", "--steps is 0: should be at least 1"),
    ("--weights=", "--workdir is None and --weights is '': give one of them"),
    ("", "--workdir is None and --weights is None: give one of them"),
]


@pytest.mark.parametrize(("arguments", "said"), SAMPLING, ids=[arguments for arguments, _ in SAMPLING])
def test_sampling_from_what_does_not_serve(tmp_path, capfd, monkeypatch, inputs, arguments, said):
    monkeypatch.chdir(tmp_path)
    line = refused(capfd, tmp_path, sample_main, *arguments.format(inputs).split(), "--prompt=a")
    assert line.startswith(said.format(inputs)), line
