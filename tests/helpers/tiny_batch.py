"""A batch of `ff.loss`, of random numbers."""

import numpy as np
import torch


def batch(size: int = 8, height: int = 8, width: int = 8, text: int = 4) -> dict[str, torch.Tensor]:
    """Returns the same batch every time, float32."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    return dict(
        latents=normal(size, 16, height, width),
        noise=normal(size, 16, height, width),
        timesteps=torch.from_numpy(rng.random(size, dtype=np.float32)),
        txt=normal(size, text, 4096),
        y=normal(size, 768),
    )
