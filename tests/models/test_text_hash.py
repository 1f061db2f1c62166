"""The text encoders without weights against their definition."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import random
from flux_func.models import text, text_hash
from flux_func.models.text import TextConfig

HASH = TextConfig(kind="hash", max_length=6, clip_length=4)


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
