"""diffusers' folders: `transformer/` and `vae/`, their names, and their config.json.

After huggingface/diffusers, `models/transformers/transformer_flux.py` and `models/autoencoders/autoencoder_kl.py`.
Query, key and value (and the single blocks' MLP) are tensors of their own there, and the last modulation holds scale
before shift.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flux_func.interop import bfl
from flux_func.interop.spans import Layout, Shape, layout
from flux_func.models import autoencoder
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig

# Our layers to theirs; where there are several, ours is their concatenation.
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
# diffusers has no field for these of ours, and computes with these values.
FIXED = {"mlp_ratio": 4.0, "qkv_bias": True, "theta": 10_000, "qk_norm_eps": 1e-6}
# Fields of config.json that we have none for: these values alone are FLUX's.
_TRANSFORMER_JSON = {"patch_size": 1}
_VAE_JSON = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}


def transformer(cfg: FluxConfig) -> Layout:
    """Returns the layout of `transformer/`."""

    def pieces(path: str, shape: Shape) -> Iterable[tuple[str, int, int]]:
        theirs = names(path)
        if path.startswith("final_layer.adaLN_modulation."):
            half = shape[0] // 2
            return [(theirs[0], half, half), (theirs[0], 0, half)]
        if len(theirs) == 1:
            return [(theirs[0], 0, shape[0])]
        sizes = [cfg.hidden_size] * 3 + [cfg.mlp_size] * (len(theirs) - 3)
        return [(name, 0, size) for name, size in zip(theirs, sizes, strict=True)]

    return layout(bfl.paths(cfg), pieces)


def names(path: str) -> tuple[str, ...]:
    """Returns the names of the tensors that hold one of our leaves, in the order of their rows."""
    layer, _, kind = path.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if layer in _OUTER:
        return (f"{_OUTER[layer]}.{kind}",)
    blocks, index, rest = layer.split(".", 2)
    prefix, table = _BLOCKS[blocks]
    theirs = table[rest]
    return tuple(f"{prefix}.{index}.{name}.{kind}" for name in ((theirs,) if isinstance(theirs, str) else theirs))


def transformer_json(cfg: FluxConfig) -> dict[str, Any]:
    """Returns the config.json of `transformer/`. What it has no field for (see `FIXED`) it does not say."""
    return {
        "_class_name": "FluxTransformer2DModel",
        **_TRANSFORMER_JSON,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.depth,
        "num_single_layers": cfg.depth_single_blocks,
        "attention_head_dim": cfg.head_dim,
        "num_attention_heads": cfg.num_heads,
        "joint_attention_dim": cfg.context_in_dim,
        "pooled_projection_dim": cfg.vec_in_dim,
        "guidance_embeds": cfg.guidance_embed,
        "axes_dims_rope": list(cfg.axes_dim),
    }


def transformer_config(saved: Mapping[str, Any]) -> FluxConfig:
    """Returns the configuration that the config.json of `transformer/` says; fields left out are diffusers' defaults.

    Raises:
      TypeError, ValueError: a field that cannot be.
    """
    _check(saved, _TRANSFORMER_JSON)
    heads, head_dim = saved.get("num_attention_heads", 24), saved.get("attention_head_dim", 128)
    in_channels = saved.get("in_channels", 64)
    return FluxConfig(
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=saved.get("num_layers", 19),
        depth_single_blocks=saved.get("num_single_layers", 38),
        axes_dim=tuple(saved.get("axes_dims_rope", (16, 56, 56))),
        guidance_embed=saved.get("guidance_embeds", False),
        in_channels=in_channels,
        out_channels=saved.get("out_channels") or in_channels,
        vec_in_dim=saved.get("pooled_projection_dim", 768),
        context_in_dim=saved.get("joint_attention_dim", 4096),
        **FIXED,
    )


# The autoencoder.

_VAE_LAYERS = (
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def vae(cfg: AutoencoderConfig) -> Layout:
    """Returns the layout of `vae/`: its attention's 1x1 convolutions are linears, and `up` counts from the middle."""
    ours, last = autoencoder.shapes(cfg), len(cfg.ch_mult) - 1
    table = layout(ours, lambda path, shape: [(vae_name(path, last), 0, shape[0])])
    flat = {name: shape[:2] if ".attentions." in name else shape for name, shape in table.theirs.items()}
    return Layout(ours, flat, table.spans)


def vae_name(path: str, last: int) -> str:
    """Returns the name of the tensor that holds one of the autoencoder's leaves, whose levels are 0 to `last`."""
    name = re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{last - int(found[1])}.", path)
    for ours, theirs in _VAE_LAYERS:
        name = re.sub(ours, theirs, name)
    return name


def vae_json(cfg: AutoencoderConfig) -> dict[str, Any]:
    """Returns the config.json of `vae/`."""
    levels = len(cfg.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        **_VAE_JSON,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(cfg.widths),
        "layers_per_block": cfg.num_res_blocks,
        "latent_channels": cfg.z_channels,
        "sample_size": 1024,
        "scaling_factor": cfg.scale_factor,
        "shift_factor": cfg.shift_factor,
        "force_upcast": True,
    }


def vae_config(saved: Mapping[str, Any]) -> AutoencoderConfig:
    """Returns the configuration that the config.json of `vae/` says.

    Raises:
      KeyError, TypeError, ValueError: a field that is missing or cannot be.
    """
    _check(saved, _VAE_JSON)
    widths = saved["block_out_channels"]
    return AutoencoderConfig(
        kind="kl",
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=saved["layers_per_block"],
        z_channels=saved["latent_channels"],
        scale_factor=saved["scaling_factor"],
        shift_factor=saved["shift_factor"],
    )


def _check(saved: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for field, value in fixed.items():
        if saved.get(field, value) != value:
            raise ValueError(f"{field} in its config.json is {saved[field]!r}, FLUX's is {value!r}")
