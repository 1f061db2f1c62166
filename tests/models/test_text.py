"""The text encoders with weights against transformers' own models and tokenizers."""

import dataclasses
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch

from flux_func import tree
from flux_func.models import text
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


def test_tokenizers_cross_into_spawned_processes(hf):
    tokenizers = [text.tokenizer(HASH), text.tokenizer(hf)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = [pool.apply(tokenize, (CAPTIONS,)) for tokenize in tokenizers]
    for tokenize, there in zip(tokenizers, elsewhere, strict=True):
        here = tokenize(CAPTIONS)
        assert all(np.array_equal(here[name], there[name]) for name in ("t5", "clip"))
    assert all(len(pickle.dumps(tokenize)) > 0 for tokenize in tokenizers)


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


# T5's stages.


def test_stages_are_run_as_they_are_wrapped(hf):
    params, tokens, seen = text.load(hf), text.tokenizer(hf)(CAPTIONS), []

    def wrap_stage(stage, path):
        def run(part, carry, const):
            seen.append((path, part is text.select(params["t5"], path)))
            return stage(part, carry, const)

        return run

    for found, expected in zip(
        text.encode(params, hf, tokens, wrap_stage=wrap_stage), text.encode(params, hf, tokens), strict=True
    ):
        assert torch.equal(found, expected)
    assert seen == [(path, True) for path, _ in text.t5_chain(hf)]


def test_t5_is_what_is_kept_of_it(hf):
    whole, abstract = tree.flatten(text.load(hf)), tree.flatten(text.abstract(hf, torch.bfloat16))
    kept = tree.flatten(text.load(hf, read=lambda path, rows: rows(1, 2).double()))
    assert abstract.keys() == kept.keys() == whole.keys()
    for path, leaf in whole.items():
        assert abstract[path].shape == leaf.shape and abstract[path].is_meta and abstract[path].dtype == torch.bfloat16
        assert torch.equal(kept[path], leaf[1:2].double() if path.startswith("t5.") else leaf)
