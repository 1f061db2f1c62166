"""Counted draws: every random number is a function of (seed, purpose, position), and of nothing else.

The generator is Philox 4x64-10 (Salmon et al., SC 2011), counter-based: its key holds the seed and the
purpose, its counter starts at the position. Two purposes, or two positions, never share a stream, and a draw
is the same in a data worker, on any rank and after a resume.
"""

import hashlib

import numpy as np

_WORD = (1 << 64) - 1


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """Returns numpy's generator for one (seed, purpose, position).

    Args:
      seed: the run's seed, any integer of 64 bits.
      purpose: what is drawn, such as "noise" or "init/img_in.weight".
      position: up to three non-negative integers, such as a sample's position and the attempt at it.
    """
    if len(position) > 3 or any(p < 0 for p in position):
        raise ValueError(f"position must be up to three non-negative integers, got {position}")
    word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    # The lowest counter word belongs to Philox itself: 2**64 blocks of four numbers for each position.
    counter = [0, *position, *([0] * (3 - len(position)))]
    key = np.array([seed & _WORD, word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)))


def normal(seed: int, purpose: str, position: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 standard normal draws of `shape` for one position."""
    return generator(seed, purpose, position).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, purpose: str, *position: int) -> float:
    """Returns one float64 draw from [0, 1) for one position."""
    return float(generator(seed, purpose, *position).random())
