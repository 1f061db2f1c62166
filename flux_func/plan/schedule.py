"""What a fold does, in order, by running it with nothing in it.

The training fold itself is run, with a differentiation that computes nothing and a sharding that sends nothing: both
write down what they are asked for, and what they hand out says so when it is let go.
"""

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_func import tree
from flux_func.models import flux
from flux_func.models.layers import Params
from flux_func.models.stages import Stage
from flux_func.parallel import fold
from flux_func.parallel.sharding import Reduction, Select, Sharding


class Action(NamedTuple):
    """One of the things that a fold does.

    Attributes:
      what: "start" to gather a stage's parameters, "gather" them (wait, and put them together), "release" them; and
        "start base", "gather base", "release base" of the weights under a LoRA;
        "forward", "backward"; "cast" its gradients to the type they are added up in, "reduce" them, step by step;
        "drop" them as they came, or "drop_cast" as they were added up; "turn", to a micro-batch.
      stage: whose.
      step: of a reduction; of micro-batches, from 1.
    """

    what: str
    stage: str
    step: int = 0


class _Whole:
    """Stands for a stage's whole parameters."""

    def __init__(self, log: list[Action], stage: str, of: str = ""):
        self._log, self.stage, self._of = log, stage, of

    def __del__(self) -> None:
        self._log.append(Action(f"release{self._of}", self.stage))


@dataclass(frozen=True)
class Recorder(Sharding):
    """A sharding that writes down what is asked of it.

    Attributes:
      log: what was asked for.
      parts: {stage: its part of the parameters}.
      cast: whether gradients come in another type than they are added up in.
      steps: {stage: of how many steps the reduction of its gradients is}.
      alias: whether a reduction hands back the gradients that it was given.
      of: " base" of weights under a LoRA, which are gathered alone; "" of what is trained.
    """

    log: list[Action] = field(default_factory=list)
    parts: Mapping[str, Params] = field(default_factory=dict)
    cast: bool = False
    steps: Mapping[str, int] = field(default_factory=dict)
    alias: bool = False
    of: str = ""

    def start_gather(self, select: Select, params: Params) -> Callable[[], Params]:
        """Writes down both halves."""
        stage = _name(select)
        self.log.append(Action(f"start{self.of}", stage))

        def finish() -> Params:
            self.log.append(Action(f"gather{self.of}", stage))
            return _Whole(self.log, stage, self.of)

        return finish

    def to_reduce(self, grads: Params) -> Params:
        """Writes down the cast, where there is one, of what the last backward pass gave."""
        if not self.cast:
            return grads
        stage = next(action.stage for action in reversed(self.log) if action.what == "backward")
        self.log.append(Action("cast", stage))
        return self._stand_ins(grads, "drop_cast", stage)

    def reduction(self, select: Select, grads: Params) -> Reduction:
        """Writes down the steps."""
        stage = _name(select)
        for step in range(self.steps[stage]):
            self.log.append(Action("reduce", stage, step))
            if step == 0 and not self.alias:
                grads = tree.map(_nothing, grads)
            if step + 1 < self.steps[stage]:
                yield
        return grads

    def vjp(self, fn: Callable, whole: _Whole, *carry: tree.Tree) -> tuple[Any, Callable]:
        """The fold's `vjp`: writes down the stage, of which it hands on nothing but a loss."""
        stage, like = whole.stage, self.parts[whole.stage]
        self.log.append(Action("forward", stage))

        def pull(cotangent: tree.Tree) -> tuple:
            self.log.append(Action("backward", stage))
            return self._stand_ins(like, "drop", stage), cotangent

        return {"loss": torch.empty((), device="meta")}, pull

    def _stand_ins(self, like: Params, what: str, stage: str) -> Params:
        made = tree.map(_nothing, like)
        for first in tree.leaves(made)[:1]:  # a LoRA may have nothing of a stage
            weakref.finalize(first, self.log.append, Action(what, stage))
        return made


def _over(base: Any, keep: bool, recorder: Recorder, fn: Callable, whole: _Whole, *carry: tree.Tree) -> tuple:
    """`recorder.vjp` as it is over a LoRA: it visits the weights under it, and keeps its own part or computes again."""
    stage, kept = Stage(whole.stage, "", (), None, fn), whole if keep else None
    base.take(stage)
    out, inner = recorder.vjp(fn, whole, *carry)

    def pull(cotangent: tree.Tree) -> tuple:
        nonlocal kept
        # A first stage of which the LoRA has nothing is not differentiated.
        if carry or not keep or tree.leaves(recorder.parts[stage.name]):
            base.take(stage)
        found = inner(cotangent)
        kept = None
        if not carry:
            base.end()
        return found

    return out, pull


def _name(select: Select) -> str:
    # A stage's own method, or a partial of a function of a path.
    return select.keywords["path"] if isinstance(select, functools.partial) else select.__self__.name


def _nothing(leaf: Tensor) -> Tensor:
    del leaf
    return torch.empty((), device="meta")


def record(
    cfg: flux.FluxConfig,
    params: Params,
    batch: Mapping[str, Tensor],
    recorder: Recorder,
    turns: int,
    base: Any = None,
    keep: bool = True,
) -> None:
    """Runs the training fold over `turns` micro-batches with a recorder; between two of them it writes "turn".

    Args:
      cfg: the model.
      params: its parameters, meta tensors.
      batch: of one micro-batch of one process, meta tensors.
      recorder: where it is written down.
      turns: micro-batches.
      base: the weights under the LoRA that the parameters are, whose sharding is a recorder with the same log.
      keep: of a LoRA, whether a stage is not computed again in the backward pass.
    """
    grads = None
    for turn in range(1, turns + 1):
        recorder.log.append(Action("turn", "", turn))
        vjp = functools.partial(_over, base.turn(), keep, recorder) if base else recorder.vjp
        grads, _ = fold.grad_and_value(
            params, cfg, batch, denominator=1, into=grads, vjp=vjp, sharding=recorder, last=turn == turns
        )


def recorder(sharding: Sharding, **attributes: Any) -> Recorder:
    """Returns a recorder in the place of a sharding."""
    return Recorder(**{f.name: getattr(sharding, f.name) for f in fields(Sharding)}, **attributes)
