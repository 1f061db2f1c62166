"""What named tensors are: the model, its format, and whether they are whole."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import bfl, diffusers, formats, strangers
from flux_func.interop.safetensors_io import Tensors
from flux_func.interop.spans import Shape
from flux_func.interop.stored import Config, Stored, from_json, part_of
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FLAVORS

# Prefixes of ComfyUI's files, and of the all-in-one files that hold a whole pipeline.
_TRANSFORMER, _AUTOENCODER = r"(model\.diffusion_model\.)?", r"(vae\.|first_stage_model\.)?"
_MARKS = (
    ("transformer", "bfl", _TRANSFORMER + r"(double|single)_blocks\.\d+\.(.+\.)?norm\.(query|key)_norm\.scale$"),
    (
        "transformer",
        "torchtitan",
        _TRANSFORMER + r"(double|single)_blocks\.\d+\.(.+\.)?norm\.(query|key)_norm\.weight$",
    ),
    ("transformer", "diffusers", _TRANSFORMER + r"(single_)?transformer_blocks\.\d+\.attn\."),
    ("autoencoder", "bfl", _AUTOENCODER + r"(encoder\.down|decoder\.up)\.\d+\.block\."),
    ("autoencoder", "diffusers", _AUTOENCODER + r"(encoder\.down|decoder\.up)_blocks\.\d+\.resnets\."),
)


_COUNTED = {
    ("transformer", "bfl"): (r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."),
    ("transformer", "torchtitan"): (r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."),
    ("transformer", "diffusers"): (r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."),
    ("autoencoder", "bfl"): (r"encoder\.down\.(\d+)\.", r"encoder\.down\.0\.block\.(\d+)\."),
    ("autoencoder", "diffusers"): (r"encoder\.down_blocks\.(\d+)\.", r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
}
_KL = AutoencoderConfig(kind="kl")
_PROTOTYPES = {"transformer": FLAVORS["flux-dev"], "autoencoder": _KL}
Shapes = Mapping[str, Shape]


class Kind(NamedTuple):
    """What some of a file's tensors are: a part of a pipeline, in a format, their names behind a prefix."""

    part: str
    format: str
    prefix: str


def kinds(names: Iterable[str]) -> list[Kind]:
    """Returns what the tensors of these names are; of one part once, the transformer first."""
    names, found = tuple(names), dict[str, Kind]()
    if strangers.name(names):
        return []
    for part, format, pattern in _MARKS:
        match = re.compile(pattern).match
        if part not in found and (mark := next(filter(None, map(match, names)), None)):
            found[part] = Kind(part, format, mark[1] or "")
    return list(found.values())


def stored(
    path: str | Path,
    tensors: Tensors,
    part: str | None = None,
    saved: Mapping[str, Any] | None = None,
    others: bool = False,
) -> Stored:
    """Returns the weights that tensors are.

    Args:
      path: where they are.
      tensors: those of a file or a folder.
      part: "transformer" or "autoencoder"; None: the one there is, the transformer where both are.
      saved: what the config.json beside them says.
      others: whether tensors that belong to no layer of the model are expected, as in a training checkpoint; they are
        left out. Otherwise they are an error.

    Raises:
      UserError: the tensors are something else, or not exactly those of a model.
    """
    kind = _kind(path, tensors, part)
    full = _names(path, kind, tensors.shapes, others)
    shapes = {name: tensors.shapes[full[name]] for name in full}
    dtypes = {name: tensors.dtypes[full[name]] for name in full}
    try:
        cfg = _config(kind, shapes, tensors.metadata, saved)
        layout = formats.layout(cfg, kind.format)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not tell its model: {error}; get it again") from error
    if unfit := tree.differences(shapes, layout.theirs):
        raise UserError(f"{path}: does not hold exactly the {kind.part} that it seems to be, {unfit}")
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            raise UserError(f"{path}: {name} is of type {dtype}, no weight or quantized; use the model's full weights")
    return Stored(
        path=str(path),
        format=kind.format,
        cfg=cfg,
        layout=layout,
        dtypes=dtypes,
        read=lambda name, first, last: tensors.read(full[name], first, last),
        left_out=(
            *_branches(tensors.shapes.keys() - full.values(), "tensors"),
            *_branches(tensors.metadata if others else (), "values"),
        ),
    )


def _kind(path: str | Path, tensors: Tensors, part: str | None) -> Kind:
    found = kinds(tensors.shapes)
    for kind in found:
        if part in (None, kind.part):
            return kind
    if found:
        raise UserError(f"{path}: is FLUX's {found[0].part}; its {part} is wanted, give the path of that")
    if stranger := strangers.name(tensors.shapes):
        raise UserError(f"{path}: {stranger}")
    names = ", ".join(sorted(tensors.shapes)[:3]) or "nothing"
    raise UserError(f"{path}: is not recognized as FLUX's (it holds {names} ...); give a transformer or an autoencoder")


