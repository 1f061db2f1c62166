"""Captions: as they are stored, prompt dropout by counted draws, and token ids."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from flux_func import random
from flux_func.data.images import Unusable

Tokenize = Callable[[list[str]], dict[str, np.ndarray]]

# Fast tokenizers refuse to be used by two threads at once, and a process reads its samples in several.
_one_at_a_time = threading.Lock()


def clean(value: Any) -> str:
    """Returns a caption without space around it: a string, or the first of a list of them.

    Raises:
      Unusable: there is none, or it is empty.
    """
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise Unusable("no caption")
    if not value.strip():
        raise Unusable("its caption is empty")
    return value.strip()


def from_bytes(data: bytes) -> str:
    """Returns the caption of a text file; Unusable as `clean`, and where it is not UTF-8."""
    try:
        return clean(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable("its caption is not UTF-8") from error


def drop(caption: str, seed: int, position: int, probability: float) -> tuple[str, str]:
    """Returns the captions for T5 and for CLIP, each emptied with `probability`, independently of the other.

    An empty caption is what classifier-free guidance steers away from; it is learned by this dropout (Ho and
    Salimans, 2022). The draws have the purposes "dropout/t5" and "dropout/clip".
    """
    dropped = [random.uniform(seed, f"dropout/{encoder}", position) < probability for encoder in ("t5", "clip")]
    return "" if dropped[0] else caption, "" if dropped[1] else caption


def tokens(tokenize: Tokenize, t5_caption: str, clip_caption: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns T5's token ids of one caption, int64 [L], and CLIP's of the other, int64 [K].

    Args:
      tokenize: captions to {"t5": int64 [B, L], "clip": int64 [B, K]}; picklable.
      t5_caption, clip_caption: as `drop` returns them.
    """
    with _one_at_a_time:
        ids = tokenize([t5_caption, clip_caption])
    return ids["t5"][0], ids["clip"][1]
