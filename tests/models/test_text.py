"""The text encoders: `hash` against its definition, `hf` against transformers' own models and tokenizers."""

import dataclasses
import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import random, tree
from flux_func.models import text, text_hash
from flux_func.models.text import TextConfig
from tests.helpers import tiny_pipeline

HASH = TextConfig(kind="hash", max_length=6, clip_length=4)
LONG = "two people and a dog walk along the beach; one carries a blue umbrella. " * 9
CAPTIONS = ["a red bird", "", LONG, "Fruit: apples, pears!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline.build(tmp_path_factory.mktemp("text") / "tiny")


@pytest.fixture(scope="module")
def hf(folder):
    return TextConfig(kind="hf", path=str(folder), max_length=40)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to spoil, and a config that names it."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", TextConfig(kind="hf", path=str(tmp_path / "copy"), max_length=8)


# hash


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A handwritten THREE", ["a", "handwritten", "three"]),
        ("it's 3.5% (really)!", ["it", "'", "s", "3", ".", "5", "%", "(", "really", ")", "!"]),
        ("snake_case\tand\nlines", ["snake", "_", "case", "and", "lines"]),
        ("Ｆｕｌｌ Žluťoučký Z\u030cluťoučký", ["full", "žluťoučký", "žluťoučký"]),
        ("हिन्दी में ☃", ["हिन्दी", "में", "☃"]),
        ("zero\u200bwidth \ud800", ["zero", "width"]),
        ("", []),
    ],
)
def test_words(caption, words):
    assert text_hash.words(caption) == words


def test_hash_tokens_are_words_hashes_cut_and_padded():
    tokens = text.tokenizer(HASH)(["One, two", "one two three four five six seven", ""])
    # BLAKE2b of the words, independent of machine and process.
    one, comma, two = -3957126355335908812, 3412811877100037126, 218224992319827701
    assert tokens["t5"].dtype == tokens["clip"].dtype == np.int64
    assert tokens["t5"][0].tolist() == [one, comma, two, 0, 0, 0]
    assert tokens["clip"][0].tolist() == [one, comma, two, 0]
    assert tokens["t5"][1].tolist()[:2] == [one, two] and 0 not in tokens["t5"][1]
    assert np.array_equal(tokens["clip"][1], tokens["t5"][1, :4])
    assert not tokens["t5"][2].any() and not tokens["clip"][2].any()


def test_hash_encoding_is_its_definition():
    tokens = text.tokenizer(HASH)(["a digit", "", "a a b c d"])
    txt, y = text.encode({}, HASH, tokens)
    assert txt.shape == (3, 6, 4096) and y.shape == (3, 768) and txt.dtype == y.dtype == torch.float32
    for row in range(3):
        for at, token in enumerate(tokens["t5"][row].tolist()):
            expected = random.normal(token, "text.t5", 0, (4096,)) if token else np.zeros(4096)
            np.testing.assert_array_equal(txt[row, at], expected)
        pooled = [random.normal(token, "text.clip", 0, (768,)) for token in tokens["clip"][row].tolist() if token]
        expected = np.sum(pooled, axis=0, dtype=np.float64) / np.sqrt(len(pooled)) if pooled else np.zeros(768)
        np.testing.assert_allclose(y[row], expected, rtol=0, atol=1e-6)


def test_hash_vectors_are_pinned():
    # Weights trained on these vectors stay usable only while the vectors stay.
    txt, y = text.encode({}, HASH, text.tokenizer(HASH)(["three"]))
    np.testing.assert_allclose(txt[0, 0, :3], [-1.479428, -1.342207, -1.566893], rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[0, :3], [1.402706, -0.239251, -0.284940], rtol=0, atol=1e-6)


def test_hash_takes_torch_tokens_and_gives_the_type_asked_for():
    cfg = dataclasses.replace(HASH, context_dim=8, vec_dim=4)
    tokens = text.tokenizer(cfg)(["one two"])
    expected = text.encode({}, cfg, tokens)
    asked = text.encode({}, cfg, {name: torch.from_numpy(ids) for name, ids in tokens.items()}, dtype=torch.bfloat16)
    for value, exact in zip(asked, expected, strict=True):
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact.bfloat16()) and not value.requires_grad
    assert text.widths(cfg) == (8, 4) and text.load(cfg) == {}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=8), min_size=2, max_size=6))
def test_different_words_are_nearly_orthogonal(candidates):
    distinct = sorted({word for candidate in candidates for word in text_hash.words(candidate)})
    cfg = dataclasses.replace(HASH, max_length=64, clip_length=64)
    txt, _ = text.encode({}, cfg, text.tokenizer(cfg)([" ".join(distinct)]))
    vectors = txt[0, : len(distinct)]
    cosines = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    assert float(vectors.std(dim=1).min()) > 0.9
    # Six standard deviations of 1/sqrt(4096).
    assert float((cosines - torch.eye(len(distinct))).abs().max()) < 6 / 64


def test_tokenizers_cross_into_spawned_processes(hf):
    tokenizers = [text.tokenizer(HASH), text.tokenizer(hf)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = [pool.apply(tokenize, (CAPTIONS,)) for tokenize in tokenizers]
    for tokenize, there in zip(tokenizers, elsewhere, strict=True):
        here = tokenize(CAPTIONS)
        assert all(np.array_equal(here[name], there[name]) for name in ("t5", "clip"))
    assert all(len(pickle.dumps(tokenize)) > 0 for tokenize in tokenizers)


# hf


def transformers_own(folder, dtype=torch.float32):
    from transformers import CLIPTextModel, T5EncoderModel

    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype).eval()
    return t5, CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()


