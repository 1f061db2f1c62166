"""Parameters and floating-point operations of FLUX by formula, without building the model.

The count that the field publishes: two operations per multiply-add of a matrix product, attention in full (no part of
it is masked), nothing for norms, activations and rotations, and nothing for recomputation, which is not work asked for.
The text's second linear in the last block is counted, as others count and compute it; here it is not computed, since
nobody reads it (`blocks.last_block`).
"""

from typing import NamedTuple

from flux_func.models import blocks
from flux_func.models.flux import FluxConfig


class Linear(NamedTuple):
    """The linear layers of one shape and one place in a model.

    Attributes:
      fan_in, fan_out: its weight is [fan_out, fan_in].
      uses: vectors of one sample that go through it: its tokens, or 1 where it sees the conditioning alone.
      count: how many of it the model has.
      bias: whether it has one.
      first: whether its input is data, to which no gradient is taken.
    """

    fan_in: int
    fan_out: int
    uses: int = 1
    count: int = 1
    bias: bool = True
    first: bool = False


def parameters(cfg: FluxConfig) -> int:
    """Returns how many numbers the parameter tree holds."""
    weights = sum(layer.count * layer.fan_out * (layer.fan_in + layer.bias) for layer in _linears(cfg, 1, 1))
    norms = 2 * cfg.head_dim * (2 * cfg.depth + cfg.depth_single_blocks)
    return weights + norms


def forward_flops(cfg: FluxConfig, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one sample's forward pass.

    Args:
      cfg: the model.
      image_tokens: 2x2 patches of latents, (height / 16) * (width / 16) of the image.
      text_tokens: length of the T5 sequence, padding included.
    """
    linears = _linears(cfg, image_tokens, text_tokens)
    products = sum(2 * layer.count * layer.uses * layer.fan_in * layer.fan_out for layer in linears)
    # Scores and their weighted sum: two products of [S, D] with [D, S] in every head.
    attention = 4 * (image_tokens + text_tokens) ** 2 * cfg.hidden_size
    return products + attention * (cfg.depth + cfg.depth_single_blocks)


def training_flops(cfg: FluxConfig, image_tokens: int, text_tokens: int) -> int:
    """Returns the operations of one sample's forward and backward pass; see `forward_flops`.

    The backward pass does every product twice, once for each factor's gradient: three times the forward pass, less
    the gradients that nobody takes, those to the data.
    """
    linears = _linears(cfg, image_tokens, text_tokens)
    unneeded = sum(2 * layer.count * layer.uses * layer.fan_in * layer.fan_out for layer in linears if layer.first)
    return 3 * forward_flops(cfg, image_tokens, text_tokens) - unneeded


def _linears(cfg: FluxConfig, image_tokens: int, text_tokens: int) -> list[Linear]:
    size, hidden = cfg.hidden_size, cfg.mlp_size
    both, double, single = image_tokens + text_tokens, cfg.depth, cfg.depth_single_blocks
    embedders = 2 + cfg.guidance_embed
    streams = [
        layer
        for tokens in (image_tokens, text_tokens)
        for layer in (
            Linear(size, 6 * size, count=double),
            Linear(size, 3 * size, tokens, double, bias=cfg.qkv_bias),
            Linear(size, size, tokens, double),
            Linear(size, hidden, tokens, double),
            Linear(hidden, size, tokens, double),
        )
    ]
    return [
        Linear(cfg.in_channels, size, image_tokens, first=True),
        Linear(cfg.context_in_dim, size, text_tokens, first=True),
        Linear(cfg.vec_in_dim, size, first=True),
        Linear(blocks.TIME_FEATURES, size, count=embedders - 1, first=True),
        Linear(size, size, count=embedders),
        *streams,
        Linear(size, 3 * size, count=single),
        Linear(size, 3 * size + hidden, both, single),
        Linear(size + hidden, size, both, single),
        Linear(size, 2 * size),
        Linear(size, cfg.out_channels, image_tokens),
    ]
