"""A FLUX small enough for derivatives in float64, what to ask it, and attention by its definition."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from flux_func.models import flux
from flux_func.models.layers import Ops

CFG = dataclasses.replace(
    flux.flavor("flux-tiny"),
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    context_in_dim=16,
    vec_in_dim=8,
    axes_dim=(4, 6, 6),
)
DEEPER = dataclasses.replace(CFG, depth=2, depth_single_blocks=2)
GUIDED = dataclasses.replace(CFG, guidance_embed=True)
HEIGHT, WIDTH, TEXT = 4, 6, 3


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns softmax(q k^T / sqrt(D)) v, of operations that torch differentiates as often as asked."""
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (shares @ v).transpose(1, 2).flatten(2)


NAIVE = Ops(attention=attention)
either_attention = pytest.mark.parametrize("ops", [Ops(), NAIVE], ids=["default", "naive"])


def params(cfg: flux.FluxConfig = CFG, seed: int = 0) -> dict:
    """Returns a model's parameters, float64, none of them zero."""
    return flux.init(cfg, seed, dtype=torch.float64, scheme="nonzero")


def batch(size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns a batch of `ff.loss`, float64."""
    rng = np.random.default_rng(seed)
    image, text = (size, 16, HEIGHT, WIDTH), (size, TEXT, CFG.context_in_dim)
    shapes = {"latents": image, "noise": image, "txt": text, "y": (size, CFG.vec_in_dim)}
    out = {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()}
    return {**out, "timesteps": torch.from_numpy(rng.uniform(0.2, 0.9, size))}


def no_prompt() -> dict[str, torch.Tensor]:
    """Returns encodings to guide away from."""
    rng = np.random.default_rng(7)
    shapes = {"uncond_txt": (1, TEXT, CFG.context_in_dim), "uncond_y": (1, CFG.vec_in_dim)}
    return {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()}


def column(t: torch.Tensor) -> torch.Tensor:
    """Returns [B] as [B, 1, 1, 1]."""
    return t.view(-1, 1, 1, 1)


def on_path(sample: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x_t and dx_t/dt of a batch."""
    t = column(sample["timesteps"])
    return (1 - t) * sample["latents"] + t * sample["noise"], sample["noise"] - sample["latents"]


def call(
    tree: dict,
    cfg: flux.FluxConfig,
    x: torch.Tensor,
    t: torch.Tensor,
    sample: dict[str, torch.Tensor],
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the model's output for latents x at t [B], with a batch's prompts."""
    out = flux.apply(
        tree,
        cfg,
        img=flux.patchify(x),
        img_ids=flux.image_ids(HEIGHT, WIDTH),
        txt=sample["txt"],
        txt_ids=flux.text_ids(TEXT),
        timesteps=t,
        y=sample["y"],
        guidance=guidance,
        ops=NAIVE,
    )
    return flux.unpatchify(out, HEIGHT, WIDTH)


def mean_square(error: torch.Tensor) -> torch.Tensor:
    """Returns each sample's mean of squares, [B]."""
    return error.square().mean((1, 2, 3))


def slope(fn: Callable[[float], torch.Tensor], h: float = 1e-6) -> torch.Tensor:
    """Returns the derivative of fn at 0 by the central difference of fourth order.

    The model sees a thousand times t: of second order it would be off by 2e-5 at a step that rounding allows.
    """
    return (8 * (fn(h) - fn(-h)) - (fn(2 * h) - fn(-2 * h))) / (12 * h)
