"""The stages of FLUX: pure functions `(params, carry, const, ops) -> carry`, chained by `flux.chain`.

After black-forest-labs/flux, `modules/layers.py`. The carry is what is differentiated:

  into the stem   img [B, N, in_channels], txt [B, L, context_in_dim], y [B, vec_in_dim], timesteps [B], guidance [B]
  double blocks   img [B, N, C], txt [B, L, C], vec [B, C] (float32 at least)
  single blocks   stream [B, L + N, C] (text first), vec [B, C]
  into the head   img [B, N, C], vec [B, C]
  out of the head img [B, N, out_channels]

const holds what is not: `rope`, the rotary table of text and image, and `text_length`, L.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_func.models import layers
from flux_func.models.attention import split_heads
from flux_func.models.layers import Ops, Params

TIME_FEATURES = 256


def stem(params: Params, carry: dict, const: dict, ops: Ops) -> dict:
    """Embeds patches, text and conditioning; everything after it is in the parameters' type, but for vec."""
    del const
    dtype = params["img_in"]["weight"].dtype
    # A sample's conditioning is one row, whose rounding would be the same in every token of every block.
    wide = layers.at_least_float32(dtype)
    features = functools.partial(layers.timestep_embedding, dim=TIME_FEATURES)
    vec = layers.mlp_embedder(params["time_in"], features(carry["timesteps"]).to(wide), ops, "time_in")
    if "guidance_in" in params:
        vec = vec + layers.mlp_embedder(params["guidance_in"], features(carry["guidance"]).to(wide), ops, "guidance_in")
    vec = vec + layers.mlp_embedder(params["vector_in"], carry["y"].to(wide), ops, "vector_in")
    return {
        "img": ops.linear(params["img_in"], carry["img"].to(dtype), "img_in"),
        "txt": ops.linear(params["txt_in"], carry["txt"].to(dtype), "txt_in"),
        "vec": vec,
    }


def double_block(params: Params, carry: dict, const: dict, ops: Ops, heads: int, eps: float) -> dict:
    """Text and image through weights of their own, joined in attention."""
    vec, streams, mods, qkv = carry["vec"], ("txt", "img"), {}, []
    for name in streams:
        path = f"double_blocks.{name}"
        mods[name] = layers.modulation(params[f"{name}_mod"]["lin"], vec, 6, ops, f"{path}_mod.lin")
        shift, scale = mods[name][:2]
        attn = params[f"{name}_attn"]
        x = ops.linear(attn["qkv"], layers.modulate(carry[name], shift, scale), f"{path}_attn.qkv")
        q, k, v = (split_heads(part, heads) for part in x.chunk(3, dim=-1))
        qkv.append((*layers.qk_norm(attn["norm"], q, k, eps), v))
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*qkv, strict=True))
    mixed = ops.attention(layers.apply_rope(q, const["rope"]), layers.apply_rope(k, const["rope"]), v)
    lengths = [carry[name].shape[1] for name in streams]
    out = {"vec": vec}
    for name, attended in zip(streams, mixed.split(lengths, dim=1), strict=True):
        # One layout, one kernel: F.linear takes another for strided input without gradients, and other bits come out.
        path, attended = f"double_blocks.{name}", attended.contiguous()
        _, _, gate1, shift2, scale2, gate2 = mods[name]
        x = torch.addcmul(carry[name], gate1, ops.linear(params[f"{name}_attn"]["proj"], attended, f"{path}_attn.proj"))
        hidden = layers.mlp(params[f"{name}_mlp"], layers.modulate(x, shift2, scale2), ops, f"{path}_mlp")
        out[name] = torch.addcmul(x, gate2, hidden)
    return out


def join(params: Params, carry: dict, const: dict, ops: Ops) -> dict:
    """Puts text before image in one stream."""
    del params, const, ops
    return {"stream": torch.cat([carry["txt"], carry["img"]], dim=1), "vec": carry["vec"]}


def single_block(params: Params, carry: dict, const: dict, ops: Ops, heads: int, eps: float) -> dict:
    """Attention and MLP side by side on the one stream (Dehghani et al. 2023, arXiv:2302.05442)."""
    mixed, hidden, gate = _side_by_side(params, carry, const, ops, heads, eps)
    return {"stream": _added(params, carry["stream"], mixed, hidden, gate, ops), "vec": carry["vec"]}


def last_block(params: Params, carry: dict, const: dict, ops: Ops, heads: int, eps: float) -> dict:
    """The last single block: of the text, which nobody reads after it, the second linear is not computed."""
    mixed, hidden, gate = _side_by_side(params, carry, const, ops, heads, eps)
    x, mixed, hidden = (part[:, const["text_length"] :] for part in (carry["stream"], mixed, hidden))
    return {"img": _added(params, x, mixed, hidden, gate, ops), "vec": carry["vec"]}


def _side_by_side(
    params: Params, carry: dict, const: dict, ops: Ops, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns attention's output [B, L + N, C], the MLP's hidden layer [B, L + N, mlp_size] and the gate [B, 1, C]."""
    x, vec = carry["stream"], carry["vec"]
    shift, scale, gate = layers.modulation(params["modulation"]["lin"], vec, 3, ops, "single_blocks.modulation.lin")
    wide = ops.linear(params["linear1"], layers.modulate(x, shift, scale), "single_blocks.linear1")
    # All at once, and not by tensor_split: backward that is one copy.
    size = x.shape[-1]
    *qkv, hidden = wide.split([size, size, size, wide.shape[-1] - 3 * size], dim=-1)
    q, k, v = (split_heads(part, heads) for part in qkv)
    q, k = layers.qk_norm(params["norm"], q, k, eps)
    return ops.attention(layers.apply_rope(q, const["rope"]), layers.apply_rope(k, const["rope"]), v), hidden, gate


def _added(params: Params, x: Tensor, mixed: Tensor, hidden: Tensor, gate: Tensor, ops: Ops) -> Tensor:
    both = torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=-1)
    return torch.addcmul(x, gate, ops.linear(params["linear2"], both, "single_blocks.linear2"))


def head(params: Params, carry: dict, const: dict, ops: Ops) -> dict:
    """The image's tokens, modulated once more, to velocities."""
    del const
    final, adaln = params["final_layer"], "final_layer.adaLN_modulation.1"
    shift, scale = layers.modulation(final["adaLN_modulation"]["1"], carry["vec"], 2, ops, adaln)
    x = layers.modulate(carry["img"], shift, scale)
    return {"img": ops.linear(final["linear"], x, "final_layer.linear")}
