"""Converting as a plan, made and checked before anything is written: which weights go where, and what is copied."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flux_func.errors import UserError
from flux_func.interop import formats, hub, merging, pipelines, recognize, target, weights
from flux_func.interop.pipelines import FOLDERS
from flux_func.interop.stored import Stored, part_of
from flux_func.models.flux import FLAVORS

PARTS = tuple(FOLDERS)
# Black Forest Labs' names of FLUX's variants, by (input channels, guidance embedding). Canny's and Depth's shapes are
# one, so that a file of theirs without a name of its own gets one for both.
_VARIANTS = {(64, True): "dev", (64, False): "schnell", (384, True): "fill-dev", (128, True): "control-dev"}
# Read and written at a time where a file is copied.
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
      to: the file or folder to be.
      format: of its weights, see `weights.FORMATS`.
      dtype: of its weights; None: as they are stored.
      stored: {place in `to`, "" for itself: weights}.
      copies: {place in `to`: file or folder to be copied as it is}.
      left_out: what the source has that is not written.
    """

    to: Path
    format: str
    dtype: torch.dtype | None
    stored: Mapping[str, Stored]
    copies: Mapping[str, Path]
    left_out: tuple[str, ...]

    def size(self) -> int:
        """Returns the bytes that `run` writes, but for headers and configurations."""
        converted = sum(weights.bytes_needed(stored, self.dtype) for stored in self.stored.values())
        return converted + sum(path.stat().st_size for path in self.files().values())

    def folders(self) -> set[str]:
        """Returns the folders that `to` will have."""
        if self.format == "orbax":
            return {"checkpoints"}
        places = {place for place in self.stored if place and not place.endswith(".safetensors")}
        return places | {os.path.dirname(place).split("/")[0] for place in self.files()}

    def files(self) -> dict[str, Path]:
        """Returns {place in `to`: file} of the copies, those in folders one by one.

        Raises:
          UserError: a folder that cannot be read, a link that leads nowhere, or back to a folder that it is in.
        """
        return {
            os.path.normpath(f"{place}/{file.relative_to(path)}"): file
            for place, path in self.copies.items()
            for file in _files(path)
        }


def plan(
    source: str,
    to: str,
    format: str,
    dtype: torch.dtype | None = None,
    part: str | None = None,
    step: int | None = None,
    ema: bool = False,
) -> Plan:
    """Finds the weights; from the hub, they are downloaded.

    Args:
      source: a path (see `recognize.find`), or an address on the hub (see `hub.fetch`).
      to: the file or folder to be.
      format: one of `weights.FORMATS`. A pipeline becomes a whole one again in "diffusers"; in "bfl" and a folder, its
        transformer and autoencoder are two files.
      dtype: of the weights; None: as they are stored.
      part: "transformer" or "autoencoder"; None: what `to` can hold.
      step, ema: of a run's folder: which checkpoint (None: the newest), and the averaged weights.

    Raises:
      UserError: there are no such weights.
    """
    if hub.is_address(to):
        raise UserError(f"{to}: nothing is written to the hub; name a file or folder here")
    target_path = Path(to) if Path(to).name not in ("", "..") else Path(to).resolve()
    if step is not None or ema:
        return _of_weights({"": recognize.find(source, part, step, ema)}, target_path, format, dtype, ())
    folder = target_path.suffix != ".safetensors" and format in ("bfl", "diffusers")
    wanted = (part,) if part else PARTS if folder else PARTS[:1]
    whole = folder and part is None and format == "diffusers"
    if hub.is_address(source):
        places, left_out = hub.fetch(source, wanted, whole), ()
    else:
        places, left_out = _places(Path(source), wanted, whole)
    if "pipeline" in places:
        return _of_pipeline(places["pipeline"], target_path, dtype)
    stored = {place: recognize.find(path, place or part) for place, path in places.items()}
    return _of_weights(stored, target_path, format, dtype, left_out)


def adapted(plan: Plan, adapters: Sequence[merging.Adapter]) -> Plan:
    """Returns the plan with LoRAs added to its transformer.

    Raises:
      UserError: there is no transformer in it, or what `merging.merged` raises; or a whole pipeline would get a
        transformer of more input channels, which it is not for.
    """
    names = ", ".join(each.name for each in adapters)
    found = [place for place, stored in plan.stored.items() if part_of(stored.cfg) == "transformer"]
    if not found:
        raise UserError(f"--lora is {names}: is of the transformer, and none is converted; leave it out")
    before = plan.stored[found[0]]
    after = merging.merged(before, adapters, plan.dtype)
    if plan.copies and before.cfg.in_channels != after.cfg.in_channels:
        raise UserError(
            f"--lora is {names}: makes a transformer of {after.cfg.in_channels} channels, for which this pipeline's "
            f"other parts are not; add --part=transformer"
        )
    return replace(plan, stored={**plan.stored, found[0]: after})


def check(plan: Plan, overwrite: bool = False) -> None:
    """Raises UserError where a plan cannot be carried out; nothing is touched."""
    _check_apart(plan)
    for place, stored in plan.stored.items():
        weights.check(plan.to / place, stored.cfg, plan.format)
    target.check(plan.to, plan.size(), overwrite, plan.folders())


def run(plan: Plan, overwrite: bool = False, progress: Callable[[int], object] = lambda count: None) -> None:
    """Writes what is planned, beside its place and renamed at the end.

    Args:
      plan: one that `check` lets pass.
      overwrite: whether to replace what is there.
      progress: called with the bytes written, `plan.size()` in all.

    Raises:
      UserError: it cannot be written; what was there is as it was.
    """
    if set(plan.stored) == {""}:
        weights.write(plan.stored[""], plan.to, plan.format, plan.dtype, overwrite, progress)
        return
    with target.beside(plan.to, overwrite, plan.folders()) as folder:
        folder.mkdir()
        for place, stored in plan.stored.items():
            weights.write(stored, folder / place, plan.format, plan.dtype, progress=progress)
        for place, file in plan.files().items():
            _copy(file, folder / place, progress)


