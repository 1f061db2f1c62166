"""T5 and CLIP, each from a folder of its own as transformers saves it: the same encodings as from diffusers' layout."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.models import text, text_files
from flux_func.models.text import TextConfig
from tests.helpers import tiny_pipeline

CAPTIONS = ["a red bird", "", "Fruit: apples, pears!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build(tmp_path_factory.mktemp("text") / "tiny")


@pytest.fixture(scope="module")
def hf(folder):
    return TextConfig(kind="hf", path=str(folder), max_length=40)


@pytest.fixture(scope="module")
def apart(folder, tmp_path_factory):
    """T5 and CLIP as transformers saves them whole, decoder and vision tower included, their tokenizers beside them."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel
    from transformers import T5ForConditionalGeneration as WholeT5

    root = tmp_path_factory.mktemp("apart")
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        both = CLIPModel(CLIPConfig(text_config=clip.config.to_dict(), vision_config=vision, projection_dim=8))
        whole = WholeT5(t5.config)
    whole.encoder.load_state_dict(t5.encoder.state_dict())
    whole.shared.load_state_dict(t5.shared.state_dict())
    own = {f"text_model.{name.removeprefix('text_model.')}": leaf for name, leaf in clip.state_dict().items()}
    assert not both.load_state_dict(own, strict=False).unexpected_keys
    for name, model, tokenizer in (("t5", whole, "tokenizer_2"), ("clip", both, "tokenizer")):
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(folder / tokenizer).save_pretrained(root / name)
    assert json.loads((root / "clip/config.json").read_text())["model_type"] == "clip"
    return root


def assert_same(cfg, reference):
    tokens, expected = text.tokenizer(cfg)(CAPTIONS), text.tokenizer(reference)(CAPTIONS)
    assert all(np.array_equal(tokens[part], expected[part]) for part in ("t5", "clip"))
    flat, own = tree.flatten(text.load(cfg)), tree.flatten(text.load(reference))
    assert flat.keys() == own.keys() and all(torch.equal(flat[path], own[path]) for path in own)
    for found, value in zip(
        text.encode(tree.unflatten(flat), cfg, tokens), text.encode(tree.unflatten(own), reference, tokens), strict=True
    ):
        assert torch.equal(found, value)


def test_t5_and_clip_from_folders_of_their_own(apart, hf):
    cfg = TextConfig(kind="hf", t5=str(apart / "t5"), clip=str(apart / "clip"), max_length=40)
    assert text.widths(cfg) == (32, 24)
    assert text_files.given(cfg, "t5") == ("text.t5", str(apart / "t5"))
    assert_same(cfg, hf)


@pytest.mark.parametrize("part", ["t5", "clip"])
def test_one_from_a_folder_of_its_own_and_the_other_from_the_pipeline(apart, hf, tmp_path, folder, part):
    shutil.copytree(folder, tmp_path / "rest")
    for name in {"t5": ("text_encoder_2", "tokenizer_2"), "clip": ("text_encoder", "tokenizer")}[part]:
        shutil.rmtree(tmp_path / "rest" / name)
    cfg = dataclasses.replace(hf, path=str(tmp_path / "rest"), **{part: str(apart / part)})
    assert_same(cfg, hf)


def test_t5_from_the_hubs_cache(apart, hf, tmp_path, monkeypatch):
    repository = tmp_path / "models--google--t5-tiny"
    shutil.copytree(apart / "t5", repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_same(dataclasses.replace(hf, t5="google/t5-tiny", clip=str(apart / "clip"), path=""), hf)


@pytest.mark.parametrize(
    ("part", "missing", "call", "said"),
    [
        (
            "t5",
            "config.json",
            text.widths,
            "config.json is missing; it should be a folder with T5 and its tokenizer",
        ),
        (
            "clip",
            "tokenizer_config.json",
            text.tokenizer,
            "tokenizer_config.json is missing; it should be a folder",
        ),
        ("t5", "tokenizer.json", text.tokenizer, "tokenizer.json or spiece.model is missing"),
        ("clip", "model.safetensors", text.load, "the model cannot be read"),
        ("t5", None, text.load, "there is no such folder, nor such a repository in the hub's cache"),
        ("clip", None, text.tokenizer, "there is no such folder, nor such a repository in the hub's cache"),
    ],
)
def test_what_is_wrong_with_a_folder_of_its_own_is_said_of_its_field(apart, hf, tmp_path, part, missing, call, said):
    path = tmp_path / part
    if missing:
        shutil.copytree(apart / part, path)
        (path / missing).unlink()
    line = message(call, dataclasses.replace(hf, **{part: str(path)}))
    assert line.startswith(f"text.{part} is '{path}': ") and said in line


def test_each_in_the_others_place_is_refused(apart, hf):
    said = "model_type in config.json is 'clip_text_model', not 't5'"
    assert said in message(text.widths, dataclasses.replace(hf, t5=str(apart / "clip")))


def message(call, cfg):
    with pytest.raises(ValueError) as caught:
        call(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)
