"""What a run with `lora.rank` above 0 adds: the frozen base beside the state, and folds over a LoRA of it.

The state's "params" is then the LoRA: it alone has gradients, moments, an average and checkpoints. The base is read or
drawn anew at every start, in the type that is computed in, in which it never has to be kept in two.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from flux_func import config as configs
from flux_func import tree
from flux_func.errors import UserError
from flux_func.interop.stored import Stored
from flux_func.models import flux
from flux_func.models.layers import Ops, Params
from flux_func.models.stages import Stage
from flux_func.parallel import fold, placements
from flux_func.parallel.mesh import Mesh
from flux_func.parallel.sharding import Sharding, Stream
from flux_func.train import checkpoint, layout, state
from flux_func.transforms import lora


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights under a run's LoRA.

    Attributes:
      params: what this process has of them.
      sharding: where they are.
      cfg: the model.
    """

    params: Params
    sharding: Sharding
    cfg: flux.FluxConfig

    def training(self, ops: Ops = Ops()) -> tuple[Ops, fold.Vjp]:
        """Returns the ops and the vjp with which one `fold.grad_and_value` over the LoRA is that of the adapted model.

        A stage's part of the base is gathered for its turn forward and again backward, as its part of the LoRA is; in
        between nobody holds it.
        """
        turn = self.turn()
        added = lora.over(turn.take, ops)

        def wrap_stage(fn: Callable, stage: Stage) -> Callable:
            wrapped = added.wrap_stage(fn, stage)
            return _lent(wrapped, functools.partial(turn.take, stage)) if stage.keys else wrapped

        return dataclasses.replace(added, wrap_stage=wrap_stage), functools.partial(_vjp, turn.end)

    def turn(self) -> "Turn":
        """Returns the base's parts in the order in which one fold visits them."""
        return Turn(self)


class Turn:
    """A base's parts, in the order in which one fold visits them: forward, and backward from the last stage on."""

    def __init__(self, base: Base):
        """Takes the base, of which nothing is gathered yet."""
        stages = [stage for stage in flux.chain(base.cfg) if stage.keys]
        selects = [stage.select for stage in stages]
        self._stream = Stream(base.sharding, base.params, [*selects, *reversed(selects[:-1])])
        self._names = iter([stage.name for stage in (*stages, *reversed(stages[:-1]))])
        self._name, self._part = "", None

    def take(self, stage: Stage) -> Params:
        """Returns a stage's part of the base, held until another stage's is taken."""
        while self._name != stage.name:
            self._name, self._part = next(self._names), None
            self._part = self._stream.take()
        return self._part

    def end(self) -> None:
        """Takes what is left: it is on its way, though a backward pass may have had no use for it."""
        for _ in self._names:
            self._part = None
            self._part = self._stream.take()
        self._part = None


def _lent(fn: Callable, take: Callable[[], Params]) -> Callable:
    """Returns a stage's `fn` whose graph keeps, of the base's weights, where they are alone."""

    def run(part: Params, carry: dict, const: dict) -> dict:
        lent = tree.leaves(take())
        places = {leaf.untyped_storage()._cdata: place for place, leaf in enumerate(lent)}
        offsets = [leaf.storage_offset() for leaf in lent]
        del lent

        def pack(saved: Tensor) -> Any:
            place = places.get(saved.untyped_storage()._cdata)
            if place is None:
                return saved
            return place, saved.shape, saved.stride(), saved.storage_offset() - offsets[place]

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            place, shape, strides, offset = kept
            leaf = tree.leaves(take())[place]
            return leaf.as_strided(shape, strides, leaf.storage_offset() + offset)

        with saved_tensors_hooks(pack, unpack):
            return fn(part, carry, const)

    return run


def _vjp(end: Callable[[], None], fn: Callable, part: Params, *carry: tree.Tree) -> tuple[Any, fold.Pull]:
    """`fold.autograd_vjp`, also of a first stage of which the LoRA has nothing: then nothing is differentiated."""
    if carry:
        return fold.autograd_vjp(fn, part, *carry)
    if tree.leaves(part):
        out, pull = fold.autograd_vjp(fn, part)
    else:
        with torch.no_grad():
            out, pull = fn(part), lambda cotangent: (part,)

    def pull_and_end(cotangent: tree.Tree) -> tuple:
        found = pull(cotangent)
        end()
        return found

    return out, pull_and_end


