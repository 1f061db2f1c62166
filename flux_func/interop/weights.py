"""Weights in and out: `ff.load` and `ff.save`, and the streaming core that saving and converting share."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import diffusers, formats, recognize, safetensors_io, target
from flux_func.interop.spans import Shape
from flux_func.interop.stored import Config, Stored, cast, to_json, warn_of_left_out
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params

FORMATS = ("bfl", "diffusers", "torchtitan", "orbax")
Shapes = Mapping[str, Shape]
Types = Mapping[str, torch.dtype]
Read = Callable[[str], Tensor]
Progress = Callable[[int], object]


class Source(Protocol):
    """What can be written, such as `Stored`.

    Attributes:
      cfg: the model.
      types: {our path: type} of every leaf.
    """

    cfg: Config
    types: Mapping[str, torch.dtype]

    def rows(self, path: str, start: int, stop: int) -> Tensor:
        """Returns some rows of our leaf `path`."""
        ...


@dataclass(frozen=True)
class _Memory:
    cfg: Config
    flat: Mapping[str, Tensor]

    @property
    def types(self) -> dict[str, torch.dtype]:
        return {path: leaf.dtype for path, leaf in self.flat.items()}

    def rows(self, path: str, start: int, stop: int) -> Tensor:
        return self.flat[path][start:stop].detach().cpu()


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    part: str | None = None,
    step: int | None = None,
    ema: bool = False,
) -> tuple[Params, Config]:
    """Returns the parameters at a path, whatever their format, and their configuration.

    Args:
      path: a file or a folder, recognized by its content; see `recognize.find`.
      dtype: of every leaf; None: as stored.
      device: of every leaf.
      part: "transformer" or "autoencoder"; None: the one that is there, the transformer where both are.
      step, ema: of a run's workdir: which checkpoint (None: the newest), and the averaged weights.

    Raises:
      UserError: there are no such weights; the line says what there is.
    """
    _check_dtype(dtype)
    stored = recognize.find(path, part, step, ema)
    warn_of_left_out(stored)
    return stored.params(dtype, device), stored.cfg


def save(
    path: str | Path,
    params: Params,
    cfg: Config,
    format: str = "bfl",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a transformer's or an autoencoder's parameters in a format that other tools read.

    Args:
      path: a file that ends in .safetensors for "bfl", a folder for "diffusers" (such as `transformer/`) and for
        "orbax", either for "torchtitan" (whose own checkpoints are folders).
      params, cfg: the model.
      format: one of `FORMATS`.
      dtype: of the tensors; None: that of the parameters.
      overwrite: whether to replace what is at `path`.

    Raises:
      UserError: the parameters do not fit the configuration, the format cannot say it, or `path` cannot be written.
    """
    _check_dtype(dtype)
    flat = tree.flatten(params)
    for name, leaf in flat.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.is_meta:
            what = f"a {leaf.dtype} tensor on {leaf.device}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            raise UserError(f"params: {name} is {what}; should be a tensor of floats with values")
    wanted = formats.layout(cfg, "bfl").ours
    if unfit := tree.differences({name: tuple(leaf.shape) for name, leaf in flat.items()}, wanted):
        raise UserError(f"params: do not fit cfg: {unfit}")
    write(_Memory(cfg, flat), path, format, dtype, overwrite)


