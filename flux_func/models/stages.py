"""A model as a chain of stages, and its forward pass as the fold over them.

A stage is what is gathered, compiled, recomputed and profiled as one. `flux.chain` is FLUX's.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flux_func.models.layers import Ops, Params


@dataclass(frozen=True)
class Stage:
    """A pure function of (params, carry, const), and where its parameters are in the tree.

    Attributes:
      name: its place, such as "double_blocks.3"; the stages without a block are "stem", "join" and "head".
      kind: what it shares code with, such as "double_block".
      keys: the tree's top-level names that it owns; none for a stage without parameters.
      index: its place in the list, where its key is a list.
      fn: `(params, carry, const, ops) -> carry`.
    """

    name: str
    kind: str
    keys: tuple[str, ...]
    index: int | None
    fn: Callable[[Params, dict, dict, Ops], dict]

    def select(self, params: Params) -> Params:
        """Returns this stage's part of a tree shaped as the parameters."""
        if self.index is not None:
            return params[self.keys[0]][self.index]
        return {key: params[key] for key in self.keys}

    def place(self, params: Params, part: Params) -> None:
        """Puts this stage's part into a tree that is being assembled: `select`'s inverse.

        Raises:
          ValueError: a block out of the stages' order, which would get another one's place.
        """
        if self.index is None:
            params.update(part)
            return
        blocks = params.setdefault(self.keys[0], [])
        if len(blocks) != self.index:
            raise ValueError(f"{self.name} should be placed in stage order, there are {len(blocks)} blocks yet")
        blocks.append(part)


def fold(stages: Sequence[Stage], params: Params, carry: dict, const: dict, ops: Ops) -> dict:
    """Returns the carry after all stages: the forward pass."""
    for stage in stages:
        carry = bind(stage, ops)(stage.select(params), carry, const)
    return carry


def bind(stage: Stage, ops: Ops) -> Callable[[Params, dict, dict], dict]:
    """Returns the stage as `(params, carry, const) -> carry`, done with `ops`."""
    return ops.wrap_stage(functools.partial(stage.fn, ops=ops), stage)
