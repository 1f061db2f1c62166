"""LoRA files in the three forms they have: diffusers' (PEFT's), kohya's, and Black Forest Labs' own.

    bfl        double_blocks.0.img_attn.qkv.lora_A.weight and .lora_B.weight; no alpha, the update is B A
    diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight: query, key and value apart, as its weights are
    kohya      lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, and .alpha

A B may have a bias, `.lora_B.bias`, but not in kohya's form. What has alpha nowhere else has it in B when written. A
form that has a linear in parts is joined exactly: parts that share their A keep it, others' factors are stacked, B
block by block along its diagonal; and taken apart as exactly.

After huggingface/diffusers, `loaders/lora_conversion_utils.py` and `utils/peft_utils.py`, kohya-ss/sd-scripts,
`networks/lora_flux.py`, and black-forest-labs/flux, `modules/lora.py`.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import lora_layers, safetensors_io, strangers
from flux_func.interop.safetensors_io import Tensors
from flux_func.interop.stored import cast
from flux_func.models import flux
from flux_func.models.flux import FluxConfig
from flux_func.transforms import lora
from flux_func.transforms.lora import LowRank

FORMATS = ("bfl", "diffusers", "kohya")
# {path of a linear of ours: its update}.
Updates = Mapping[str, LowRank]

_BIAS = re.compile(r"(.+?)\.lora_B(?:\.default)?\.bias")
_SCALE = re.compile(r"(.+\.(?:query|key)_norm)\.scale|(.+\.norm_(?:added_)?[qk])\.weight")
_FACTOR = re.compile(r"(.+?)\.(?:lora_(A|B)(?:\.default)?|lora[._](down|up))\.weight")
_OF_TEXT = re.compile(r"text_encoder|lora_te|text_model|t5xxl|clip_")
# (what a name in it looks like, what a file with one is).
_OTHERS = (
    (r"dora_scale$|lora_magnitude_vector", "a DoRA, which scales weights too"),
    (r"\.lokr_", "a LoKr, of Kronecker products"),
    (r"\.hada_", "a LoHa, of Hadamard products"),
    (r"\.(oft|boft)_", "an OFT, of rotations"),
    (r"\.processor\.", "a LoRA of XLabs' kind, which has names of its own"),
)
# The same of what is beside a LoRA's factors.
_BESIDE = ((r"\.(diff|diff_b|set_weight|reshape_weight)$", "a LoRA in ComfyUI's form that changes whole weights too"),)
_ADALN = "final_layer.adaLN_modulation.1"


def load(
    path: str | Path, cfg: FluxConfig, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> lora.Lora:
    """Returns the LoRA in a file as a tree for a model.

    Args:
      path: see `read`.
      cfg: the model that it is to adapt.
      dtype, device: of the factors; None: as stored.

    Raises:
      UserError: see `read`; also a LoRA of another model, whose shapes are named.
    """
    try:
        adapter = lora.place(read(path), flux.abstract(cfg))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return tree.map(lambda leaf: cast(leaf, dtype or leaf.dtype, str(path)).to(device), adapter)


def save(
    path: str | Path,
    updates: lora.Lora | Updates,
    format: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a LoRA as a safetensors file.

    Args:
      path: of the file, which ends in .safetensors.
      updates: a LoRA's tree, or what `read` returns.
      format: one of `FORMATS`.
      dtype: of the tensors; None: as they are.
      overwrite: whether to replace a file that is there.

    Raises:
      UserError: no such format, a LoRA that adapts nothing, or a path that cannot be written.
    """
    check(path, format)
    named = tensors(updates, format)
    if not named:
        raise UserError(f"{path}: the LoRA adapts nothing")
    named = {name: cast(tensor, dtype or tensor.dtype, name) for name, tensor in named.items()}
    safetensors_io.write(
        path,
        {name: tuple(tensor.shape) for name, tensor in named.items()},
        {name: tensor.dtype for name, tensor in named.items()},
        named.__getitem__,
        {"format": "pt"},
        overwrite=overwrite,
    )


