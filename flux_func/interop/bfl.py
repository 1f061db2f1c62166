"""Black Forest Labs' files: `flux1-*.safetensors` and `ae.safetensors`. Their names are our paths.

After black-forest-labs/flux, `util.py`, which loads them.
"""

import math
from collections.abc import Mapping

from flux_func import tree
from flux_func.interop.spans import Layout, Shape, layout
from flux_func.models import autoencoder, flux
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig


def transformer(cfg: FluxConfig) -> Layout:
    """Returns the layout of `flux1-*.safetensors`."""
    return layout(paths(cfg), lambda path, shape: [(path, 0, shape[0])])


def vae(cfg: AutoencoderConfig) -> Layout:
    """Returns the layout of `ae.safetensors`."""
    return layout(autoencoder.shapes(cfg), lambda path, shape: [(path, 0, shape[0])])


def paths(cfg: FluxConfig) -> dict[str, Shape]:
    """Returns {dotted path: shape} of every parameter of the transformer."""
    return {path: leaf.shape for path, leaf in tree.flatten(flux.declare(cfg)).items()}


def transformer_config(shapes: Mapping[str, Shape]) -> FluxConfig:
    """Returns the configuration that the shapes of a transformer's leaves, by our paths, tell.

    Shapes do not tell how a head's dimensions are shared between text, rows and columns: that is taken from the
    flavor with heads of the same size.

    Raises:
      KeyError: a leaf that tells something is missing.
      ValueError: the shapes fit no FLUX, or no flavor has heads of this size.
    """
    hidden, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    axes = {cfg.head_dim: cfg.axes_dim for cfg in flux.FLAVORS.values()}
    if head_dim not in axes:
        known = ", ".join(map(str, sorted(axes)))
        raise ValueError(f"its heads have {head_dim} dimensions, and shapes do not tell their axes (flavors: {known})")
    mlp_size = shapes["double_blocks.0.img_mlp.0.weight"][0]
    ratio = mlp_size / hidden
    # The width is the product without its fraction, here as in BFL's code: a ratio that was rounded down misses it.
    mlp_ratio = ratio if int(hidden * ratio) == mlp_size else math.nextafter(ratio, math.inf)
    return FluxConfig(
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        depth=_count(shapes, "double_blocks"),
        depth_single_blocks=_count(shapes, "single_blocks"),
        axes_dim=axes[head_dim],
        guidance_embed="guidance_in.in_layer.weight" in shapes,
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0],
        vec_in_dim=shapes["vector_in.in_layer.weight"][1],
        context_in_dim=shapes["txt_in.weight"][1],
        mlp_ratio=mlp_ratio,
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
    )


def vae_config(shapes: Mapping[str, Shape]) -> AutoencoderConfig:
    """Returns the configuration that the shapes of an autoencoder's leaves, by our paths, tell.

    The scale and shift of the latents are FLUX's: shapes do not tell them.

    Raises:
      KeyError: a leaf that tells something is missing.
      ValueError: the shapes fit no autoencoder of FLUX's kind.
    """
    ch = shapes["encoder.conv_in.weight"][0]
    levels = range(len({path.split(".")[2] for path in shapes if path.startswith("encoder.down.")}))
    return AutoencoderConfig(
        kind="kl",
        ch=ch,
        ch_mult=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] // ch for level in levels),
        num_res_blocks=len({path.split(".")[4] for path in shapes if path.startswith("encoder.down.0.block.")}),
        z_channels=shapes["decoder.conv_in.weight"][1],
    )


def _count(shapes: Mapping[str, Shape], kind: str) -> int:
    return len({path.split(".")[1] for path in shapes if path.startswith(f"{kind}.")})
