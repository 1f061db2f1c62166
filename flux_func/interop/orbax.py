"""Checkpoints at rest, by Orbax: what a folder holds, and weights read and written a leaf at a time.

    WORKDIR/checkpoints/STEP/params/  opt/  ema/    an Orbax item for each member of the state
    WORKDIR/checkpoints/STEP/model/                 which model the weights are of, as JSON (`stored.to_json`)
    WORKDIR/checkpoints/STEP/commit_success.txt     written last: a folder without it is not a checkpoint

An item is a flat dict from dotted path to array: the weights carry Black Forest Labs' own names, any Orbax reads them
(`PyTreeCheckpointer().restore(".../params")`), and a member, a leaf or a part of one is read without the rest. How many
processes wrote it makes no difference to a reader. What a run's checkpoints hold besides is said in
`train/checkpoint.py`.
"""

import asyncio
import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop import arrays, formats
from flux_func.interop.spans import Shape
from flux_func.interop.stored import Config, Stored, from_json, to_json
from flux_func.transforms.lora import LowRank

MARKER = "commit_success.txt"
# Leaves are stored in pieces of at most this size, and read by whole pieces: that much, and not a leaf, is what reading
# takes on top of what is read.
PIECE_BYTES = 32 << 20


def steps(workdir: str | Path) -> list[int]:
    """Returns the steps of the committed checkpoints, ascending; leftovers of interrupted saves are not among them."""
    names = [marker.parent.name for marker in folder(workdir).glob(f"*/{MARKER}")]
    return sorted(int(name) for name in names if name.isdecimal())


def folder(workdir: str | Path) -> Path:
    """Returns where a workdir's checkpoints are."""
    return Path(workdir).absolute() / "checkpoints"


def find(workdir: str | Path, step: int) -> Path:
    """Returns the folder of a committed checkpoint; UserError names the steps there are."""
    there = steps(workdir)
    if step not in there:
        has = f"those of steps {', '.join(map(str, there))}" if there else "none"
        raise UserError(f"step is {step}: {str(workdir)!r} has no such checkpoint; it has {has}")
    return folder(workdir) / str(step)


# Of a checkpoint, which is a step's folder. What Orbax raises for damaged files, `reading` makes one line of.


