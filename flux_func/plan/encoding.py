"""What encoding a batch takes: T5 stage by stage as it is gathered, CLIP, and the autoencoder."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_func import tree
from flux_func.models import autoencoder, text
from flux_func.models.layers import Params
from flux_func.parallel import sharding
from flux_func.parallel.sharding import Select, Sharding
from flux_func.plan import schedule
from flux_func.plan.devices import DEVICES, Device
from flux_func.plan.meter import Cost, Meter
from flux_func.plan.predict import Step, parts


def weights(text_cfg: text.TextConfig, image_cfg: autoencoder.AutoencoderConfig, split: Sharding, dtype: torch.dtype):
    """Returns {name: bytes} of what a process has of the encoders' weights; see `steps`."""
    clip = text.abstract(text_cfg, dtype).get("clip", {})
    found = {
        "T5": sum(place.local_bytes(split.mesh) for place in tree.leaves(split.params)),
        "CLIP": sum(leaf.nbytes for leaf in tree.leaves(clip)),
        "autoencoder": sum(leaf.nbytes for leaf in tree.leaves(autoencoder.abstract(image_cfg, dtype))),
    }
    return {name: size for name, size in found.items() if size}


def steps(
    text_cfg: text.TextConfig,
    image_cfg: autoencoder.AutoencoderConfig,
    split: Sharding,
    count: int,
    size: int,
    dtype: torch.dtype,
    device: Device,
) -> Iterator[Step]:
    """Yields what encoding `count` samples does.

    Args:
      text_cfg, image_cfg: the encoders.
      split: where T5's parameters are, on the meta device.
      count: samples.
      size: pixels of an image's side.
      dtype: what is computed in.
      device: whose time is counted.
    """
    stages, rest = _computing(text_cfg, image_cfg, count, size, dtype, device.name)
    kinds, local = dict(stages), tree.flatten(split.params)
    visits = {path: functools.partial(text.select, path=path) for path in kinds}
    moving = _gathers(split, parts(split.params, split.mesh), visits, device) if local else {}
    recorder = schedule.recorder(split)
    take = sharding.taker(recorder, None, visits) if visits else None
    for path, cost in stages:
        first = len(recorder.log)
        whole = take(path)
        for action in recorder.log[first:]:
            yield Step("gathered", moving[action.stage][action.what], f"gather {action.stage}")
        yield Step("encoders", cost)
        del whole
        yield Step("gathered", Cost(-sum(moving[path][what].kept for what in ("start", "gather"))))
    yield from (Step("encoders", cost) for cost in rest)


def _gathers(split: Sharding, local: Params, visits: dict[str, Select], device: Device) -> dict[str, dict[str, Cost]]:
    """Returns {stage: {"start", "gather": cost}}."""
    known, found = {}, {}
    with Meter(device) as meter:
        for path, select in visits.items():
            kind = _kind(select(local))
            if kind not in known:
                finish, start = meter.cost(split.start_gather, select, local)
                known[kind] = {"start": start, "gather": meter.cost(finish)[1]}
                del finish
            found[path] = known[kind]
    return found


@functools.cache
def _computing(
    text_cfg: text.TextConfig,
    image_cfg: autoencoder.AutoencoderConfig,
    count: int,
    size: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[list[tuple[str, Cost]], list[Cost]]:
    """Returns what each of T5's stages takes, and what CLIP and the autoencoder do."""
    known, stages, rest = {}, [], []

    def wrap_stage(stage: text.Stage, path: str) -> text.Stage:
        def run(part: Params, carry: dict, const: dict) -> dict:
            kind, out = (*_kind(part), *carry), carry
            # A block gives what the next one takes, so that one of a kind is enough.
            if kind not in known:
                out, cost = meter.cost(stage, part, carry, const)
                known[kind] = replace(cost, kept=0)
            stages.append((path, known[kind]))
            meter.drain()
            return out

        return run

    shapes, image_shapes = text.abstract(text_cfg, dtype), autoencoder.abstract(image_cfg, dtype)
    fake = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    with fake, Meter(DEVICES[device]) as meter, torch.no_grad():
        if text_cfg.kind == "hf":
            tokens = {"t5": _tokens(count, text_cfg.max_length), "clip": _tokens(count, text_cfg.clip_length)}
            text.encode(_fakes(shapes), text_cfg, tokens, wrap_stage=wrap_stage)
            rest.append(Cost(0, 0, meter.drain()))
        images = torch.empty(count, 3, size, size, dtype=dtype if image_cfg.kind == "kl" else torch.float32)
        params = _fakes(image_shapes)
        (_, cost) = meter.cost(autoencoder.encode, params, image_cfg, images)
        rest.append(Cost(0, images.nbytes + cost.peak, cost.events))
    return stages, rest


def _kind(part: Params) -> tuple:
    return tuple((path, *leaf.shape) for path, leaf in tree.flatten(part).items())


def _tokens(count: int, length: int) -> Tensor:
    return torch.empty(count, length, dtype=torch.int64)


def _fakes(shapes: Params) -> Params:
    return tree.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype), shapes)