def _files(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields a file, or those in a folder at any depth; a linked folder counts as the one that it leads to."""
    if not path.exists():
        raise UserError(f"{path}: is a broken link; get what it leads to")
    if not path.is_dir():
        yield path
        return
    real = path.resolve()
    if real in above:
        raise UserError(f"{path}: is a link back to {real}, which it is in; remove it")
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for child in children:
        yield from _files(child, (*above, real))


def _places(source: Path, wanted: tuple[str, ...], whole: bool) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Returns ({part: where to look for it}, what else is there), as `hub.fetch` does for a repository."""
    index = source / pipelines.INDEX
    if index.is_file() and whole:
        return {"pipeline": source}, ()
    autoencoder = (source / "vae").is_dir() or (source / "ae.safetensors").is_file()
    transformer = (source / "transformer").is_dir() or any(
        file.name != "ae.safetensors" for file in source.glob("*.safetensors")
    )
    if not (autoencoder and transformer):
        return {"": source}, ()
    others = [name for name in _components(index) if name not in FOLDERS.values()] if index.is_file() else []
    return {part: source for part in wanted}, (*(part for part in PARTS if part not in wanted), *others)


def _components(index: Path) -> list[str]:
    """Returns the folders that a model_index.json names; UserError for one outside of it."""
    entries = pipelines.read_json(index).items()
    names = [name for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and all(entry)]
    for name in names:
        if not name.isidentifier():
            raise UserError(f"{index}: names {name!r}, which is no part of a pipeline; use one from a source you trust")
    return names


def _of_pipeline(root: Path, to: Path, dtype: torch.dtype | None) -> Plan:
    names = _components(root / pipelines.INDEX)
    if "transformer" not in names:
        recognize.find(root, "transformer")  # says what it is instead
    for name in names:
        # Shapes alone do not tell all of a configuration.
        lacking = root / name / ("config.json" if name in FOLDERS.values() else "")
        if not lacking.exists():
            raise UserError(f"{root / pipelines.INDEX}: names {name}, and {lacking} is not there; get it too")
    stored = {FOLDERS[part]: recognize.find(root, part) for part in PARTS if FOLDERS[part] in names}
    copied = [pipelines.INDEX, *(name for name in names if name not in stored)]
    others = sorted(path.name for path in root.iterdir() if path.name not in (*stored, *copied))
    left_out = [line for each in stored.values() for line in each.left_out]
    return Plan(to, "diffusers", dtype, stored, {name: root / name for name in copied}, (*left_out, *others))


def _of_weights(
    stored: Mapping[str, Stored], to: Path, format: str, dtype: torch.dtype | None, left_out: tuple[str, ...]
) -> Plan:
    """Returns the plan for one part, or for several by their names, without more of a pipeline."""
    left_out = (*left_out, *(line for each in stored.values() for line in each.left_out))
    if format == "bfl" and to.suffix != ".safetensors":
        placed = {file_name(each): each for each in stored.values()}
    elif len(stored) == 1:
        placed = {"": next(iter(stored.values()))}
    else:
        placed = {FOLDERS[part]: each for part, each in stored.items()}
    return Plan(to, format, dtype, placed, {}, left_out)


def file_name(stored: Stored) -> str:
    """Returns what Black Forest Labs call a file of these weights."""
    cfg, name = stored.cfg, Path(stored.path).name
    if part_of(cfg) == "autoencoder":
        return "ae.safetensors"
    if name.startswith("flux1") and name.endswith(".safetensors"):
        return name
    sizes = (cfg.hidden_size, cfg.depth, cfg.depth_single_blocks)
    flavors = [name for name, of in FLAVORS.items() if sizes == (of.hidden_size, of.depth, of.depth_single_blocks)]
    flavor = flavors[0].removeprefix("flux-") if flavors else "custom"
    variant = _VARIANTS.get((cfg.in_channels, cfg.guidance_embed), "custom") if flavor == "dev" else flavor
    return f"flux1-{variant}.safetensors"


def _check_apart(plan: Plan) -> None:
    """Raises UserError where writing would replace what is read, or write into what is copied."""
    to, files = plan.to.resolve(), plan.files()
    for path in (Path(path).resolve() for path in (*(stored.path for stored in plan.stored.values()), *files.values())):
        if to == path or to in path.parents:
            raise UserError(f"{plan.to}: holds what is read ({path}); choose another path")
    # Also the folders that links lead to.
    folders = [file.parent for place, file in files.items() if "/" in place]
    for path in (path.resolve() for path in (*plan.copies.values(), *folders)):
        if path == to or path in to.parents:
            raise UserError(f"{plan.to}: is part of what is copied ({path}); choose another path")


def _copy(source: Path, to: Path, progress: Callable[[int], object]) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as read, to.open("xb") as written:
            while chunk := read.read(_CHUNK):
                written.write(chunk)
                progress(len(chunk))
    except PermissionError as error:
        raise UserError(f"{source}: cannot be copied ({error.strerror})") from error


def describe(stored: Stored) -> str:
    """Returns one line of what weights are."""
    shapes = formats.layout(stored.cfg, "bfl").ours
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    kinds = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in stored.dtypes.values()}))
    return f"{stored.path}: {part_of(stored.cfg)}, {count:,} parameters, {kinds}, in format {stored.format}"