@contextlib.contextmanager
def reading(where: str, remedy: str) -> Iterator[None]:
    """Turns what goes wrong in reading a checkpoint into a UserError, "WHERE cannot be read (cause): REMEDY"."""
    try:
        yield
    except (OSError, ValueError, LookupError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise UserError(f"{where} cannot be read ({cause}): {remedy}") from error


def read_json(checkpoint: Path, item: str) -> dict[str, Any]:
    """Returns an item that is JSON."""
    return _reader(arrays.orbax().JsonCheckpointHandler).restore(checkpoint / item)


def read_model(checkpoint: Path) -> Config:
    """Returns the model that a checkpoint is of."""
    return from_json(read_json(checkpoint, "model"))


def weights_only(checkpoint: Path) -> bool:
    """Returns whether a checkpoint was saved without the state of an optimizer."""
    return _reader(arrays.orbax().CompositeCheckpointHandler).metadata(checkpoint).custom_metadata["weights_only"]


def members(checkpoint: Path) -> list[str]:
    """Returns the items that hold arrays: params, opt, ema."""
    return sorted(path.parent.name for path in checkpoint.glob("*/_METADATA"))


def describe(checkpoint: Path, member: str) -> dict[str, Tensor]:
    """Returns {path: meta tensor} of the leaves that a checkpoint holds of one member of the state."""
    metadata = _reader(arrays.orbax().PyTreeCheckpointHandler).metadata(checkpoint / member)
    leaves = metadata.item_metadata.tree
    dtypes = {path: getattr(torch, np.dtype(leaf.dtype).name) for path, leaf in leaves.items()}
    return {path: torch.empty(leaf.shape, dtype=dtypes[path], device="meta") for path, leaf in leaves.items()}


def read(
    checkpoint: Path, member: str, paths: Iterable[str], parts: Mapping[str, tuple[slice, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Returns {path: array} of some leaves of one member of the state.

    Args:
      checkpoint: a step's folder.
      member: params, opt or ema.
      paths: of the leaves.
      parts: {path: slices} of those leaves of which only a part is to be read, a slice for each dimension.
    """
    ocp = arrays.orbax()
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _reading_parts(parts or {})))
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(paths, 0),
        restore_args=dict.fromkeys(paths, ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    reader = _reader(ocp.PyTreeCheckpointHandler, type_handler_registry=registry)
    return reader.restore(checkpoint / member, args=args)


def _reader(handler: Callable, **options) -> Any:
    """Returns an Orbax checkpointer that reads by itself: where JAX knows of other processes, it waits for none."""
    ocp = arrays.orbax()
    import jax

    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    if handler is ocp.CompositeCheckpointHandler:
        options["composite_options"] = ocp.CompositeOptions(multiprocessing_options=alone)
    else:
        options["multiprocessing_options"] = alone
    return ocp.Checkpointer(handler(**options), multiprocessing_options=alone)


def _reading_parts(parts: Mapping[str, tuple[slice, ...]]) -> Any:
    """Returns an Orbax handler of leaves that reads no more of them than the parts named."""
    types = arrays.orbax().type_handlers

    class Parts(types.NumpyHandler):
        async def deserialize(self, infos, args=None):
            return await asyncio.gather(*map(self._part, infos))

        async def _part(self, info):
            import tensorstore

            spec = types.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            whole = await tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context)
            return await (whole[parts[info.name]] if info.name in parts else whole).read()

    return Parts()


def manager(workdir: str | Path, type_handlers: Any = None, processes: int = 1, **options) -> Any:
    """Returns an Orbax manager of a workdir's checkpoints that compresses nothing.

    Args:
      workdir: the folder that `checkpoints` is or will be in; it has to be there where there are several processes.
      type_handlers: Orbax's registry of how leaves are written (None: as jax.Arrays).
      processes: how many write together, each of which calls this; JAX has to know of them.
      **options: of Orbax's CheckpointManagerOptions.
    """
    ocp = arrays.orbax()
    if processes > 1:
        # Naming them all makes Orbax wait for them by messages, not by computations.
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(active_processes=set(range(processes)))
        options["async_options"] = ocp.AsyncOptions(create_directories_asynchronously=False)
        options["create"] = False
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=type_handlers or _writing_arrays()
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, handler)
    registry.add(None, ocp.args.PyTreeRestore, handler)
    return ocp.CheckpointManager(
        folder(workdir), options=ocp.CheckpointManagerOptions(**options), handler_registry=registry
    )


def _writing_arrays() -> Any:
    """Returns Orbax's registry for jax.Arrays that are stored as if they were numpy's: with no word of their devices.

    Plain Orbax would want those devices to restore them, which another number of processes does not have.
    """
    import jax

    types = arrays.orbax().type_handlers

    class Arrays(types.ArrayHandler):
        def typestr(self):
            return types.NumpyHandler().typestr()

    handler = Arrays(enable_write_sharding_file=False, use_replica_parallel=False)
    return types.create_type_handler_registry((jax.Array, handler))


def save_args(leaves: Mapping[str, Any]) -> Any:
    """Returns what tells an Orbax manager to save leaves, as a member of the state, in pieces."""
    ocp = arrays.orbax()
    in_pieces = ocp.SaveArgs(chunk_byte_size=PIECE_BYTES)
    return ocp.args.PyTreeSave(dict(leaves), save_args=dict.fromkeys(leaves, in_pieces))


# Weights.


def open_checkpoint(path: str | Path, step: int | None = None, ema: bool = False) -> Stored:
    """Returns the weights in a checkpoint of ours.

    Args:
      path: a workdir, or the folder of one checkpoint in it.
      step: which of the workdir's checkpoints (None: the newest).
      ema: the average of the weights instead.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or it does not hold what it says it does.
    """
    checkpoint, member = _choose(Path(path), step), "ema" if ema else "params"
    there = members(checkpoint)
    if member not in there:
        remedy = "a run keeps it where ema.decay is set" if ema and there else "name another checkpoint"
        raise UserError(f"{checkpoint}: holds no {member}, but {', '.join(there) or 'nothing'}; {remedy}")
    with _damage(checkpoint):
        cfg = read_model(checkpoint)
        found = {name: describe(checkpoint, name) for name in there}
    layout = formats.layout(cfg, "orbax")
    wrong = tree.differences({path: tuple(leaf.shape) for path, leaf in found[member].items()}, layout.theirs)
    if wrong:
        raise UserError(f"{checkpoint}: its {member} are not those of the model it is of: {wrong}")

    @functools.lru_cache(maxsize=1)  # rows are asked for in the order of the leaves, of one leaf in several pieces
    def whole(path: str) -> Tensor:
        with _damage(checkpoint):
            return arrays.to_torch(read(checkpoint, member, [path])[path])

    def rows(path: str, first: int, last: int) -> Tensor:
        leaf = found[member][path]
        if leaf.nbytes <= PIECE_BYTES:
            return whole(path)[first:last].clone()
        part = (slice(first, last), *(slice(0, size) for size in leaf.shape[1:]))
        with _damage(checkpoint):
            return arrays.to_torch(read(checkpoint, member, [path], {path: part})[path])

    return Stored(
        path=str(checkpoint),
        format="orbax",
        cfg=cfg,
        layout=layout,
        dtypes={path: leaf.dtype for path, leaf in found[member].items()},
        read=rows,
        left_out=tuple(f"{name} ({len(leaves)} tensors)" for name, leaves in found.items() if name != member),
    )


def open_lora(path: str | Path, step: int | None = None, ema: bool = False) -> tuple[Config, dict, dict] | None:
    """Returns (model, the run's config, {path of a linear: update}) of a run that trains a LoRA; None for another.

    Args:
      path, step, ema: see `open_checkpoint`.

    Raises:
      UserError: see `open_checkpoint`.
    """
    checkpoint, member = _choose(Path(path), step), "ema" if ema else "params"
    if not (checkpoint / "config").is_dir() or member not in members(checkpoint):
        return None
    with _damage(checkpoint):
        leaves, config = describe(checkpoint, member), read_json(checkpoint, "config")
        if not all(name.endswith((".A", ".B")) for name in leaves):
            return None
        rank, alpha = config["lora"]["rank"], config["lora"]["alpha"]
        found = {name: arrays.to_torch(array) for name, array in read(checkpoint, member, leaves).items()}
        linears = {name.removesuffix(".A") for name in leaves if name.endswith(".A")}
        updates = {name: LowRank(found[f"{name}.A"], found[f"{name}.B"], float(alpha or rank)) for name in linears}
        return read_model(checkpoint), config, updates


def write(
    workdir: str | Path,
    cfg: Config,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes weights as the checkpoint of step 0 of a workdir: to sample or to start from, not to resume from.

    Args:
      workdir: a folder, which need not exist.
      cfg: the model.
      shapes, dtypes: {dotted path: shape} and {dotted path: type} of its leaves.
      read: our dotted path to the leaf. It is called for one leaf after another, each let go of before the next.
      progress: called with the bytes of each leaf once it is written.

    Raises:
      OSError: the disk is full or refuses for another reason.
    """
    ocp = arrays.orbax()
    registry = ocp.type_handlers.create_type_handler_registry((Tensor, _streaming(read, progress)))
    leaves = {path: torch.empty(shape, dtype=dtypes[path], device="meta") for path, shape in shapes.items()}
    items = {"params": save_args(leaves), "model": ocp.args.JsonSave(to_json(cfg))}
    args = ocp.args.Composite(**items)
    try:
        with manager(workdir, registry, enable_async_checkpointing=False) as opened:
            opened.save(0, args=args, force=True, custom_metadata={"weights_only": True})
    except Exception as error:
        refusal = disk_error(error)
        if refusal is None:
            raise
        raise refusal from error


def disk_error(error: BaseException) -> OSError | None:
    """Returns what the disk refused, in the system's words, or None if the error is of another kind."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return error if isinstance(error, OSError) else None


def _streaming(read: Callable[[str], Tensor], progress: Callable[[int], object]) -> Any:
    """Returns an Orbax handler of leaves that stand for what `read` gives at the time of writing."""
    numpy_handler = arrays.orbax().type_handlers.NumpyHandler

    class Streaming(numpy_handler):
        def __init__(self):
            super().__init__(deepcopy_host_arrays=False)

        async def serialize(self, values, infos, args=None):
            # Orbax hands over all leaves at once, and would have them written at once.
            for info, arg in zip(infos, args, strict=True):
                array = np.asarray(arrays.to_jax(read(info.name)))
                for written in await super().serialize([array], [info], [arg]):
                    written.result()
                progress(array.nbytes)
            return []

    return Streaming()


def _choose(path: Path, step: int | None) -> Path:
    checkpoint = path.absolute()
    if (checkpoint / MARKER).is_file():
        if step is not None and str(step) != checkpoint.name:
            raise UserError(f"{path}: is one checkpoint, and step {step} is asked for; name the folder of its run")
        return checkpoint
    there = steps(path)
    if not there:
        raise UserError(f"{path}: there is no checkpoint in it; train_main writes them")
    return find(path, max(there) if step is None else step)


def _damage(checkpoint: Path) -> contextlib.AbstractContextManager[None]:
    return reading(f"{checkpoint}: this checkpoint", "name another one")
