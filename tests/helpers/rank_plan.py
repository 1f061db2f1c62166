"""One training step on each process of a mesh, counted: what a plan is held against."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from flux_func import tree
from flux_func.models.flux import FluxConfig
from flux_func.models.layers import Params
from flux_func.parallel import collectives, mesh, placements
from flux_func.parallel.sharding import Select, Sharding
from flux_func.plan import trace
from flux_func.plan.meter import Meter, Send
from flux_func.train import adapt, encoders, layout, optimizer, state, step
from tests.helpers import tiny_run

# 16 image tokens and 8 of text.
FIELDS = {"train.batch_size": 16, "data.image_size": 64, "text.max_length": 8}
CPU = torch.device("cpu")


def config(sizes: dict[str, int], given: dict[str, Any]) -> Any:
    """Returns the config of a tiny run on a mesh."""
    return tiny_run.config({**FIELDS, **{f"parallel.{axis}": size for axis, size in sizes.items()}, **given})


@dataclass(frozen=True)
class Counting(Sharding):
    """A sharding that counts the stages whose whole parameters are there, or on their way."""

    alive: list[int] = field(default_factory=lambda: [0, 0])

    def start_gather(self, select: Select, params: Params) -> Any:
        """Counts one more until the last of what is handed out is gone."""
        self.alive[0] += 1
        self.alive[1] = max(self.alive)
        finish = super().start_gather(select, params)

        def counted() -> Params:
            whole = finish()
            leaves = tree.leaves(whole)
            left = [len(leaves)]
            for leaf in leaves:
                weakref.finalize(leaf.untyped_storage(), self._gone, left)
            return whole

        return counted

    def _gone(self, left: list[int]) -> None:
        left[0] -= 1
        self.alive[0] -= not left[0]


@contextlib.contextmanager
def letting_go(over: mesh.Mesh) -> Iterator[None]:
    """Has every wait last until gloo has let go of what was sent, which it otherwise does some moment later.

    A group's one worker drops a collective before it takes the next: so another, of a number, is waited for too.
    """
    number, wait = torch.zeros(1), collectives.wait

    def and_let_go(x: torch.Tensor) -> torch.Tensor:
        arrived = wait(x)
        with _disable_current_modes():
            for axes in sorted(over.groups):
                dist.all_reduce(number, group=over.groups[axes])
        return arrived

    with mock.patch.object(collectives, "wait", and_let_go):
        yield


def count(rank: int, cases: list[tuple[dict[str, int], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns for each (sizes, fields of the config) what a step took: state, working, sent, stages."""
    del rank
    return [_count(config(*case)) for case in cases]


def _count(made: Any) -> dict[str, Any]:
    cfg, chosen = state.model_config(made), optimizer.from_config(made)
    over = mesh.build(made.parallel)
    sharding = layout.build(made, cfg, chosen, over, CPU)
    if not made.lora.rank:
        sharding = Counting(**{f.name: getattr(sharding, f.name) for f in fields(Sharding)})
    current = state.create(made, cfg, chosen, CPU, sharding=sharding)
    base = _base(made, cfg, over) if made.lora.rank else None
    here = (placements.shards(current), base.params if base else ())
    size = made.train.batch_size // over.size(sharding.batch_axes)
    side, micro = made.data.image_size // 8, size // made.train.accumulate
    batch = {
        "position": np.arange(size),
        "uniform": np.linspace(0, 1, size),
        "noise": np.ones((size, 16, side, side), np.float32),
        "image": np.zeros((size, 3, 8, 8), np.float32),
        "t5_tokens": np.zeros((size, 1), np.int64),
        "clip_tokens": np.zeros((size, 1), np.int64),
    }
    codec = encoders.Encoders(
        tokenize=None,
        encode_text=lambda _: (torch.ones(micro, made.text.max_length, cfg.context_in_dim), torch.ones(micro, 768)),
        encode_image=lambda images, noise: torch.ones(micro, 16, side, side),
        decode=None,
        posterior_noise=False,
    )
    meter, names = Meter(), trace.group_names(over)
    with letting_go(over), meter:
        step.train_step(
            current,
            batch,
            0,
            cfg=cfg,
            config=made,
            encoders=codec,
            optimizer=chosen,
            device=CPU,
            sharding=sharding,
            ops=layout.ops(made, cfg, sharding),
            base=base,
        )
    sent: Counter = Counter()
    for event in meter.events:
        if isinstance(event, Send):
            sent[event.kind, names[event.group]] += event.sent
    return {
        "state": sum(leaf.nbytes for leaf in tree.leaves(here)),
        "working": meter.peak,
        "sent": dict(sent),
        "stages": (base.sharding if base else sharding).alive[1],
    }


def _base(made: Any, cfg: FluxConfig, over: mesh.Mesh) -> adapt.Base:
    """Returns the weights under a LoRA, whose whole stages are counted in place of the LoRA's."""
    base = adapt.load(made, cfg, None, over, CPU)
    counting = Counting(**{f.name: getattr(base.sharding, f.name) for f in fields(Sharding)})
    return replace(base, sharding=counting)