def forward(base: Base | None, params: Params, sharding: Sharding, ops: Ops = Ops()) -> tuple[Params, Sharding, Ops]:
    """Returns the parameters, sharding and ops of a run's forward passes, given what it trains and where that is."""
    if base is None:
        return params, sharding, ops
    return *together(base.params, base.sharding, [(params, sharding.params, 1.0)]), lora.with_updates(ops)


def together(
    params: Params, sharding: Sharding, loras: Sequence[tuple[lora.Lora, Any, float]]
) -> tuple[Params, Sharding]:
    """Returns a base and (LoRA, its placements or None for whole ones, weight) as one tree, and where it is."""
    combined = lora.combine(params, [(adapter, weight) for adapter, _, weight in loras], check=False)
    if sharding.params is None:
        return combined, sharding
    placed = [(_whole(adapter) if places is None else places, weight) for adapter, places, weight in loras]
    return combined, dataclasses.replace(sharding, params=lora.combine(sharding.params, placed))


def _whole(adapter: lora.Lora) -> lora.Lora:
    return tree.map(lambda leaf: placements.Placement(tuple(leaf.shape), leaf.dtype), adapter)


# A run's base.


def find(config: ml_collections.ConfigDict, cfg: flux.FluxConfig) -> Stored | None:
    """Returns the weights, unread, under the LoRA of a run whose model is known; None where they are drawn.

    Raises:
      UserError: they are not there any more, or are of another model.
    """
    path = config.model.weights
    if not path:
        return None
    weights = state.find_weights(path, "transformer", "model.weights")
    if state.model_config(config, weights) != cfg:
        raise UserError(f"model.weights is {path!r}: these are no longer of the model that the run's LoRA adapts")
    return weights


def load(
    config: ml_collections.ConfigDict, cfg: flux.FluxConfig, weights: Stored | None, mesh: Mesh, device: torch.device
) -> Base:
    """Returns the base under a run's LoRA, read or drawn, in the type that is computed in."""
    dtype, sharding = state.DTYPES[config.numerics.compute], layout.of_weights(config, cfg, mesh, device)
    return Base(state.initial(config, cfg, dtype, sharding.home or device, weights, sharding), sharding, cfg)


def say(base: Base) -> str:
    """Returns what a process has of the weights under a LoRA, in words."""
    return f"under the LoRA, a process has weights {state.size_in_bytes(base.params) / 1e6:,.2f} MB, in no checkpoint"


def share_of_flops(config: ml_collections.ConfigDict) -> float:
    """Returns how much of `flops.training_flops` a run computes: of three products of a weight, a LoRA leaves out one.

    Its own products are not counted, and attention's as if they were a weight's.
    """
    return 2 / 3 if config.lora.rank else 1.0


# A LoRA that a run has trained.


def is_run(workdir: str | Path) -> bool:
    """Returns whether a folder is that of a run which trains a LoRA."""
    try:
        saved = json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8"))
        return bool(saved["lora"]["rank"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def of_run(workdir: str | Path, step: int | None = None, ema: bool = False) -> lora.Lora:
    """Returns the LoRA in a run's checkpoint, the newest if none is named, whole and on the CPU, or its average.

    Raises:
      UserError: there is no such checkpoint, or no average in it.
    """
    there = checkpoint.steps(workdir)
    if not there or step not in (None, *there):
        wanted = "one" if step is None else f"step {step}"
        raise UserError(f"{workdir}: has no checkpoint of {wanted}, but {', '.join(map(str, there)) or 'none at all'}")
    step, config = there[-1] if step is None else step, configs.default()
    config.update(checkpoint.read_config(workdir, step))
    like = {"ema" if ema else "params": state.trained(config, checkpoint.read_model(workdir, step))}
    (found,) = checkpoint.restore(workdir, step, like, cast=True).values()
    return found
