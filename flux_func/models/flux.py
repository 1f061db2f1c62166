"""FLUX: configuration, parameters, and the model as a chain of pure stages.

After black-forest-labs/flux, `model.py`: the same names, so that the tree flattened by dots is BFL's state dict.
A stage is `(params, carry, const) -> carry` (see `blocks.py`); the model is the fold of its stages over the input.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flux_func import random, tree
from flux_func.models import blocks, layers
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage, fold


@dataclass(frozen=True)
class FluxConfig:
    """The fields of BFL's FluxParams, and the epsilon of the query and key norms (torchtitan's is 1e-5)."""

    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    guidance_embed: bool = False
    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    theta: int = 10_000
    qk_norm_eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        layers.check_numbers(self)
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} should be above 0")
        if self.qk_norm_eps < 0:
            raise ValueError(f"qk_norm_eps {self.qk_norm_eps} should not be negative")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} should be a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(dim < 0 or dim % 2 for dim in self.axes_dim):
            raise ValueError(f"axes_dim {self.axes_dim} should be even numbers that add up to {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the blocks' hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)


_FLUX = FluxConfig(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=(16, 56, 56))
FLAVORS = {
    "flux-dev": FluxConfig(**{**vars(_FLUX), "guidance_embed": True}),
    "flux-schnell": _FLUX,
    "flux-debug": FluxConfig(hidden_size=1536, num_heads=12, depth=2, depth_single_blocks=2, axes_dim=(16, 56, 56)),
    "flux-digits": FluxConfig(hidden_size=192, num_heads=4, depth=2, depth_single_blocks=4, axes_dim=(16, 16, 16)),
    "flux-tiny": FluxConfig(hidden_size=128, num_heads=8, depth=2, depth_single_blocks=2, axes_dim=(4, 6, 6)),
}


def flavor(name: str) -> FluxConfig:
    """Returns the configuration of a flavor by its name; ValueError lists the names there are."""
    if name not in FLAVORS:
        raise ValueError(f"flavor {name!r} should be one of {', '.join(FLAVORS)}")
    return FLAVORS[name]


# Parameters: each leaf declared once, with its shape and how pre-training draws it.


@dataclass(frozen=True)
class Leaf:
    """One parameter: its shape, and "xavier", "small" (normal, std 0.02), "zero" or "one"."""

    shape: tuple[int, ...]
    draw: str


def _linear(fan_out: int, fan_in: int, draw: str = "xavier", bias: bool = True) -> Params:
    weight = {"weight": Leaf((fan_out, fan_in), draw)}
    return {**weight, "bias": Leaf((fan_out,), "zero")} if bias else weight


def _embedder(size: int, fan_in: int, draw: str) -> Params:
    return {"in_layer": _linear(size, fan_in, draw), "out_layer": _linear(size, size, draw)}


def _qk_norm(cfg: FluxConfig) -> Params:
    return {name: {"scale": Leaf((cfg.head_dim,), "one")} for name in ("query_norm", "key_norm")}


def _stream(cfg: FluxConfig, name: str) -> Params:
    size = cfg.hidden_size
    return {
        f"{name}_mod": {"lin": _linear(6 * size, size, "zero")},
        f"{name}_attn": {
            "qkv": _linear(3 * size, size, bias=cfg.qkv_bias),
            "norm": _qk_norm(cfg),
            "proj": _linear(size, size),
        },
        f"{name}_mlp": {"0": _linear(cfg.mlp_size, size), "2": _linear(size, cfg.mlp_size)},
    }


def _single(cfg: FluxConfig) -> Params:
    size = cfg.hidden_size
    return {
        "linear1": _linear(3 * size + cfg.mlp_size, size),
        "linear2": _linear(size, size + cfg.mlp_size),
        "norm": _qk_norm(cfg),
        "modulation": {"lin": _linear(3 * size, size, "zero")},
    }


def declare(cfg: FluxConfig) -> Params:
    """Returns the tree of `Leaf`: every parameter of the model."""
    size = cfg.hidden_size
    guidance = {"guidance_in": _embedder(size, blocks.TIME_FEATURES, "small")} if cfg.guidance_embed else {}
    return {
        "img_in": _linear(size, cfg.in_channels),
        "txt_in": _linear(size, cfg.context_in_dim),
        "time_in": _embedder(size, blocks.TIME_FEATURES, "small"),
        "vector_in": _embedder(size, cfg.vec_in_dim, "small"),
        **guidance,
        "double_blocks": [{**_stream(cfg, "img"), **_stream(cfg, "txt")} for _ in range(cfg.depth)],
        "single_blocks": [_single(cfg) for _ in range(cfg.depth_single_blocks)],
        "final_layer": {
            "linear": _linear(cfg.out_channels, size, "zero"),
            "adaLN_modulation": {"1": _linear(2 * size, size, "zero")},
        },
    }


def abstract(cfg: FluxConfig, dtype: torch.dtype = torch.float32) -> Params:
    """Returns the parameter tree on the meta device: shapes and types without memory."""
    return tree.map(lambda leaf: torch.empty(leaf.shape, dtype=dtype, device="meta"), declare(cfg))


def linears(cfg: FluxConfig) -> list[str]:
    """Returns the paths of the linears as `Ops.linear` is told them, without a block's index: one for all of a kind."""
    weights = [path for path, leaf in tree.flatten(abstract(cfg)).items() if leaf.ndim == 2]
    kinds = [re.sub(r"^(double|single)_blocks\.\d+", r"\1_blocks", path.removesuffix(".weight")) for path in weights]
    return list(dict.fromkeys(kinds))


