"""Captions as stored, dropout rates against the product of the probabilities, and tokens one thread at a time."""

import concurrent.futures
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_func import random
from flux_func.data import captions
from flux_func.data.images import Unusable
from tests.helpers.tiny_data import tokenize


@pytest.mark.parametrize("value", ["  a cat\n", ["a cat", "another"]])
def test_clean(value):
    assert captions.clean(value) == "a cat"


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "no caption"), (3, "no"), ([], "no"), (" \n", "empty"), ([""], "e")]
)
def test_what_is_no_caption(value, reason):
    with pytest.raises(Unusable, match=reason):
        captions.clean(value)


def test_caption_files():
    assert captions.from_bytes("\ufeffnaïve Ωμέγα 日本語\r\n".encode()) == "naïve Ωμέγα 日本語"
    with pytest.raises(Unusable, match="UTF-8"):
        captions.from_bytes("naïve".encode("latin-1"))


@pytest.mark.parametrize("probability", [0.1, 0.447])
def test_dropout_is_independent(probability):
    count = 20_000
    kept = np.array([[bool(c) for c in captions.drop("x", 3, p, probability)] for p in range(count)])
    t5, clip = ~kept.T
    shares = {t5.mean(): probability, clip.mean(): probability, (t5 & clip).mean(): probability**2}
    for seen, expected in shares.items():
        assert abs(seen - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
    draws = [random.uniform(3, "dropout/t5", p) < probability for p in range(200)]
    np.testing.assert_array_equal(t5[:200], draws)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**62), st.floats(0, 1), st.text(min_size=1))
def test_dropout_is_pure_and_all_or_nothing(seed, position, probability, caption):
    dropped = captions.drop(caption, seed, position, probability)
    assert dropped == captions.drop(caption, seed, position, probability)
    assert set(dropped) <= {"", caption}
    assert captions.drop(caption, seed, position, 0.0) == (caption, caption)
    assert captions.drop(caption, seed, position, 1.0) == ("", "")


def test_each_encoder_has_its_own_caption():
    t5, clip = captions.tokens(tokenize, "abc", "")
    np.testing.assert_array_equal(t5, [97, 98, 99, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(clip, [0, 0, 0])
    t5, clip = captions.tokens(tokenize, "", "abc")
    np.testing.assert_array_equal(t5, np.zeros(8))
    np.testing.assert_array_equal(clip, [-97, -98, -99])


def test_a_tokenizer_is_used_by_one_thread_at_a_time():
    inside, together = threading.Lock(), []

    def fragile(texts):
        free = inside.acquire(blocking=False)
        together.append(not free)
        out = tokenize(texts * 200)
        if free:
            inside.release()
        return out

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: captions.tokens(fragile, "a", "b"), range(64)))
    assert len(together) == 64 and not any(together)
