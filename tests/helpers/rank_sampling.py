"""Validation, sampling and averaging on each process of a mesh, to be held against one process alone."""

import dataclasses
import functools
import os
import types
from typing import Any

import numpy as np
import torch

from flux_func import sample_main, tree
from flux_func.data import pipeline, sources
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.parallel import collectives, mesh, placements
from flux_func.parallel.mesh import Mesh
from flux_func.parallel.sharding import Sharding
from flux_func.train import encoders, generate, validate
from flux_func.transforms import ema
from tests.helpers import tiny_run
from tests.helpers.tiny_run import CPU

CFG = dataclasses.replace(flux.flavor("flux-tiny"), depth=1, depth_single_blocks=1)
TABLE = (("*", {"shard": 0, "context": 0}),)
PROMPTS = [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "four", "five", "six")]
SETTINGS = {"seed": 5, "height": 32, "width": 16, "steps": 2}


@functools.cache
def weights(seed: int = 1) -> dict:
    """Returns the model's weights, the same in every process."""
    return flux.init(CFG, seed=seed, scheme="nonzero")


def lay_out(made: Mesh, whole: dict, compute: torch.dtype | None = None) -> tuple[Sharding, dict]:
    """Returns the sharding over a mesh, and what this process has of a tree as wide as the weights."""
    flat = tree.flatten(whole)
    places = placements.resolve(TABLE, flat, made, "parallel.params")
    mine = {
        path: placements.distribute(flat[path][places[path].local(made)].clone(), places[path], made) for path in flat
    }
    return Sharding(made, tree.unflatten(places), compute=compute, device=CPU), tree.unflatten(mine)


def validation(config: Any, made: Mesh, count: int, batch_size: int) -> dict[str, Any]:
    """Returns the validation loss of the first `count` samples, on all processes of a mesh."""
    compute = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.numerics.compute]
    sharding, mine = lay_out(made, weights(), compute)
    codec = encoders.build(config, CFG, CPU, made)
    batches = pipeline.batches(
        config,
        sources.build(config, "validation"),
        codec.tokenize,
        batch_size=validate.samples_per_pass(count, batch_size, made) * made.size(),
        training=False,
        limit=count,
        rank=made.rank,
        world=made.size(),
    )
    return validate.run(mine, CFG, batches, config=config, encoders=codec, device=CPU, sharding=sharding)


Case = tuple[dict[str, int], dict[str, Any], int, int]


def validations(rank: int, cases: list[Case]) -> list[tuple[dict[str, Any], dict]]:
    """Returns (`validation`, the bytes sent) in each case: sizes of the mesh, fields, samples, samples a pass."""
    del rank
    out = []
    for sizes, fields, count, batch_size in cases:
        with collectives.tally() as counted:
            found = validation(tiny_run.config(fields), mesh.build(sizes), count, batch_size)
        out.append((found, sorted(counted.values())))
    return out


def interrupted(rank: int) -> str:
    """Returns what is raised where the data of rank 1 end in an error after a batch, and the others' do not."""

    def batches():
        yield from pipeline.batches(
            config,
            sources.build(config, "validation"),
            codec.tokenize,
            batch_size=2,
            training=False,
            limit=4 - 2 * rank,
        )
        if rank == 1:
            raise UserError("data.path is 'there': is gone")

    config, made = tiny_run.config(), mesh.build({"replicate": 2, "shard": 1, "context": 1})
    sharding, mine = lay_out(made, weights())
    codec = encoders.build(config, CFG, CPU, made)
    try:
        validate.run(mine, CFG, batches(), config=config, encoders=codec, device=CPU, sharding=sharding)
    except UserError as error:
        return str(error)
    return ""


def images(made: Mesh, prompts: list[str], changes: dict[str, Any]) -> torch.Tensor | None:
    """Returns the images of some prompts, in the first process."""
    sharding, mine = lay_out(made, weights())
    codec = encoders.build(tiny_run.config(), CFG, CPU, made)
    return generate.generate(mine, CFG, codec, prompts, **{**SETTINGS, **changes}, sharding=sharding)


def drawings(rank: int, cases: list[tuple[dict[str, int], int, dict[str, Any]]]) -> list[np.ndarray | None]:
    """Returns `images` in each case: sizes of the mesh, how many of the prompts, and changes to the settings."""
    del rank
    found = [images(mesh.build(sizes), PROMPTS[:count], changes) for sizes, count, changes in cases]
    return [None if each is None else each.numpy() for each in found]


def averages(rank: int, steps: int) -> bool:
    """Returns whether the average of parts is the part of the average, bit for bit, after some steps."""
    del rank
    made = mesh.build({"replicate": 1, "shard": 2, "context": 2})
    whole = tree.map(torch.clone, weights())
    _, mine = lay_out(made, whole)
    shard = placements.shards(mine)
    for step in range(steps):
        params, decay = weights(step + 2), ema.decay_at(step, 0.9)
        whole = ema.update(whole, params, decay)
        shard = ema.update(shard, placements.shards(lay_out(made, params)[1]), decay)
    expected = tree.flatten(placements.shards(lay_out(made, whole)[1]))
    # In place: the DTensors of `mine` are what has changed.
    found = {path: leaf.to_local() for path, leaf in tree.flatten(mine).items()}
    return all(torch.equal(found[path], expected[path]) for path in expected)


def program(rank: int, runs: list[dict[str, Any]]) -> list[str]:
    """Runs `sample_main.sample` with some flags, one time after the other; returns what each time was raised, or ""."""
    del rank
    said = []
    for flags in runs:
        try:
            sample_main.sample(types.SimpleNamespace(**flags), CPU)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def apart(rank: int, flags: list[dict[str, Any]]) -> list[str]:
    """Runs `program` once, each process with flags of its own."""
    return program(rank, [flags[rank]])


def along(rank: int, folder: str, runs: list[dict[str, Any]]) -> list[str]:
    """Runs `program` in a folder, where no prompt is encoded ahead."""
    os.chdir(folder)
    sample_main.ENCODED_AHEAD = 0
    return program(rank, runs)