def test_hf_tokens_equal_transformers(folder, hf):
    from transformers import AutoTokenizer

    tokens = text.tokenizer(hf)(CAPTIONS)
    for name, part, length in (("tokenizer_2", "t5", 40), ("tokenizer", "clip", 77)):
        own = AutoTokenizer.from_pretrained(folder / name)
        expected = own(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        assert tokens[part].dtype == np.int64 and np.array_equal(tokens[part], expected["input_ids"])
        # Each ends with its end-of-sequence token, cut or not; the rest is padding.
        last = [int(np.argmax(row == own.eos_token_id)) for row in tokens[part]]
        assert [row[at] for row, at in zip(tokens[part], last, strict=True)] == [own.eos_token_id] * 4
        assert last[2] == length - 1 and last[1] == (part == "clip")
        assert all((row[at + 1 :] == own.pad_token_id).all() for row, at in zip(tokens[part], last, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_hf_equals_transformers(folder, hf, dtype, tolerance):
    tokens = text.tokenizer(hf)(CAPTIONS)
    txt, y = text.encode(text.load(hf, dtype=dtype), hf, tokens)
    t5, clip = transformers_own(folder, dtype)
    with torch.no_grad():
        hidden = t5(torch.from_numpy(tokens["t5"]), attention_mask=None).last_hidden_state
        pooled = clip(torch.from_numpy(tokens["clip"]), attention_mask=None).pooler_output
    assert (txt.shape, y.shape) == ((4, 40, 32), (4, 24)) and text.widths(hf) == (32, 24)
    assert txt.dtype == y.dtype == dtype and not txt.requires_grad and not y.requires_grad
    torch.testing.assert_close(txt, hidden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y, pooled, rtol=tolerance, atol=tolerance)
    assert float(txt.std()) > 0.1 and float(y.std()) > 0.1


def test_clip_is_pooled_at_the_first_end_token(folder, hf):
    params, tokens = text.load(hf), text.tokenizer(hf)(["a red bird"])
    _, clip = transformers_own(folder)
    ids = torch.from_numpy(tokens["clip"])
    end = int((ids[0] == clip.config.eos_token_id).nonzero()[0])
    assert 1 < end < 10
    with torch.no_grad():
        expected = clip(ids).last_hidden_state[:, end]
    torch.testing.assert_close(text.encode(params, hf, tokens)[1], expected, rtol=1e-5, atol=1e-5)


def test_t5_chain_makes_the_position_bias_in_its_first_block(folder, hf):
    params, ids = text.load(hf)["t5"], torch.from_numpy(text.tokenizer(hf)(["one two"])["t5"])
    t5, _ = transformers_own(folder)
    carry, seen = {}, []
    for path, stage in text.t5_chain(hf):
        here = params
        for key in path.split("."):
            here = here[key]
        carry = stage(here, carry, {"tokens": ids})
        seen.append((path, carry.get("bias")))
    assert [path for path, _ in seen] == ["shared", "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm"]
    expected = t5.encoder.block[0].layer[0].SelfAttention.compute_bias(40, 40)
    assert seen[0][1] is None and all(torch.equal(bias, expected) for _, bias in seen[1:])


def test_hf_tree_has_each_leaf_once_under_transformers_names(folder, hf):
    flat = tree.flatten(text.load(hf))
    t5, clip = transformers_own(folder)
    names = {f"t5.{name}" for name, _ in t5.named_parameters()} | {
        f"clip.{name}" for name, _ in clip.named_parameters()
    }
    assert set(flat) == names and not any("embed_tokens" in name for name in flat)
    assert all(type(leaf) is torch.Tensor and not leaf.requires_grad for leaf in flat.values())
    assert len({leaf.data_ptr() for leaf in flat.values()}) == len(flat)


def test_hf_reads_sharded_weights(tmp_path, folder, hf):
    sharded = tiny_pipeline.build(tmp_path / "sharded", shards=True)
    assert len(list((sharded / "text_encoder_2").glob("*.safetensors"))) > 1
    flat = tree.flatten(text.load(dataclasses.replace(hf, path=str(sharded))))
    assert all(torch.equal(leaf, flat[path]) for path, leaf in tree.flatten(text.load(hf)).items())


def test_hf_random_weights_need_configs_alone(tmp_path):
    path = str(tiny_pipeline.build(tmp_path / "bare", weights=False))
    cfg = TextConfig(kind="hf", path=path, max_length=8, random_init=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (tree.flatten(text.load(cfg, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert not torch.equal(first["t5.shared.weight"], other["t5.shared.weight"])
    # transformers' own scales: 1 for T5's embedding, (width * head width)^-1/2 for its queries.
    assert float(first["t5.shared.weight"].std()) == pytest.approx(1, rel=0.05)
    query = first["t5.encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert float(query.std()) == pytest.approx((32 * 4) ** -0.5, rel=0.2)
    txt, y = text.encode(tree.unflatten(first), cfg, text.tokenizer(cfg)(CAPTIONS))
    assert bool(txt.isfinite().all()) and bool(y.isfinite().all())


def test_tiny_pipeline_fits_flux_widths(tmp_path):
    folder = tiny_pipeline.build(tmp_path / "wide", context_dim=4096, vec_dim=768, layers=1, weights=False)
    assert text.widths(TextConfig(kind="hf", path=str(folder))) == (4096, 768)


def test_hf_from_the_hubs_cache(folder, hf, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    flat = tree.flatten(text.load(dataclasses.replace(hf, path="someone/tiny")))
    assert all(torch.equal(leaf, flat[path]) for path, leaf in tree.flatten(text.load(hf)).items())


# hf: what is wrong with a folder


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
