"""The autoencoder without weights: 16 orthonormal coefficients of each 8x8 block of pixels.

A block of an RGB image, 192 numbers, is turned into an orthonormal opponent-colour space (the part that YCbCr plays
in JPEG) and into its cosine transform (DCT-II; Ahmed, Natarajan and Rao 1974); the lowest 10 coefficients of
luminance and 3 of each chrominance in JPEG's zigzag order are kept. The 16 rows are orthonormal, so encoding is a
projection and decoding its transpose. Each coefficient is standardised by a table measured on photographs, which

    python -m flux_func.models.dct

measures again and prints.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flux_func.models.layers import at_least_float32

BLOCK = 8
_ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
# (colour, vertical frequency, horizontal frequency) of each latent channel; the colours are those of `_opponent`.
CHANNELS = tuple((color, *at) for color, count in ((0, 10), (1, 3), (2, 3)) for at in _ZIGZAG[:count])

# What `measure` gives. Means are those of the constant coefficients alone: photographs are brighter or darker on
# average, but a wave and its mirror image are equally likely. On web photographs (Conceptual 12M, 256 pixels) the
# latents' standard deviations come out between 0.8 and 1.4.
MEAN = (-2.421, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.273, 0.0, 0.0, -0.417, 0.0, 0.0)
STD = (8.296, 0.964, 1.194, 0.691, 0.555, 0.495, 0.348, 0.383, 0.393, 0.422, 2.065, 0.308, 0.381, 1.982, 0.261, 0.326)


def kernel(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Returns the orthonormal coefficients as filters [16, 3, 8, 8] (latent channel, RGB, row, column)."""
    opponent, waves = _opponent(), _waves()
    filters = [np.einsum("c,y,x->cyx", opponent[color], waves[v], waves[h]) for color, v, h in CHANNELS]
    return torch.from_numpy(np.stack(filters)).to(device, dtype)


def encode(images: Tensor) -> Tensor:
    """Returns standardised coefficients [B, 16, H/8, W/8] of images [B, 3, H, W] in [-1, 1]."""
    wide = images.to(at_least_float32(images.dtype))
    coefficients = F.conv2d(wide, kernel(wide.dtype, wide.device), stride=BLOCK)
    mean, std = _table(wide)
    return ((coefficients - mean) / std).to(images.dtype)


def decode(latents: Tensor) -> Tensor:
    """Returns the images [B, 3, H, W] of latents [B, 16, H/8, W/8]: of all that encode to them, the least in norm."""
    wide = latents.to(at_least_float32(latents.dtype))
    mean, std = _table(wide)
    return F.conv_transpose2d(wide * std + mean, kernel(wide.dtype, wide.device), stride=BLOCK).to(latents.dtype)


def measure(photographs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each coefficient, float64 [16] both, over all blocks of photographs.

    Args:
      photographs: uint8 [H, W, 3] each. They are reduced to a third by averaging 3x3 pixels: that leaves neither
        sensor's nor JPEG's traces, and as much contrast between neighbours as training images have.
    """
    columns = []
    for photograph in photographs:
        height, width = (size // (3 * BLOCK) * BLOCK for size in photograph.shape[:2])
        pixels = torch.from_numpy(photograph[: 3 * height, : 3 * width] / 127.5 - 1).permute(2, 0, 1)[None]
        columns.append(F.conv2d(F.avg_pool2d(pixels, 3), kernel(), stride=BLOCK).flatten(2)[0])
    coefficients = torch.cat(columns, dim=1).numpy()
    constant = np.array([v == h == 0 for _, v, h in CHANNELS])
    mean = np.where(constant, coefficients.mean(axis=1), 0.0)
    return mean, np.sqrt(np.square(coefficients - mean[:, None]).mean(axis=1))


def photographs() -> list[np.ndarray]:
    """Returns the photographs the table was measured on, the two that scikit-learn carries: uint8 [427, 640, 3]."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def _opponent() -> np.ndarray:
    # Rows: light, blue against yellow, red against green. Grey has no share in the last two.
    rows = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, 2.0], [1.0, -1.0, 0.0]])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _waves() -> np.ndarray:
    # Rows: the orthonormal DCT-II of 8 samples, by frequency.
    frequency, sample = np.arange(BLOCK)[:, None], np.arange(BLOCK)[None]
    rows = np.cos(np.pi * frequency * (2 * sample + 1) / (2 * BLOCK))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _table(like: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(like.new_tensor(row)[:, None, None] for row in (MEAN, STD))


if __name__ == "__main__":
    for name, row in zip(("MEAN", "STD"), measure(photographs()), strict=True):
        print(f"{name} = {tuple(np.round(row, 3).tolist())}")