def write(
    source: Source | Stored,
    path: str | Path,
    format: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> None:
    """Writes weights in a format, a tensor at a time, beside `path` and renamed at the end.

    Args:
      source: the weights.
      path, format, dtype, overwrite: see `save`.
      progress: called with the bytes written, `bytes_needed` in all.

    Raises:
      UserError: see `save`; also a value that is too large for `dtype`. `path` is then as it was.
    """
    path, cfg = Path(path).expanduser(), source.cfg
    check(path, cfg, format)
    folders = ("checkpoints",) if format == "orbax" else ()
    target.check(path, bytes_needed(source, dtype), overwrite, folders)
    _warn_of_eps(path, cfg, format)
    layout = formats.layout(cfg, format)
    types = layout.tensor_types({name: dtype or kind for name, kind in source.types.items()})

    def read(name: str) -> Tensor:
        return cast(layout.tensor(name, source.rows), types[name], name)

    if path.suffix == ".safetensors":
        safetensors_io.write(path, layout.theirs, types, read, formats.metadata(cfg), progress, overwrite)
        return
    with target.beside(path, overwrite, folders) as folder:
        folder.mkdir()
        _WRITERS[format](folder, cfg, layout.theirs, types, read, progress)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype is {dtype!r}: should be a torch.dtype of floats, such as torch.bfloat16")


def bytes_needed(source: Source | Stored, dtype: torch.dtype | None = None) -> int:
    """Returns the bytes of all tensors in a type (None: as stored)."""
    shapes = formats.layout(source.cfg, "bfl").ours
    return sum(math.prod(shape) * (dtype or source.types[path]).itemsize for path, shape in shapes.items())


def check(path: Path, cfg: Config, format: str) -> None:
    """Raises UserError where a model cannot be written to such a path in such a format; nothing is touched."""
    if format not in FORMATS:
        raise UserError(f"format is {format!r}: it should be one of {', '.join(FORMATS)}")
    file = path.suffix == ".safetensors"
    if format == "bfl" and not file:
        raise UserError(f"{path}: a file of format bfl should end in .safetensors")
    if format in ("diffusers", "orbax") and file:
        raise UserError(f"{path}: format {format} is a folder, whose name should not end in .safetensors")
    if isinstance(cfg, AutoencoderConfig) and cfg.kind != "kl":
        raise UserError(f"cfg: an autoencoder of kind {cfg.kind!r} has no weights to save")
    if isinstance(cfg, FluxConfig):
        _check_sayable(cfg, format)


def _check_sayable(cfg: FluxConfig, format: str) -> None:
    for name, value in diffusers.FIXED.items() if format == "diffusers" else ():
        if name != "qk_norm_eps" and getattr(cfg, name) != value:
            raise UserError(
                f"format is 'diffusers': it computes with {name} {value}, this model with {getattr(cfg, name)}; use bfl"
            )


def _warn_of_eps(path: Path, cfg: Config, format: str) -> None:
    eps = formats.qk_norm_eps(format)
    # Our own checkpoints say it, and nobody else reads them.
    if isinstance(cfg, FluxConfig) and format != "orbax" and cfg.qk_norm_eps != eps:
        logging.getLogger(__name__).warning(
            "%s: this model has qk_norm_eps %g; readers of format %s use %g", path, cfg.qk_norm_eps, format, eps
        )


# What writes the folders of a format, each (folder, cfg, shapes, types, read, progress).


def _write_diffusers(folder: Path, cfg: Config, shapes: Shapes, types: Types, read: Read, progress: Progress) -> None:
    say = diffusers.transformer_json if isinstance(cfg, FluxConfig) else diffusers.vae_json
    text = json.dumps(say(cfg), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    stem = "diffusion_pytorch_model"
    safetensors_io.write_sharded(folder, stem, shapes, types, read, metadata=formats.metadata(cfg), progress=progress)


def _write_dcp(folder: Path, cfg: Config, shapes: Shapes, types: Types, read: Read, progress: Progress) -> None:
    from flux_func.interop import dcp

    dcp.write(folder, shapes, types, read, progress)
    (folder / formats.SIDECAR).write_text(json.dumps(to_json(cfg)), encoding="utf-8")


def _write_orbax(folder: Path, cfg: Config, shapes: Shapes, types: Types, read: Read, progress: Progress) -> None:
    from flux_func.interop import orbax

    orbax.write(folder, cfg, shapes, types, read, progress)


_WRITERS = {"diffusers": _write_diffusers, "torchtitan": _write_dcp, "orbax": _write_orbax}
