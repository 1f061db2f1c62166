"""Which weights a path holds, told from its content: `find`.

A path is a file or a folder as it comes from a hub, a program or our own training: a Hugging Face snapshot holds the
same model as BFL's file, as diffusers' folders and as links into a cache, and the one asked for is found in it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flux_func.errors import UserError
from flux_func.interop import formats, identify, merging, pipelines, safetensors_io, strangers
from flux_func.interop.safetensors_io import Tensors
from flux_func.interop.stored import Stored, part_of
from flux_func.models import flux
from flux_func.models.flux import FluxConfig
from flux_func.transforms.lora import LowRank

_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
# diffusers' classes of the parts.
_CLASSES = ("FluxTransformer2DModel", "AutoencoderKL")


def find(path: str | Path, part: str | None = None, step: int | None = None, ema: bool = False) -> Stored:
    """Returns the weights at a path, whatever their format; headers are read and checked, tensors are not read.

    Args:
      path: a safetensors file (BFL's, torchtitan's, ComfyUI's, a diffusers model's) or an index of several; a folder
        with such; a diffusers model or pipeline; a snapshot or cache of the Hugging Face hub; a torchtitan checkpoint,
        or the folder of its steps (the newest is taken); a workdir of ours, or a checkpoint in it. A run that trains a
        LoRA is the model that both make, in the type of the weights under it.
      part: "transformer" or "autoencoder"; None: the one there is, the transformer where both are.
      step, ema: of a workdir: which checkpoint (None: the newest), and the averaged weights.

    Raises:
      UserError: there is nothing, something else (the line says what), or weights that are not whole.
    """
    if part not in (None, *pipelines.FOLDERS):
        raise UserError(f"part is {part!r}: should be {' or '.join(pipelines.FOLDERS)}")
    path = Path(path).expanduser()
    if step is not None or ema:
        return _checkpoint(path, part, step, ema)
    if path.is_dir():
        return _folder(path, part)
    if not path.is_file():
        raise UserError(
            f"{path}: is a broken link" if path.is_symlink() else f"{path}: there is no such file or folder"
        )
    if path.name in ("config.json", "model_index.json", ".metadata"):
        return _folder(path.parent, part)
    if not path.name.endswith(_INDEX) and _SHARD.search(path.name):
        raise UserError(f"{path}: is one shard of several; give the folder or the index")
    return identify.stored(path, _open(path), part, _config(path.parent))


def _folder(path: Path, part: str | None) -> Stored:
    if (path / ".metadata").is_file():
        return _dcp(path, part)
    if steps := _steps(path) or _steps(path / "checkpoint"):
        return _dcp(steps[-1], part)
    if _is_ours(path):
        return _checkpoint(path, part)
    if (path / "snapshots").is_dir():
        return _folder(_snapshot(path), part)
    if any((inner := path / pipelines.FOLDERS[part or "transformer"]).glob("*.safetensors*")):
        return _folder(inner, part or "transformer")
    saved = _config(path)
    _check_class(path, saved, part)
    chosen = _choose(path, part, saved)
    return identify.stored(chosen if saved is None else path, _open(chosen), part, saved)


def _checkpoint(path: Path, part: str | None, step: int | None = None, ema: bool = False) -> Stored:
    from flux_func.interop import orbax  # late: it takes seconds

    trained = orbax.open_lora(path, step, ema)
    stored = _adapted(path, *trained) if trained else orbax.open_checkpoint(path, step, ema)
    there = part_of(stored.cfg)
    if part not in (None, there):
        raise UserError(f"{path}: is a checkpoint of the {there}; the {part} is wanted, give its path")
    return stored


def _adapted(path: Path, cfg: FluxConfig, config: Mapping[str, Any], updates: Mapping[str, LowRank]) -> Stored:
    """Returns the model of a run that trains a LoRA, `updates`, of the weights that its config names, or drew."""
    given = config["model"]["weights"]
    if given:
        try:
            base = find(given, "transformer")
        except UserError as error:
            said = str(error).removeprefix(f"{given}: ")
            raise UserError(
                f"{path}: adapts the weights of model.weights {given!r}, which cannot be read: {said}"
            ) from error
        if replace(base.cfg, qk_norm_eps=cfg.qk_norm_eps) != cfg:
            raise UserError(f"{path}: adapts the weights of model.weights {given!r}, which are of another model by now")
    else:
        layout = formats.layout(cfg, "bfl")
        rows = flux.drawing(cfg, config["train"]["seed"], config["model"]["init"])
        base = Stored(str(path), "orbax", cfg, layout, dict.fromkeys(layout.theirs, torch.float32), rows)
    stored = merging.merged(base, [merging.Adapter(str(path), updates)])
    return replace(stored, path=str(path), format="orbax", cfg=cfg)


def _is_ours(path: Path) -> bool:
    # Other programs have folders named checkpoints too; in ours they are numbers.
    steps = [path] if path.parent.name == "checkpoints" else (path / "checkpoints").glob("*")
    return any(step.name.isdigit() for step in steps)


# Folders of safetensors files.


def _choose(folder: Path, part: str | None, saved: Mapping[str, Any] | None) -> Path:
    """Returns the file or index in a folder that holds the part."""
    indices = sorted(folder.glob(f"*{_INDEX}"))
    files = [file for file in sorted(folder.glob("*.safetensors")) if not _SHARD.search(file.name)]
    candidates = indices + files
    if saved is not None:
        candidates = [file for file in candidates if file.name.startswith("diffusion_pytorch_model.s")] or candidates
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UserError(f"{folder}: {_absence(folder)}")
    parts = {file: _parts(file) for file in candidates}
    for wanted in pipelines.FOLDERS if part is None else (part,):
        fitting = [file for file in candidates if wanted in parts[file]]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = ", ".join(file.name for file in fitting)
            raise UserError(f"{folder}: holds several files of a {wanted} ({names}); give the path of one")
    names = ", ".join(file.name for file in candidates)
    raise UserError(f"{folder}: none of its files ({names}) is FLUX's {part or 'transformer or autoencoder'}")


def _parts(file: Path) -> list[str]:
    try:
        return [kind.part for kind in identify.kinds(_open(file).shapes)]
    except UserError:
        return []


def _absence(folder: Path) -> str:
    children = sorted(folder.iterdir())
    if any(_SHARD.search(file.name) for file in children):
        return f"holds shards and no index of them (*{_INDEX}); get the index too"
    for file in children:
        if file.is_file() and file.suffix in strangers.SUFFIXES:
            strangers.refuse(file)
    names = ", ".join(file.name for file in children[:5]) or "nothing"
    return f"holds no weights (but {names}); give a safetensors file or a folder with one"


def _open(path: Path) -> Tensors:
    if path.name.endswith(_INDEX):
        return safetensors_io.open_sharded(path)
    strangers.refuse(path)
    return safetensors_io.open_files([path])


def _config(folder: Path) -> dict[str, Any] | None:
    """Returns what a diffusers or transformers model's config.json says; None where there is none."""
    saved = _json(folder / "config.json")
    # Other programs have a config.json too, a workdir of ours among them.
    return saved if "_class_name" in saved or "architectures" in saved else None


