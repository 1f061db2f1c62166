"""T5's and CLIP's files: where a config says that they are, whether they serve, and their weights read by rows."""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flux_func.models import layers

# (first, last) to those rows of a leaf, on the CPU and in the stored type.
Rows = Callable[[int, int], Tensor]

# The tree's two branches: in diffusers' layout the folders of the model and of its tokenizer; model_type in config.json
# and class of the model; the files of which one holds the vocabulary.
PARTS = {
    "t5": ("text_encoder_2", "tokenizer_2", "t5", "T5EncoderModel", ("tokenizer.json", "spiece.model")),
    "clip": ("text_encoder", "tokenizer", "clip_text_model", "CLIPTextModel", ("tokenizer.json", "vocab.json")),
}
_LAYER = re.compile(r"(text_model\.)?encoder\.(block|layers)\.")
# What T5's embedding may be called in a file, where it is tied to others.
_T5_ALIASES = {"shared.weight": "encoder.embed_tokens.weight"}


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
        layers.check_numbers(self)


def model_class(part: str) -> type:
    """Returns transformers' class of a part's model."""
    import transformers

    return getattr(transformers, PARTS[part][3])


def t5_rows(cfg: TextConfig, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Rows]:
    """Returns what reads T5's leaves, once their names and shapes are checked; nothing of them is read yet.

    Raises:
      ValueError: as `text.load`; also when rows are read, and the file has gone meanwhile.
    """
    from safetensors import safe_open

    model_at, _ = _folders(cfg, "t5")
    _check_not_pickled(cfg, "t5", model_at)
    what = model_at or "the model"
    with _naming(cfg, "t5", what):
        found = _tensors(_on_disk(cfg, "t5", model_at))
    places = {path: found.get(path, found.get(_T5_ALIASES.get(path))) for path in wanted}
    lacking = [path for path, place in places.items() if place is None or place[2] != wanted[path]]
    _check_names(cfg, "t5", what, lacking, found.keys() - wanted.keys())

    def rows(path: str, first: int, last: int) -> Tensor:
        file, name, _ = places[path]
        with _naming(cfg, "t5", what), safe_open(file, "pt") as tensors:
            return tensors.get_slice(name)[first:last]

    return {path: functools.partial(rows, path) for path in wanted}


def _tensors(folder: str) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Returns {name: (file, name, shape)} of the safetensors files in a folder, as transformers names them."""
    from safetensors import safe_open

    names = ["model.safetensors"]
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    found = {}
    for path in (os.path.join(folder, os.path.basename(name)) for name in names):
        with safe_open(path, "pt") as tensors:
            found |= {name: (path, name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.offset_keys()}
    return found


def pretrained_clip(cfg: TextConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Returns transformers' CLIP with its weights; ValueError as `text.load`."""
    model_at, _ = _folders(cfg, "clip")
    _check_not_pickled(cfg, "clip", model_at)
    what = model_at or "the model"
    with _naming(cfg, "clip", what):
        model, report = model_class("clip").from_pretrained(
            _on_disk(cfg, "clip", model_at),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
        )
    lacking = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    _check_names(cfg, "clip", what, lacking, report["unexpected_keys"])
    return model


def _check_names(cfg: TextConfig, part: str, what: str, lacking: Iterable[str], unexpected: Iterable[str]) -> None:
    # A whole T5 has a decoder too, and a whole CLIP a vision model; a layer of the encoder itself must not be dropped.
    for names, said in (
        (sorted(lacking), "lacks {} tensors of the shape config.json gives"),
        (
            sorted(name for name in unexpected if _LAYER.match(name)),
            "holds {} tensors of layers beyond those config.json gives",
        ),
    ):
        if names:
            raise _fault(cfg, part, f"{what} {said.format(len(names))}, such as {names[0]}")


def _check_not_pickled(cfg: TextConfig, part: str, folder: str) -> None:
    there = os.listdir(_on_disk(cfg, part, folder))
    pickles = sorted(name for name in there if name.endswith((".bin", ".pt", ".ckpt")))
    if pickles and not any(name.endswith(".safetensors") for name in there):
        convert = f"{PARTS[part][3]}.from_pretrained(...).save_pretrained(...) makes safetensors of it"
        raise _fault(cfg, part, f"{os.path.join(folder, pickles[0])} is a pickle, and never opened ({convert})")


def read_config(cfg: TextConfig, part: str) -> Any:
    """Returns transformers' configuration of a part's model; ValueError where it does not serve."""
    from transformers import AutoConfig

    kind, (model_at, _) = PARTS[part][2], _folders(cfg, part)
    name = os.path.join(model_at, "config.json")
    _check_file(cfg, part, name)
    with _naming(cfg, part, name):
        config = AutoConfig.from_pretrained(_on_disk(cfg, part, model_at), local_files_only=True)
    # A whole CLIP's configuration holds the text model's.
    config = getattr(config, "text_config", config)
    if config.model_type != kind:
        raise _fault(cfg, part, f"model_type in {name} is {config.model_type!r}, not {kind!r}")
    return config


def read_tokenizer(cfg: TextConfig, part: str) -> Any:
    """Returns transformers' tokenizer of a part; ValueError where it cannot be read."""
    from transformers import AutoTokenizer

    vocabulary, (_, tokenizer_at) = PARTS[part][4], _folders(cfg, part)
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
    return ("", "") if getattr(cfg, part) else PARTS[part][:2]


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