def _names(path: str | Path, kind: Kind, names: Iterable[str], others: bool) -> dict[str, str]:
    """Returns {the format's name: the name in the file} of the tensors that are to be the model's."""
    mine = {name.removeprefix(kind.prefix): name for name in names if name.startswith(kind.prefix)}
    roots = {name.split(".")[0] for name in formats.layout(_PROTOTYPES[kind.part], kind.format).theirs}
    if strays := [name for name in names if not name.startswith(kind.prefix) and name.split(".")[0] in roots]:
        raise UserError(
            f"{path}: holds the {kind.part} behind {kind.prefix!r}, and {len(strays)} of its tensors without, such as "
            f"{min(strays)!r}; get it again, or keep one of two models"
        )
    if not others:
        return mine
    return {name: full for name, full in mine.items() if name.split(".")[0] in roots}


def _branches(names: Iterable[str], what: str) -> list[str]:
    branches = Counter(name.split(".")[0] for name in sorted(names) if name != "flux_func")
    return [f"{branch} ({count} {what})" for branch, count in branches.items()]


# The configuration: what our files say exactly, else what config.json says, else what the shapes tell.


def _config(kind: Kind, shapes: Shapes, metadata: Mapping[str, str], saved: Mapping[str, Any] | None) -> Config:
    if "flux_func" in metadata:
        cfg = from_json(json.loads(metadata["flux_func"]))
        if part_of(cfg) != kind.part:
            raise ValueError(f"it holds the {kind.part} and says that it is the {part_of(cfg)}")
        return cfg
    if saved is not None and kind.format == "diffusers":
        return diffusers.transformer_config(saved) if kind.part == "transformer" else diffusers.vae_config(saved)
    return _by_shapes(kind, shapes)


def _by_shapes(kind: Kind, shapes: Shapes) -> Config:
    def fitting(cfg: Config) -> int:
        return len(shapes.items() & formats.layout(cfg, kind.format).theirs.items())

    reason, told = None, []
    known = _known(kind, shapes)
    try:
        told = [_told(kind, shapes)]
    except KeyError as error:
        reason = f"{error} is missing"
    except (ArithmeticError, IndexError, ValueError) as error:
        reason = str(error)
    # A tensor that is missing or misshapen may be one that tells: is the rest a model that is known?
    best = max(told + known, key=fitting)
    if reason and fitting(best) < 0.9 * len(shapes):
        raise ValueError(reason)
    return best


def _told(kind: Kind, shapes: Shapes) -> Config:
    """Returns the configuration that shapes tell; raises what `bfl` does."""
    first, second = (_count(shapes, pattern) for pattern in _COUNTED[kind.part, kind.format])
    if kind.part == "autoencoder":
        return bfl.vae_config(_ours(kind, shapes, replace(_KL, ch_mult=(1,) * first, num_res_blocks=second)))
    counts = {"depth": first, "depth_single_blocks": second}
    guided = replace(FLAVORS["flux-dev"], **counts)
    cfg = bfl.transformer_config(_ours(kind, shapes, guided))
    return replace(cfg, **counts, qk_norm_eps=_eps(kind))


def _known(kind: Kind, shapes: Shapes) -> list[Config]:
    """Returns the flavors, in the variant that these tensors seem to be."""
    if kind.part == "autoencoder":
        return [_KL]
    depth, single = (_count(shapes, pattern) for pattern in _COUNTED[kind.part, kind.format])
    guided = any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in shapes)
    patches = shapes.get("img_in.weight", shapes.get("x_embedder.weight", ()))
    variant = {"depth": depth, "depth_single_blocks": single, "guidance_embed": guided, "qk_norm_eps": _eps(kind)}
    if patches[1:] in ((128,), (384,)):
        variant["in_channels"] = patches[1]
    return [replace(cfg, **variant) for cfg in FLAVORS.values()]


def _ours(kind: Kind, shapes: Shapes, prototype: Config) -> dict[str, Shape]:
    """Returns {our path: shape} of the prototype's leaves all of whose tensors are there."""
    names: dict[str, dict[str, None]] = {}
    for span in formats.layout(prototype, kind.format).spans:
        names.setdefault(span.path, {})[span.name] = None
    return {
        path: (sum(shapes[name][0] for name in parts), *shapes[next(iter(parts))][1:])
        for path, parts in names.items()
        if parts.keys() <= shapes.keys()
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """Returns how many blocks the names' indices count."""
    indices = sorted({int(found[1]) for found in map(re.compile(pattern).match, names) if found})
    # A block that is missing leaves a gap; an index far off is a name that does not belong.
    return max((index + 1 for place, index in enumerate(indices) if index < 2 * (place + 1)), default=0)


def _eps(kind: Kind) -> float:
    # ComfyUI has torchtitan's names too, behind its prefix, and BFL's epsilon.
    return formats.qk_norm_eps("bfl" if kind.prefix else kind.format)