def init(
    cfg: FluxConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scheme: str = "pretrain",
) -> Params:
    """Returns freshly drawn parameters, a pure function of (seed, path) whatever the device.

    Args:
      cfg: the model.
      seed: of the counted draws.
      dtype, device: of every leaf; draws are made in float32 on the CPU.
      scheme: "pretrain", as torchtitan and MLPerf start (Xavier-uniform linears, biases zero, time and vector
        embedders normal of 0.02, modulations and the final layer zero, norms one), or "nonzero", in which nothing is
        zero or one, so that no part of the model is invisible to a comparison.
    """
    draw = drawing(cfg, seed, scheme)
    leaves = tree.flatten(declare(cfg))
    return tree.unflatten({path: draw(path, 0, leaf.shape[0]).to(device, dtype) for path, leaf in leaves.items()})


def drawing(cfg: FluxConfig, seed: int, scheme: str) -> Callable[[str, int, int], Tensor]:
    """Returns (path, first, last) to those rows of the leaf that `init` draws, float32 [last - first, ...]."""
    if scheme not in ("pretrain", "nonzero"):
        raise ValueError(f"scheme {scheme!r} should be 'pretrain' or 'nonzero'")
    leaves = tree.flatten(declare(cfg))
    return lambda path, first, last: _draw(leaves[path], seed, f"init/{path}", scheme, first, last)