def check(path: str | Path, format: str) -> None:
    """Raises UserError where no LoRA can be written to such a path in such a format; nothing is touched."""
    if format not in FORMATS:
        raise UserError(f"format is {format!r}: a LoRA's should be one of {', '.join(FORMATS)}")
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA's file should end in .safetensors")


def tensors(updates: lora.Lora | Updates, format: str) -> dict[str, Tensor]:
    """Returns {name: tensor} of a LoRA in one of `FORMATS`, on the CPU."""
    write = {"bfl": _bfl, "diffusers": _diffusers, "kohya": _kohya}[format]
    named: dict[str, Tensor] = {}
    for path, update in lora.updates(updates).items():
        on_cpu = tree.map(lambda factor: factor.detach().cpu(), update)
        named |= {name: tensor.contiguous() for name, tensor in write(path, on_cpu)}
    return named


def read(path: str | Path) -> dict[str, LowRank]:
    """Returns {path of our linear: update} of a LoRA in any of the forms, recognized by its names, on the CPU.

    Args:
      path: a safetensors file, or a folder with one.

    Raises:
      UserError: no LoRA, one that changes more than linears by low-rank factors, one of another model than FLUX.1, or
        one that is not whole.
    """
    updates, scales = read_all(path)
    if scales:
        raise UserError(
            f"{path}: is a LoRA like FLUX.1 Canny's and Depth's, which makes another model (it holds "
            f"{next(iter(scales))!r}); merge it into its base: convert_main --from=BASE --lora=FILE ..."
        )
    return updates


def read_all(path: str | Path) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Returns what `read` does, and {our path: scale [head_dim]} of the norms of queries and keys that it replaces."""
    file = _file(Path(path).expanduser())
    strangers.refuse(file)
    stored = safetensors_io.open_files([file])
    names = [name for name in stored.shapes if not _OF_TEXT.match(name)]
    _check_kind(file, names)
    if left_out := len(stored.shapes) - len(names):
        logging.getLogger(__name__).warning(
            "%s: left out: what it changes in text encoders (%d tensors)", file, left_out
        )
    found: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, Tensor] = {}
    for name in names:
        tensor = stored.read(name, 0, (stored.shapes[name] or (1,))[0])
        if _SCALE.fullmatch(name):
            scales[name] = tensor
            continue
        layer, kind = _layer(name)
        found.setdefault(layer, {})[kind] = tensor
    alpha = _alphas(file, stored)
    updates = _joined(file, {layer: _update(file, layer, parts, alpha) for layer, parts in found.items()})
    norms = lora_layers.norms(lora_layers.blocks(scales))
    return updates, {norms[lora_layers.bare(name)]: scale for name, scale in scales.items()}


def _layer(name: str) -> tuple[str, str]:
    """Returns (name of the layer, "A", "B", "bias" or "alpha") of a tensor's name."""
    if match := _FACTOR.fullmatch(name):
        return match[1], match[2] or {"down": "A", "up": "B"}[match[3]]
    if match := _BIAS.fullmatch(name):
        return match[1], "bias"
    return name.removesuffix(".alpha"), "alpha"


def is_lora(path: str | Path) -> bool:
    """Returns whether a path is a safetensors file of a LoRA, by its names alone."""
    try:
        stored = safetensors_io.open_files([_file(Path(path).expanduser())])
    except UserError:
        return False
    return any(_FACTOR.fullmatch(name) for name in stored.shapes)


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: there is no such file or folder")
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} safetensors files; give the path of a LoRA's")
    return files[0]


def _check_kind(file: Path, names: Sequence[str]) -> None:
    is_one = any(_FACTOR.fullmatch(name) for name in names)
    for pattern, what in (*_OTHERS, *(_BESIDE if is_one else ())):
        for name in names:
            if re.search(pattern, name):
                raise UserError(f"{file}: is {what} (it holds {name!r}); LoRAs of linears are read")
    if not is_one:
        what = strangers.name(names) or f"holds none of its tensors (but {min(names, default='nothing')!r})"
        raise UserError(f"{file}: is no LoRA: {what}")
    for name in names:
        if not (any(form.fullmatch(name) for form in (_FACTOR, _BIAS, _SCALE)) or name.endswith(".alpha")):
            raise UserError(f"{file}: holds {name!r}, which is no part of a LoRA; LoRAs of linears are read")


