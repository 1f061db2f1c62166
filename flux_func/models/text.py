"""Captions to what FLUX is told: a sequence `txt` (T5's last hidden state) and a vector `y` (CLIP's pooled output).

`hf` runs transformers' T5 encoder and CLIP text model as functions of a parameter tree, T5 as a chain of stages.
`hash` needs no weights: each word's hash seeds its embedding, so equal words are equal vectors and unequal words
nearly orthogonal ones.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from flux_func import random, tree

Params = dict[str, Any]
Tokens = Mapping[str, np.ndarray | Tensor]
Stage = Callable[[Params, dict, dict], dict]

# The tree's two branches: in diffusers' layout the folders of the model and of its tokenizer; model_type in config.json
# and class of the model; the files of which one holds the vocabulary.
_PARTS = {
    "t5": ("text_encoder_2", "tokenizer_2", "t5", "T5EncoderModel", ("tokenizer.json", "spiece.model")),
    "clip": ("text_encoder", "tokenizer", "clip_text_model", "CLIPTextModel", ("tokenizer.json", "vocab.json")),
}
_LAYER = re.compile(r"(text_model\.)?encoder\.(block|layers)\.")
_PADDING = 0


@dataclass(frozen=True)
class TextConfig:
    """Which text encoders, and the lengths of their sequences.

    Attributes:
      kind: "hash" or "hf".
      path: hf: a folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2, as diffusers lays it out, or
        the name of such a repository in the hub's cache on this machine.
      t5, clip: hf: where they are set, a folder (or a name in the hub's cache) of that model alone with its tokenizer
        beside it, as transformers lays it out; `path` is then not looked at for it.
      max_length: tokens of the T5 sequence.
      clip_length: tokens of the CLIP sequence.
      random_init: hf: random weights, from the config.json files alone.
      context_dim, vec_dim: hash: widths of txt and y. Those of hf are the models' own; see `widths`.
    """

    kind: str = "hash"
    path: str = ""
    t5: str = ""
    clip: str = ""
    max_length: int = 256
    clip_length: int = 77
    random_init: bool = False
    context_dim: int = 4096
    vec_dim: int = 768

    def __post_init__(self):
        if self.kind not in ("hash", "hf"):
            raise ValueError(f"kind {self.kind!r} should be 'hash' or 'hf'")


def widths(cfg: TextConfig) -> tuple[int, int]:
    """Returns the widths of txt and y; ValueError as `load` where config.json files do not serve."""
    if cfg.kind == "hash":
        return cfg.context_dim, cfg.vec_dim
    return _config(cfg, "t5").d_model, _config(cfg, "clip").hidden_size


def tokenizer(cfg: TextConfig) -> Callable[[list[str]], dict[str, np.ndarray]]:
    """Returns `tokenize(captions)`, picklable, to {"t5": int64 [B, max_length], "clip": int64 [B, clip_length]}.

    Longer captions are cut, shorter ones padded, to the whole length, as FLUX was trained. For `hash` a token is a
    word's hash and 0 is padding.

    Raises:
      ValueError: naming text.path (or text.t5, text.clip), where a tokenizer is missing there or cannot be read.
    """
    if cfg.kind == "hash":
        return functools.partial(_hash_tokens, max_length=cfg.max_length, clip_length=cfg.clip_length)
    return functools.partial(
        _hf_tokens, _hf_tokenizer(cfg, "t5"), _hf_tokenizer(cfg, "clip"), cfg.max_length, cfg.clip_length
    )


def load(
    cfg: TextConfig, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Params:
    """Returns {"t5": ..., "clip": ...}, leaves by transformers' own names, tied ones once; {} for `hash`.

    Args:
      cfg: the encoders.
      seed: of random weights, which are transformers' own initialization.
      dtype, device: of every leaf.

    Raises:
      ValueError: naming text.path (or text.t5, text.clip), where files are missing there, are pickles, cannot be read
        or hold other tensors of the encoder than config.json gives.
    """
    if cfg.kind == "hash":
        return {}
    params = {}
    for part in _PARTS:
        model = _random(cfg, part, seed) if cfg.random_init else _pretrained(cfg, part, dtype)
        leaves = {path: leaf.detach().to(device, dtype) for path, leaf in model.named_parameters()}
        params[part] = tree.unflatten(leaves)
    return params


@torch.no_grad()
def encode(params: Params, cfg: TextConfig, tokens: Tokens, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Returns (txt [B, L, context], y [B, vec]), without gradients.

    Args:
      params: the tree of `load`.
      cfg: the encoders.
      tokens: {"t5": int64 [B, L], "clip": int64 [B, K]} of `tokenizer`. Nothing is masked: padding is attended to,
        as in FLUX's training.
      dtype: of the result; None: the parameters', and float32 for `hash`.
    """
    if cfg.kind == "hash":
        txt, y = _hash_encode(cfg, tokens)
    else:
        device = tree.leaves(params)[0].device
        ids = {part: torch.as_tensor(tokens[part], device=device) for part in _PARTS}
        txt, y = _t5(params["t5"], cfg, ids["t5"]), _clip(params["clip"], cfg, ids["clip"])
    return txt.to(dtype or txt.dtype), y.to(dtype or y.dtype)


# hash


def words(caption: str) -> list[str]:
    """Returns the words of a caption in lower case; each mark of punctuation and each symbol is a word of its own.

    Letters, accents and digits of any script hold together (Unicode categories L, M and N, after NFKC).
    """

    def spaced(character: str) -> str:
        kind = unicodedata.category(character)[0]
        return character if kind in "LMN" else f" {character} " if kind in "PS" else " "

    return "".join(map(spaced, unicodedata.normalize("NFKC", caption).lower())).split()


def word_id(word: str) -> int:
    """Returns a word's token: its BLAKE2b hash as an int64 that is not 0, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little", signed=True) or 1


def _hash_tokens(captions: list[str], max_length: int, clip_length: int) -> dict[str, np.ndarray]:
    rows = [[word_id(word) for word in words(caption)] for caption in captions]
    return {"t5": _padded(rows, max_length), "clip": _padded(rows, clip_length)}


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    out = np.full((len(rows), length), _PADDING, dtype=np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids[:length]
    return out


def _hash_encode(cfg: TextConfig, tokens: Tokens) -> tuple[Tensor, Tensor]:
    txt = _vectors(tokens["t5"], "text.t5", cfg.context_dim)
    each = _vectors(tokens["clip"], "text.clip", cfg.vec_dim)
    count = (torch.as_tensor(tokens["clip"]) != _PADDING).sum(dim=1, keepdim=True)
    return txt, each.sum(dim=1) / count.clamp(min=1).sqrt()


def _vectors(ids: np.ndarray | Tensor, purpose: str, width: int) -> Tensor:
    # [B, L] to [B, L, width], on the tokens' device; each word that occurs is looked up once.
    ids = torch.as_tensor(ids)
    distinct, where = ids.unique(return_inverse=True)
    table = np.stack([_vector(token, purpose, width) for token in distinct.tolist()])
    return torch.from_numpy(table).to(ids.device)[where]


@functools.lru_cache(maxsize=4096)
def _vector(token: int, purpose: str, width: int) -> np.ndarray:
    if token == _PADDING:
        return np.zeros(width, dtype=np.float32)
    return random.normal(token, purpose, 0, (width,))


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


def _t5(params: Params, cfg: TextConfig, tokens: Tensor) -> Tensor:
    carry: dict = {}
    for path, stage in t5_chain(cfg):
        carry = stage(functools.reduce(dict.__getitem__, path.split("."), params), carry, {"tokens": tokens})
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


# hf: files


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
        return {part: _class(part)(_config(cfg, part)).eval() for part in _PARTS}


def _class(part: str) -> type:
    import transformers

    return getattr(transformers, _PARTS[part][3])


def _random(cfg: TextConfig, part: str, seed: int) -> torch.nn.Module:
    config = _config(cfg, part)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed the accelerators, that are not forked here.
        torch.default_generator.manual_seed(int(random.generator(seed, f"init/text.{part}").integers(2**63)))
        return _class(part)(config)


def _pretrained(cfg: TextConfig, part: str, dtype: torch.dtype) -> torch.nn.Module:
    _config(cfg, part)
    model_at, _ = _folders(cfg, part)
    _check_not_pickled(cfg, part, model_at)
    with _naming(cfg, part, model_at or "the model"):
        model, report = _class(part).from_pretrained(
            _on_disk(cfg, part, model_at),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
        )
    lacking = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    # A whole T5 has a decoder too, and a whole CLIP a vision model; a layer of the encoder itself must not be dropped.
    surplus = sorted(name for name in report["unexpected_keys"] if _LAYER.match(name))
    for names, what in (
        (lacking, "lacks {} tensors of the shape config.json gives"),
        (surplus, "holds {} tensors of layers beyond those config.json gives"),
    ):
        if names:
            raise _fault(cfg, part, f"{model_at or 'the model'} {what.format(len(names))}, such as {names[0]}")
    return model


def _check_not_pickled(cfg: TextConfig, part: str, folder: str) -> None:
    there = os.listdir(_on_disk(cfg, part, folder))
    pickles = sorted(name for name in there if name.endswith((".bin", ".pt", ".ckpt")))
    if pickles and not any(name.endswith(".safetensors") for name in there):
        convert = f"{_PARTS[part][3]}.from_pretrained(...).save_pretrained(...) makes safetensors of it"
        raise _fault(cfg, part, f"{os.path.join(folder, pickles[0])} is a pickle, and never opened ({convert})")


def _config(cfg: TextConfig, part: str) -> Any:
    from transformers import AutoConfig

    kind, (model_at, _) = _PARTS[part][2], _folders(cfg, part)
    name = os.path.join(model_at, "config.json")
    _check_file(cfg, part, name)
    with _naming(cfg, part, name):
        config = AutoConfig.from_pretrained(_on_disk(cfg, part, model_at), local_files_only=True)
    # A whole CLIP's configuration holds the text model's.
    config = getattr(config, "text_config", config)
    if config.model_type != kind:
        raise _fault(cfg, part, f"model_type in {name} is {config.model_type!r}, not {kind!r}")
    return config


def _hf_tokenizer(cfg: TextConfig, part: str) -> Any:
    from transformers import AutoTokenizer

    vocabulary, (_, tokenizer_at) = _PARTS[part][4], _folders(cfg, part)
    _check_file(cfg, part, os.path.join(tokenizer_at, "tokenizer_config.json"))
    # Without these AutoTokenizer makes up an empty vocabulary, and says nothing.
    _check_file(cfg, part, *(os.path.join(tokenizer_at, name) for name in vocabulary))
    with _naming(cfg, part, tokenizer_at or "the tokenizer"):
        return AutoTokenizer.from_pretrained(_on_disk(cfg, part, tokenizer_at), local_files_only=True)


def given(cfg: TextConfig, part: str) -> tuple[str, str]:
    """Returns the field that says where "t5" or "clip" is, and its value: ("text.path", "FLUX.1-dev")."""
    own = getattr(cfg, part)
    return (f"text.{part}", own) if own else ("text.path", cfg.path)


def _folders(cfg: TextConfig, part: str) -> tuple[str, str]:
    # Of the model and of the tokenizer, below the folder that is given.
    return ("", "") if getattr(cfg, part) else _PARTS[part][:2]


def _check_file(cfg: TextConfig, part: str, *names: str) -> None:
    if not any(os.path.isfile(_on_disk(cfg, part, name)) for name in names):
        raise _fault(cfg, part, " or ".join(names) + " is missing")


def _on_disk(cfg: TextConfig, part: str, name: str) -> str:
    _, path = given(cfg, part)
    if os.path.isdir(path):
        return os.path.join(path, name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return os.path.join(snapshot_download(path, local_files_only=True), name)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise _fault(cfg, part, "there is no such folder, nor such a repository in the hub's cache") from error


@contextlib.contextmanager
def _naming(cfg: TextConfig, part: str, what: str) -> Iterator[None]:
    # transformers and tokenizers raise exceptions of many types over a file that they cannot use.
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _fault(cfg, part, f"{what} cannot be read ({reason})") from error


def _fault(cfg: TextConfig, part: str, what: str) -> ValueError:
    field, path = given(cfg, part)
    whole = "a folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2, as diffusers lays it out"
    alone = f"a folder with {part.upper()} and its tokenizer, as transformers saves them"
    return ValueError(f"{field} is {path!r}: {what}; it should be {whole if field == 'text.path' else alone}")
