"""Captions to what FLUX is told: a sequence `txt` (T5's last hidden state) and a vector `y` (CLIP's pooled output).

`hf` runs transformers' T5 encoder and CLIP text model as functions of a parameter tree, T5 as a chain of stages.
`hash` needs no weights (`text_hash.py`).
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from flux_func import random, tree
from flux_func.models import text_hash
from flux_func.models.text_files import (
    PARTS,
    Rows,
    TextConfig,
    model_class,
    pretrained_clip,
    read_config,
    read_tokenizer,
    t5_rows,
)

Params = dict[str, Any]
Tokens = Mapping[str, np.ndarray | Tensor]
Stage = Callable[[Params, dict, dict], dict]
WrapStage = Callable[[Stage, str], Stage]
# (dotted path of one of T5's leaves, its rows) to what is to be kept of it.
Read = Callable[[str, Rows], Tensor]


def widths(cfg: TextConfig) -> tuple[int, int]:
    """Returns the widths of txt and y; ValueError as `load` where config.json files do not serve."""
    if cfg.kind == "hash":
        return cfg.context_dim, cfg.vec_dim
    return read_config(cfg, "t5").d_model, read_config(cfg, "clip").hidden_size


def tokenizer(cfg: TextConfig) -> Callable[[list[str]], dict[str, np.ndarray]]:
    """Returns `tokenize(captions)`, picklable, to {"t5": int64 [B, max_length], "clip": int64 [B, clip_length]}.

    Longer captions are cut, shorter ones padded, to the whole length, as FLUX was trained. For `hash` a token is a
    word's hash and 0 is padding.

    Raises:
      ValueError: naming text.path (or text.t5, text.clip), where a tokenizer is missing there or cannot be read.
    """
    if cfg.kind == "hash":
        return functools.partial(text_hash.tokens, max_length=cfg.max_length, clip_length=cfg.clip_length)
    return functools.partial(
        _hf_tokens, read_tokenizer(cfg, "t5"), read_tokenizer(cfg, "clip"), cfg.max_length, cfg.clip_length
    )


def abstract(cfg: TextConfig, dtype: torch.dtype = torch.float32) -> Params:
    """Returns the tree of `load` on the meta device: shapes and types without memory; ValueError as `load`."""
    if cfg.kind == "hash":
        return {}
    modules = _modules(cfg)
    return {part: tree.unflatten({p: leaf.to(dtype) for p, leaf in _parameters(modules[part])}) for part in PARTS}


def load(
    cfg: TextConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    read: Read | None = None,
) -> Params:
    """Returns {"t5": ..., "clip": ...}, leaves by transformers' own names, tied ones once; {} for `hash`.

    T5 is read leaf by leaf, and of each no more than `read` asks for.

    Args:
      cfg: the encoders.
      seed: of random weights, which are transformers' own initialization.
      dtype, device: of every leaf.
      read: what to keep of T5's leaves, in that type and on that device; None: the whole.

    Raises:
      ValueError: naming text.path (or text.t5, text.clip), where files are missing there, are pickles, cannot be read
        or hold other tensors of the encoder than config.json gives.
    """
    if cfg.kind == "hash":
        return {}
    for part in PARTS:
        read_config(cfg, part)  # which `_modules` may remember as it was
    shapes = {path: tuple(leaf.shape) for path, leaf in _parameters(_modules(cfg)["t5"])}
    rows = _random_rows(cfg, seed) if cfg.random_init else t5_rows(cfg, shapes)
    read = read or (lambda path, rows: rows(0, shapes[path][0]).to(device, dtype, copy=True))
    t5 = {path: read(path, rows[path]) for path in shapes}
    clip = _random(cfg, "clip", seed) if cfg.random_init else pretrained_clip(cfg, dtype)
    leaves = {path: leaf.to(device, dtype) for path, leaf in _parameters(clip)}
    return {"t5": tree.unflatten(t5), "clip": tree.unflatten(leaves)}


def _parameters(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(path, leaf.detach()) for path, leaf in module.named_parameters()]


@torch.no_grad()
def encode(
    params: Params,
    cfg: TextConfig,
    tokens: Tokens,
    dtype: torch.dtype | None = None,
    wrap_stage: WrapStage | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (txt [B, L, context], y [B, vec]), without gradients.

    Args:
      params: the tree of `load`.
      cfg: the encoders.
      tokens: {"t5": int64 [B, L], "clip": int64 [B, K]} of `tokenizer`. Nothing is masked: padding is attended to,
        as in FLUX's training.
      dtype: of the result; None: the parameters', and float32 for `hash`.
      wrap_stage: (stage of `t5_chain`, its path) to the stage as it is to be run, such as one that gathers its
        parameters first.
    """
    if cfg.kind == "hash":
        txt = text_hash.sequence(tokens["t5"], cfg.context_dim)
        y = text_hash.pooled(tokens["clip"], cfg.vec_dim)
    else:
        device = tree.leaves(params)[0].device
        ids = {part: torch.as_tensor(tokens[part], device=device) for part in PARTS}
        txt, y = _t5(params["t5"], cfg, ids["t5"], wrap_stage), _clip(params["clip"], cfg, ids["clip"])
    return txt.to(dtype or txt.dtype), y.to(dtype or y.dtype)