# Reading: scales, and linears that are in parts.


def _alphas(file: Path, stored: Tensors) -> Callable[[str, int], float]:
    """Returns (name of a layer, rank) to the alpha that PEFT's configuration says, beside the tensors or the file."""
    said: dict[str, Any] = {}
    try:
        if "lora_adapter_metadata" in stored.metadata:
            packed = json.loads(stored.metadata["lora_adapter_metadata"])
            said = {key.removeprefix("transformer."): value for key, value in packed.items()}
        elif (beside := file.with_name("adapter_config.json")).is_file() and file.name == "adapter_model.safetensors":
            said = json.loads(beside.read_text())
        patterns = {**(said.get("alpha_pattern") or {}), ".*": said.get("lora_alpha")}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{file}: what it says of alpha cannot be read ({error})") from error

    def alpha(layer: str, rank: int) -> float:
        value = next(value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        if value is None:
            return float(rank)
        return float(value) * (math.sqrt(rank) if said.get("use_rslora") else 1)

    return alpha


def _update(file: Path, layer: str, parts: Mapping[str, Tensor], alpha: Callable[[str, int], float]) -> LowRank:
    if lacking := [kind for kind in ("A", "B") if kind not in parts]:
        raise UserError(f"{file}: has no {' and '.join(lacking)} for {layer!r}; get it again")
    a, b = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{file}: has A {list(a.shape)} and B {list(b.shape)} for {layer!r}; they should be [rank, in] and "
            f"[out, rank]"
        )
    bias = parts.get("bias")
    if bias is not None and tuple(bias.shape) != (b.shape[0],):
        raise UserError(f"{file}: has a bias {list(bias.shape)} for {layer!r}; beside its B it should be {[len(b)]}")
    # A factor of one is two of PEFT's ways of saying the rank; a tensor of its own is kohya's way.
    own = parts.get("alpha")
    said = alpha(lora_layers.bare(layer), a.shape[0]) if own is None else float(own.reshape(-1)[0])
    # BFL's own loader wants zeros where there is no bias.
    return LowRank(a, b, said, bias if bias is not None and bias.any() else None)


def _joined(file: Path, found: Updates) -> dict[str, LowRank]:
    """Returns {our path: update} from {a form's name: update}."""
    table = lora_layers.layers(lora_layers.blocks(found))
    parts: dict[str, dict[int, LowRank]] = {}
    for layer, update in found.items():
        if lora_layers.bare(layer) not in table:
            raise UserError(f"{file}: adapts {layer!r}, which is no linear of FLUX.1; LoRAs of FLUX.1 are read")
        path, place = table[lora_layers.bare(layer)]
        if place in parts.setdefault(path, {}) or (place < 0) != (min(parts[path], default=place) < 0):
            raise UserError(f"{file}: adapts {path} twice, the second time as {layer!r}; get another file")
        parts[path][place] = update
    return {path: of.get(-1) or _fused(file, path, of) for path, of in parts.items()}


