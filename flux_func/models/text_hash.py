"""Text encoders without weights: each word's hash seeds its embedding, so equal words are equal vectors, and unequal
ones nearly orthogonal."""

import functools
import hashlib
import unicodedata

import numpy as np
import torch
from torch import Tensor

from flux_func import random

_PADDING = 0


def words(caption: str) -> list[str]:
    """Returns the words of a caption in lower case; each mark of punctuation and each symbol is a word of its own.

    Letters, accents and digits of any script hold together (Unicode categories L, M and N, after NFKC).
    """

    def spaced(character: str) -> str:
        kind = unicodedata.category(character)[0]
        return character if kind in "LMN" else f" {character} " if kind in "PS" else " "

    return "".join(map(spaced, unicodedata.normalize("NFKC", caption).lower())).split()


def word_id(word: str) -> int:
    """Returns a word's token: its BLAKE2b hash as an int64 that is not 0, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little", signed=True) or 1


def tokens(captions: list[str], max_length: int, clip_length: int) -> dict[str, np.ndarray]:
    """Returns {"t5": int64 [B, max_length], "clip": int64 [B, clip_length]}: words' tokens, cut, or padded with 0."""
    rows = [[word_id(word) for word in words(caption)] for caption in captions]
    return {"t5": _padded(rows, max_length), "clip": _padded(rows, clip_length)}


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    out = np.full((len(rows), length), _PADDING, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids[:length]
    return out


def sequence(ids: np.ndarray | Tensor, width: int) -> Tensor:
    """Returns the vectors of tokens [B, L] one by one, [B, L, width]."""
    return _vectors(ids, "text.t5", width)


def pooled(ids: np.ndarray | Tensor, width: int) -> Tensor:
    """Returns one vector for all of the tokens [B, L], [B, width]: their sum over the root of their number."""
    count = (torch.as_tensor(ids) != _PADDING).sum(dim=1, keepdim=True)
    return _vectors(ids, "text.clip", width).sum(dim=1) / count.clamp(min=1).sqrt()


def _vectors(ids: np.ndarray | Tensor, purpose: str, width: int) -> Tensor:
    # [B, L] to [B, L, width], on the tokens' device; each word that occurs is looked up once.
    ids = torch.as_tensor(ids)
    distinct, where = ids.unique(return_inverse=True)
    table = np.empty((len(distinct), width), dtype=np.float32)
    for row, token in zip(table, distinct.tolist(), strict=True):
        row[:] = _vector(token, purpose, width)
    return torch.from_numpy(table).to(ids.device)[where]


@functools.lru_cache(maxsize=4096)
def _vector(token: int, purpose: str, width: int) -> np.ndarray:
    if token == _PADDING:
        return np.zeros(width, dtype=np.float32)
    return random.normal(token, purpose, 0, (width,))
