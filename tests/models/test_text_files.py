"""Folders of text encoders that lack something, or hold something else: each is named."""

import json
import shutil

import pytest
import torch

from flux_func import tree
from flux_func.models import text, text_files
from flux_func.models.text import TextConfig
from tests.helpers import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build(tmp_path_factory.mktemp("text") / "tiny")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to spoil, and a config that names it."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", TextConfig(kind="hf", path=str(tmp_path / "copy"), max_length=8)


def message(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("text.path is '")
    return str(caught.value)


def test_no_such_folder(tmp_path):
    for path in ("", str(tmp_path / "none"), "someone/not-here"):
        cfg = TextConfig(kind="hf", path=path)
        for call in (text.load, text.tokenizer, text.widths):
            assert f"text.path is {path!r}: there is no such folder" in message(call, cfg)


@pytest.mark.parametrize(
    ("missing", "call", "said"),
    [
        ("text_encoder/config.json", text.load, "text_encoder/config.json is missing"),
        ("text_encoder_2/config.json", text.widths, "text_encoder_2/config.json is missing"),
        ("tokenizer/tokenizer_config.json", text.tokenizer, "tokenizer/tokenizer_config.json is missing"),
        ("tokenizer_2/tokenizer_config.json", text.tokenizer, "tokenizer_2/tokenizer_config.json is missing"),
        ("tokenizer_2/tokenizer.json", text.tokenizer, "or tokenizer_2/spiece.model is missing"),
        ("tokenizer/vocab.json", text.tokenizer, "tokenizer/tokenizer.json or tokenizer/vocab.json is missing"),
        ("tokenizer/merges.txt", text.tokenizer, "tokenizer cannot be read"),
        ("text_encoder_2/model.safetensors", text.load, "text_encoder_2 cannot be read"),
    ],
)
def test_missing_files_are_named(copy, missing, call, said):
    folder, cfg = copy
    (folder / missing).unlink()
    assert said in message(call, cfg)


def test_broken_files_are_named(copy):
    folder, cfg = copy
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "text_encoder cannot be read" in message(text.load, cfg)
    (folder / "text_encoder_2" / "config.json").write_text("{")
    assert "text_encoder_2/config.json cannot be read" in message(text.load, cfg)
    (folder / "tokenizer_2" / "tokenizer.json").write_text("{")
    assert "tokenizer_2 cannot be read" in message(text.tokenizer, cfg)


def test_weights_that_lack_tensors_or_shapes_are_refused(copy):
    from safetensors.torch import load_file, save_file

    folder, cfg = copy
    path = folder / "text_encoder_2" / "model.safetensors"
    flat = load_file(path)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({key: leaf for key, leaf in flat.items() if key != name}, path, metadata={"format": "pt"})
    assert f"text_encoder_2 lacks 1 tensors of the shape config.json gives, such as {name}" in message(text.load, cfg)
    save_file({**flat, name: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    assert f"text_encoder_2 lacks 1 tensors of the shape config.json gives, such as {name}" in message(text.load, cfg)


@pytest.mark.parametrize(("name", "field"), [("text_encoder_2", "num_layers"), ("text_encoder", "num_hidden_layers")])
def test_layers_beyond_the_configuration_are_not_dropped(copy, name, field):
    folder, cfg = copy
    path = folder / name / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {field: saved[field] - 1}))
    said = message(text.load, cfg)
    assert f"{name} holds " in said and "tensors of layers beyond those config.json gives, such as encoder." in said


def test_models_in_each_others_place_are_refused(copy):
    folder, cfg = copy
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    said = "model_type in text_encoder_2/config.json is 'clip_text_model', not 't5'"
    assert said in message(text.load, cfg) and said in message(text.widths, cfg)


def test_pickles_are_never_opened(copy):
    folder, cfg = copy
    for name in ("text_encoder_2/pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (folder / name).write_bytes(b"\x80\x04.")  # beside safetensors it is not looked at
    text.load(cfg)
    (folder / "text_encoder_2/model.safetensors").unlink()
    said = "text_encoder_2/pytorch_model.bin is a pickle, and never opened (T5EncoderModel.from_pretrained(...).save_"
    assert said in message(text.load, cfg)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'bert' should be 'hash' or 'hf'"):
        TextConfig(kind="bert")


# T5's weights, by rows.


def shapes(cfg):
    return {path: tuple(leaf.shape) for path, leaf in tree.flatten(text.abstract(cfg)["t5"]).items()}


@pytest.mark.parametrize("shards", [False, True])
def test_rows_of_t5_are_those_of_its_files(tmp_path, shards):
    from transformers import T5EncoderModel

    folder = tiny_pipeline.build(tmp_path / "t5", shards=shards)
    cfg = TextConfig(kind="hf", path=str(folder))
    model = dict(T5EncoderModel.from_pretrained(folder / "text_encoder_2").named_parameters())
    rows = text_files.t5_rows(cfg, shapes(cfg))
    assert rows.keys() == model.keys()
    for path, leaf in model.items():
        for first, last in ((0, len(leaf)), (0, 1), (len(leaf) // 3, len(leaf) // 2 + 1), (len(leaf) - 1, len(leaf))):
            assert torch.equal(rows[path](first, last), leaf[first:last])


def test_an_embedding_under_the_name_it_is_tied_to_is_found(copy):
    from safetensors.torch import load_file, save_file

    folder, cfg = copy
    path = folder / "text_encoder_2" / "model.safetensors"
    flat = load_file(path)
    expected = flat.pop("shared.weight")
    save_file({**flat, "encoder.embed_tokens.weight": expected}, path, metadata={"format": "pt"})
    assert torch.equal(text.load(cfg)["t5"]["shared"]["weight"], expected)


def test_a_shard_that_is_missing_or_goes_while_it_is_read_is_named(tmp_path):
    folder = tiny_pipeline.build(tmp_path / "t5", shards=True)
    cfg = TextConfig(kind="hf", path=str(folder))
    rows = text_files.t5_rows(cfg, shapes(cfg))
    for path in sorted((folder / "text_encoder_2").glob("*.safetensors"))[1:]:
        path.unlink()
    for call in (lambda: text.load(cfg), lambda: [read(0, 1) for read in rows.values()]):
        with pytest.raises(ValueError, match="text.path is '.*': text_encoder_2 cannot be read"):
            call()