def _json(path: Path) -> dict[str, Any]:
    return pipelines.read_json(path) if path.is_file() else {}


def _check_class(path: Path, saved: Mapping[str, Any] | None, part: str | None) -> None:
    if saved is None:
        pipeline = _json(path / "model_index.json").get("_class_name")
        if pipeline and not any(path.glob("*.safetensors")):
            folder = pipelines.FOLDERS[part or "transformer"]
            raise UserError(f"{path}: is a {pipeline} without safetensors files in {folder}/; FLUX.1's are read")
        return
    named = saved.get("_class_name") or saved.get("architectures")
    name = ", ".join(map(str, named)) if isinstance(named, list) else named
    if name not in _CLASSES:
        raise UserError(
            f"{path}: is a {name or 'model of no class'}, by its config.json; {' and '.join(_CLASSES)} are read"
        )
    if "quantization_config" in saved:
        raise UserError(f"{path}: is quantized, by its config.json; use the model's full weights")
    if name == "AutoencoderKL" and saved.get("latent_channels") != 16:
        raise UserError(f"{path}: is an autoencoder of {saved.get('latent_channels')} channels, FLUX.1's has 16")


def _snapshot(cache: Path) -> Path:
    """Returns the snapshot in a repository's folder of the hub's cache: main's, else the only one."""
    main = cache / "refs" / "main"
    snapshots = sorted(folder for folder in (cache / "snapshots").iterdir() if folder.is_dir())
    if main.is_file() and (found := cache / "snapshots" / main.read_text().strip()) in snapshots:
        return found
    if len(snapshots) != 1:
        raise UserError(f"{cache}: holds {len(snapshots)} snapshots; give the path of one")
    return snapshots[0]


# torchtitan's checkpoints.


def _steps(folder: Path) -> list[Path]:
    """Returns torchtitan's complete checkpoints `step-N` in a folder, the newest last."""
    found = [(re.fullmatch(r"step-(\d+)", step.parent.name), step.parent) for step in folder.glob("step-*/.metadata")]
    return [step for _, step in sorted((int(match[1]), step) for match, step in found if match)]


def _dcp(folder: Path, part: str | None) -> Stored:
    from flux_func.interop import dcp

    tensors, sidecar = dcp.open_folder(folder), folder / formats.SIDECAR
    if sidecar.is_file():
        said = {**tensors.metadata, "flux_func": json.dumps(pipelines.read_json(sidecar))}
        tensors = replace(tensors, metadata=said)
    return identify.stored(folder, tensors, part, others=True)