# hf: T5


def t5_chain(cfg: TextConfig) -> tuple[tuple[str, Stage], ...]:
    """Returns T5's encoder as stages, each with the path of its parameters in the tree's branch "t5".

    A stage is `(params, carry, const) -> carry`: const holds `tokens` [B, L], the carry `hidden` [B, L, C] and, from
    the first block on, `bias` [1, H, L, L], the relative position bias, which that block's parameters make for all.
    """
    t5 = _modules(cfg)["t5"]
    blocks = ((f"encoder.block.{i}", functools.partial(_t5_block, block)) for i, block in enumerate(t5.encoder.block))
    norm = functools.partial(_t5_norm, t5.encoder.final_layer_norm)
    return ("shared", _t5_embed), *blocks, ("encoder.final_layer_norm", norm)


def select(params: Params, path: str) -> Params:
    """Returns a stage's part of the tree's branch "t5", or of one shaped as it."""
    return functools.reduce(dict.__getitem__, path.split("."), params)


def _t5(params: Params, cfg: TextConfig, tokens: Tensor, wrap_stage: WrapStage | None) -> Tensor:
    carry: dict = {}
    for path, stage in t5_chain(cfg):
        run = wrap_stage(stage, path) if wrap_stage else stage
        carry = run(select(params, path), carry, {"tokens": tokens})
    return carry["hidden"]


def _t5_embed(params: Params, carry: dict, const: dict) -> dict:
    return {**carry, "hidden": F.embedding(const["tokens"], params["weight"])}


def _t5_block(block: torch.nn.Module, params: Params, carry: dict, const: dict) -> dict:
    hidden, bias = functional_call(
        block, tree.flatten(params), (carry["hidden"],), _block_arguments(block, carry, const), strict=True
    )[:2]
    return {"hidden": hidden, "bias": bias}


def _block_arguments(block: torch.nn.Module, carry: dict, const: dict) -> dict:
    arguments = {"position_bias": carry.get("bias")}
    if "cache_position" in inspect.signature(block.forward).parameters:
        # transformers 4 reads the length for the position bias off this.
        arguments["cache_position"] = torch.arange(const["tokens"].shape[1], device=const["tokens"].device)
    return arguments


def _t5_norm(norm: torch.nn.Module, params: Params, carry: dict, const: dict) -> dict:
    del const
    return {**carry, "hidden": functional_call(norm, params, (carry["hidden"],), strict=True)}


# hf: CLIP


def _clip(params: Params, cfg: TextConfig, tokens: Tensor) -> Tensor:
    # The module's own position ids are a buffer, on the meta device as all of it.
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    arguments = {"input_ids": tokens, "position_ids": positions}
    return functional_call(_modules(cfg)["clip"], tree.flatten(params), (), arguments).pooler_output


# hf: tokens, modules and weights


def _hf_tokens(t5: Any, clip: Any, max_length: int, clip_length: int, captions: list[str]) -> dict[str, np.ndarray]:
    out = {}
    for part, tokenize, length in (("t5", t5, max_length), ("clip", clip, clip_length)):
        rows = tokenize(captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
        out[part] = np.array(rows, dtype=np.int64).reshape(len(captions), length)
    return out


@functools.lru_cache(maxsize=4)
def _modules(cfg: TextConfig) -> dict[str, torch.nn.Module]:
    # The code of the models; on the meta device, since their weights are always passed in.
    with torch.device("meta"):
        return {part: model_class(part)(read_config(cfg, part)).eval() for part in PARTS}


def _random(cfg: TextConfig, part: str, seed: int) -> torch.nn.Module:
    config = read_config(cfg, part)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators, that are not forked here.
        torch.default_generator.manual_seed(int(random.generator(seed, f"init/text.{part}").integers(2**63)))
        return model_class(part)(config)


def _random_rows(cfg: TextConfig, seed: int) -> dict[str, Rows]:
    leaves = _parameters(_random(cfg, "t5", seed))
    return {path: functools.partial(lambda leaf, first, last: leaf[first:last], leaf) for path, leaf in leaves}