def _fused(file: Path, path: str, parts: Mapping[int, LowRank]) -> LowRank:
    """Returns the update of our linear from those of diffusers' parts of it, which may lack some."""
    first = parts[min(parts)]
    fan_in = first.A.shape[1]
    rows = lora_layers.rows(path, fan_in, first.B.shape[0] if len(lora_layers.names(path)) == 1 else None)
    if wrong := [place for place, part in parts.items() if (part.B.shape[0], part.A.shape[1]) != (rows[place], fan_in)]:
        name, part = lora_layers.names(path)[wrong[0]], parts[wrong[0]]
        raise UserError(
            f"{file}: has A {list(part.A.shape)} and B {list(part.B.shape)} for {name!r}; beside "
            f"{lora_layers.names(path)[0]!r} they should be [rank, {fan_in}] and [{rows[wrong[0]]}, rank]"
        )
    if path == _ADALN:
        return tree.map(lambda leaf: leaf if leaf is first.A else _halves_swapped(leaf), first)
    if len(rows) == 1:
        return first
    if len({part.scale for part in parts.values()}) > 1:
        parts = {place: _plain(part) for place, part in parts.items()}
        first = parts[min(parts)]
    shared = all(torch.equal(part.A, first.A) for part in parts.values())
    ranks = [part.A.shape[0] for part in parts.values()]
    rank, start = first.A.shape[0] if shared else sum(ranks), 0
    b, bias = first.B.new_zeros(sum(rows), rank), first.B.new_zeros(sum(rows))
    for place, part in sorted(parts.items()):
        top, end = sum(rows[:place]), start + part.A.shape[0]
        b[top : top + rows[place], start:end] = part.B
        bias[top : top + rows[place]] = 0 if part.bias is None else part.bias
        start = 0 if shared else end
    a = first.A if shared else torch.cat([part.A for _, part in sorted(parts.items())])
    return LowRank(a, b, first.scale * rank, bias if bias.any() else None)


def _halves_swapped(b: Tensor) -> Tensor:
    return b.roll(b.shape[0] // 2, 0)


def _plain(update: LowRank) -> LowRank:
    """Returns the update with its scale in B: an alpha that is the rank."""
    rank = update.A.shape[0]
    if update.alpha == rank:
        return update
    bias = None if update.bias is None else update.scale * update.bias
    return LowRank(update.A, update.scale * update.B, float(rank), bias)


# Writing: (our path, update) to (name, tensor) in each form.

Named = Iterator[tuple[str, Tensor]]


def _bfl(path: str, update: LowRank) -> Named:
    update = _plain(update)
    yield f"{path}.lora_A.weight", update.A
    yield f"{path}.lora_B.weight", update.B
    # BFL's own loader leaves what a file lacks as it was drawn.
    yield f"{path}.lora_B.bias", update.B.new_zeros(update.B.shape[0]) if update.bias is None else update.bias


def _kohya(path: str, update: LowRank) -> Named:
    if update.bias is not None:
        raise UserError(
            f"format is 'kohya': has no place for the bias that the LoRA adds in {path}; use diffusers or bfl"
        )
    name = f"lora_unet_{path.replace('.', '_')}"
    yield f"{name}.lora_down.weight", update.A
    yield f"{name}.lora_up.weight", update.B
    yield f"{name}.alpha", torch.tensor(update.alpha, dtype=torch.float32)


def _diffusers(path: str, update: LowRank) -> Named:
    update = _plain(update)
    names, rows = lora_layers.names(path), lora_layers.rows(path, update.A.shape[1], update.B.shape[0])
    if path == _ADALN:
        update = tree.map(lambda leaf: leaf if leaf is update.A else _halves_swapped(leaf), update)
    for name, (part_a, part_b) in zip(names, _apart(update.A, update.B, rows), strict=True):
        yield f"transformer.{name}.lora_A.weight", part_a
        yield f"transformer.{name}.lora_B.weight", part_b
    if update.bias is not None:
        for name, part in zip(names, update.bias.split(rows), strict=True):
            yield f"transformer.{name}.lora_B.bias", part.clone()


def _apart(a: Tensor, b: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Returns (A, B) of each part of a linear: blocks of their own where B is block-diagonal, else all with one A."""
    bs, parts = b.split(list(rows)), len(rows)
    if parts > 1 and a.shape[0] % parts == 0:
        width = a.shape[0] // parts
        blocks = [part[:, i * width : (i + 1) * width] for i, part in enumerate(bs)]
        if b.any() and b.count_nonzero() == sum(block.count_nonzero() for block in blocks):
            return list(zip(a.split(width), blocks, strict=True))
    return [(a.clone(), part) for part in bs]