def _draw(leaf: Leaf, seed: int, purpose: str, scheme: str, first: int, last: int) -> Tensor:
    draw, row = leaf.draw, leaf.shape[1:]
    if scheme == "nonzero":
        draw = "xavier" if len(leaf.shape) == 2 else {"one": "near_one", "zero": "small"}[draw]
    if draw in ("zero", "one"):
        return torch.full((last - first, *row), float(draw == "one"))
    bound = (6 / sum(leaf.shape)) ** 0.5
    # Blocks of rows with a generator each: any process can draw its own rows without those before its first block.
    rows = max(1, 2**20 // math.prod(row))
    out = np.empty((last - first, *row), dtype=np.float32)
    for block in range(first // rows, -(-last // rows)):
        start, stop = block * rows, min((block + 1) * rows, leaf.shape[0])
        part, rng = np.empty((stop - start, *row), dtype=np.float32), random.generator(seed, purpose, block)
        if draw == "xavier":
            rng.random(out=part, dtype=np.float32)
            part *= 2 * bound
            part -= bound
        else:
            rng.standard_normal(out=part, dtype=np.float32)
            part *= 0.02 if draw == "small" else 0.1
            part += draw == "near_one"
        low, high = max(start, first), min(stop, last)
        out[low - first : high - first] = part[low - start : high - start]
    return torch.from_numpy(out)


# The chain.


def chain(cfg: FluxConfig) -> tuple[Stage, ...]:
    """Returns the model's stages in the order of the forward pass."""
    stem_keys = ("img_in", "txt_in", "time_in", "vector_in") + (("guidance_in",) if cfg.guidance_embed else ())

    def block(key: str, index: int, fn: Callable) -> Stage:
        run = functools.partial(fn, heads=cfg.num_heads, eps=cfg.qk_norm_eps)
        return Stage(f"{key}.{index}", fn.__name__, (key,), index, run)

    singles = [blocks.single_block] * cfg.depth_single_blocks
    singles[-1:] = [blocks.last_block] * len(singles[-1:])
    return (
        Stage("stem", "stem", stem_keys, None, blocks.stem),
        *(block("double_blocks", i, blocks.double_block) for i in range(cfg.depth)),
        *([Stage("join", "join", (), None, blocks.join)] if singles else []),
        *(block("single_blocks", i, fn) for i, fn in enumerate(singles)),
        Stage("head", "head", ("final_layer",), None, blocks.head),
    )


def check_params(params: Params, cfg: FluxConfig, ops: Ops = Ops()) -> None:
    """Checks that a tree is of this model: its blocks, its guidance embedding and the shapes, of one block of a kind.

    Args:
      params, cfg: the tree and the model. Leaves of other names, such as a LoRA's, are not looked at.
      ops: how stages are done. Where it wraps them leaves may be parts, gathered there, and shapes say nothing.

    Raises:
      ValueError: it is of another one.
    """
    if "img_in" not in params:
        raise ValueError(f"params have {', '.join(params) or 'nothing'}: they should be a tree as ff.init(cfg) returns")
    found = {
        "depth": len(params.get("double_blocks", ())),
        "depth_single_blocks": len(params.get("single_blocks", ())),
        "guidance_embed": "guidance_in" in params,
    }
    for name, value in found.items():
        if value != getattr(cfg, name):
            raise ValueError(f"params are of a model whose {name} is {value}, cfg's is {getattr(cfg, name)}")
    if ops.wrap_stage is not Ops.wrap_stage or torch.compiler.is_compiling():
        return
    first = {key: value[:1] if key in tree.LISTS else value for key, value in params.items()}
    shapes, expected = {path: tuple(leaf.shape) for path, leaf in tree.flatten(first).items()}, _shapes(cfg)
    known = {path: shape for path, shape in expected.items() if path in shapes}
    if unlike := tree.differences({path: shapes[path] for path in known}, known):
        raise ValueError(f"params are of another model than cfg: {unlike}")


@functools.cache
def _shapes(cfg: FluxConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all leaves, but of the first block of a kind alone."""
    least = {name: min(1, getattr(cfg, name)) for name in ("depth", "depth_single_blocks")}
    return {path: leaf.shape for path, leaf in tree.flatten(declare(dataclasses.replace(cfg, **least))).items()}


def inputs(
    cfg: FluxConfig,
    *,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timesteps: Tensor,
    y: Tensor,
    guidance: Tensor | None = None,
) -> tuple[dict, dict]:
    """Returns the chain's first carry and its const; see `apply` for the arguments and what is raised."""
    if img.ndim != 3 or txt.ndim != 3:
        raise ValueError(f"img and txt should be [B, L, C], they are {tuple(img.shape)} and {tuple(txt.shape)}")
    batch = img.shape[0]
    expected = {
        "img": (img, (batch, img.shape[1], cfg.in_channels)),
        "txt": (txt, (batch, txt.shape[1], cfg.context_in_dim)),
        "timesteps": (timesteps, (batch,)),
        "y": (y, (batch, cfg.vec_in_dim)),
    }
    if cfg.guidance_embed != (guidance is not None):
        says = "has a guidance embedding: guidance [B] is needed" if cfg.guidance_embed else "takes no guidance"
        raise ValueError(f"this model {says}")
    if guidance is not None:
        expected["guidance"] = (guidance, (batch,))
    for name, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, it should be {shape}")
    both = (txt_ids, img_ids)
    for name, ids, tokens in zip(("txt_ids", "img_ids"), both, (txt, img), strict=True):
        rest = (tokens.shape[1], len(cfg.axes_dim))
        if tuple(ids.shape) not in ((1, *rest), (batch, *rest)):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}, it should be {(batch, *rest)} or {(1, *rest)}")
    samples = max(len(ids) for ids in both)
    ids = torch.cat([ids.expand(samples, -1, -1) for ids in both], dim=1)
    table = layers.rope(ids, cfg.axes_dim, cfg.theta, img.dtype)
    return {name: value for name, (value, _) in expected.items()}, {"rope": table, "text_length": txt.shape[1]}


def apply(
    params: Params,
    cfg: FluxConfig,
    *,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timesteps: Tensor,
    y: Tensor,
    guidance: Tensor | None = None,
    ops: Ops = Ops(),
) -> Tensor:
    """Returns the velocity [B, N, out_channels] of noisy patches: BFL's `Flux.forward`.

    Args:
      params: the tree of `init`.
      cfg: the model.
      img: patches [B, N, in_channels], see `patchify`.
      img_ids: positions [B or 1, N, 3], see `image_ids`.
      txt: T5's last hidden state [B, L, context_in_dim].
      txt_ids: [B or 1, L, 3], all zero, see `text_ids`.
      timesteps: [B] in [0, 1], 1 being noise.
      y: CLIP's pooled output [B, vec_in_dim].
      guidance: [B], where the model has a guidance embedding.
      ops: how linears and attention are done.

    Raises:
      ValueError: parameters of another model, a shape that does not fit, or guidance where the model takes none or the
        other way round.
    """
    check_params(params, cfg, ops)
    carry, const = inputs(
        cfg, img=img, img_ids=img_ids, txt=txt, txt_ids=txt_ids, timesteps=timesteps, y=y, guidance=guidance
    )
    return fold(chain(cfg), params, carry, const, ops)["img"]


def patchify(latents: Tensor) -> Tensor:
    """Returns 2x2 patches in BFL's order: [B, c, h, w] to [B, (h/2)*(w/2), c*4]."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpatchify(patches: Tensor, height: int, width: int) -> Tensor:
    """Returns latents [B, c, height, width] from patches [B, (height/2)*(width/2), c*4]."""
    return rearrange(patches, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 2, w=width // 2, ph=2, pw=2)


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Returns positions (0, row, column) [1, (height/2)*(width/2), 3] of the patches of latents height x width."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    grid = torch.cartesian_prod(torch.zeros(1, dtype=rows.dtype, device=device), rows, columns)
    return grid[None].to(torch.float32)


def text_ids(length: int, device: torch.device | str | None = None) -> Tensor:
    """Returns the positions [1, length, 3] of text tokens: all zero, their order is T5's affair."""
    return torch.zeros(1, length, 3, device=device)
