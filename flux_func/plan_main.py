"""Says what a run will take before anything is rented: memory, communication, time, and the mesh that is cheapest.

    plan_main --config=configs/flux_dev.py --mesh=replicate=16,shard=64 --device=h200 --config.train.batch_size=4096
    plan_main --config=configs/flux_dev.py --processes=64 --device=h100 --config.remat.policy=none
    plan_main --config=configs/flux_dev.py --mesh=shard=8 --trace --json=plan.json

With --mesh that one is planned; without, every mesh of so many processes is, and the cheapest that fits comes first.
The config is a run's own, so any of its fields may be tried; files that it names (weights apart) need not be there.
"""

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import torch
from absl import flags
from tqdm import tqdm

from flux_func import cli, tree
from flux_func import config as configs
from flux_func.errors import UserError
from flux_func.models import autoencoder, flops, flux
from flux_func.parallel import mesh
from flux_func.plan import devices, encoding, predict, report, trace
from flux_func.plan.report import Case
from flux_func.train import adapt, encoders, layout, optimizer, state
from flux_func.train import step as steps

# The text encoders of FLUX.1, where the config names no folder with others: their config.json.
T5 = dict(model_type="t5", d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24, vocab_size=32128,
          feed_forward_proj="gated-gelu", relative_attention_num_buckets=32, tie_word_embeddings=False)  # fmt: skip
CLIP = dict(model_type="clip_text_model", hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, vocab_size=49408, hidden_act="quick_gelu")  # fmt: skip


def run() -> None:
    """The console script."""
    cli.define_config()
    flags.DEFINE_string("mesh", None, "Sizes such as replicate=16,shard=64; left out: all that --processes allows.")
    flags.DEFINE_integer("processes", None, "Devices in all; left out: as many as --mesh makes.")
    flags.DEFINE_string("device", "h200", f"One of {', '.join(devices.DEVICES)}.")
    flags.DEFINE_integer("node", 8, "Devices in a node.")
    flags.DEFINE_float("network_gbps", None, "Of the network, for each device, in Gb/s; left out: as is usual with it.")
    flags.DEFINE_bool("trace", False, "Also run the training fold itself on fake tensors, and compare.")
    flags.DEFINE_string("json", None, "File to write the plans to.")
    cli.run(main, alone=True)


def main(argv: list[str]) -> int:
    """Plans as the flags say; returns the exit code, 1 where nothing fits."""
    del argv
    given = flags.FLAGS
    device, chosen = choose_device(given), choose_meshes(given)
    if given.json and not Path(given.json).absolute().parent.is_dir():
        raise UserError(f"--json is {given.json!r}: there is no folder {Path(given.json).parent}; make it first")
    with complete(given.config) as config:
        configs.validate(config)
        asked = prepare(config)
        cases, refused = plan_all(asked, chosen, device, given.node)
        best = cases[0]
        if len(chosen) > 1:
            print(report.comparison(cases, refused))
        print(describe(asked, best))
        print(report.details(best))
        found = trace_of(asked, best) if given.trace else None
        if found:
            print(report.against(found))
    if given.json:
        write(given.json, {"config": config.to_dict(), "plans": [report.to_json(case) for case in cases]})
    return 0 if best.fits else 1


# Flags.


def choose_device(given: Any) -> devices.Device:
    """Returns the device that the flags name; UserError for one that is not known."""
    if given.device not in devices.DEVICES:
        raise UserError(f"--device is {given.device!r}: {configs.one_of(given.device, devices.DEVICES)}")
    if given.node < 1:
        raise UserError(f"--node is {given.node}: should be at least 1")
    device = devices.DEVICES[given.device]
    if given.network_gbps is None:
        return device
    if given.network_gbps <= 0:
        raise UserError(f"--network_gbps is {given.network_gbps}: should be above 0")
    return dataclasses.replace(device, network=given.network_gbps * 1e9 / 8)


def choose_meshes(given: Any) -> list[dict[str, int]]:
    """Returns the mesh that --mesh names, or all that --processes allows; UserError where neither makes sense."""
    if given.processes is not None and given.processes < 1:
        raise UserError(f"--processes is {given.processes}: should be at least 1")
    if given.mesh is None:
        if given.processes is None:
            raise UserError("--mesh is not given: should be such as replicate=2,shard=8; or give --processes for all")
        return mesh.meshes(given.processes)
    sizes = dict.fromkeys(mesh.AXES, 1)
    for part in given.mesh.split(","):
        axis, _, size = part.partition("=")
        where = f"--mesh is {given.mesh!r}"
        if axis not in sizes:
            raise UserError(f"{where}: {configs.one_of(axis, mesh.AXES)}, such as replicate=2,shard=8")
        if not size.removeprefix("-").isdigit():
            raise UserError(f"{where}: {axis} should be a whole number, or -1 for what is left of --processes")
        sizes[axis] = int(size)
    if given.processes is None and -1 in sizes.values():
        raise UserError(f"--mesh is {given.mesh!r}: -1 is what is left of --processes, which is not given")
    return [mesh.resolve(sizes, math.prod(sizes.values()) if given.processes is None else given.processes)]


@contextlib.contextmanager
def complete(config: ml_collections.ConfigDict) -> Iterator[ml_collections.ConfigDict]:
    """Gives the config with what planning needs of the files that it does not name: FLUX.1's own encoders."""
    config = config.copy_and_resolve_references()
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        if config.text.kind == "hf" and not (config.text.path or (config.text.t5 and config.text.clip)):
            config.text.path = folder
            for part, form in (("text_encoder_2", T5), ("text_encoder", CLIP)):
                Path(folder, part).mkdir()
                Path(folder, part, "config.json").write_text(json.dumps(form), encoding="utf-8")
        config.autoencoder.random_init |= config.autoencoder.kind == "kl" and not config.autoencoder.path
        if config.lora.rank and not config.model.weights:
            config.model.init = "nonzero"  # whatever the weights under a LoRA are
        config.compile.update(enabled=False, mode="")  # counted eager: compiled, nothing more is kept or sent
        config.kernels.attention = ""  # nor by another kernel
        # Nor in Float8, of which as much is kept: the time is that in bfloat16.
        config.numerics.update(linear="", patterns=configs.default().numerics.patterns)
        if config.data.source != "digits":
            config.data.path = config.data.path or "not given"
        yield config


# Plans.


class Asked(NamedTuple):
    """A run: its config, and what follows from that on any mesh."""

    config: ml_collections.ConfigDict
    cfg: flux.FluxConfig
    optimizer: optimizer.Optimizer
    shapes: dict


def prepare(config: ml_collections.ConfigDict) -> Asked:
    """Returns what a config asks for; UserError where that cannot be."""
    path, chosen = config.model.weights, optimizer.from_config(config)
    cfg = state.model_config(config, state.find_weights(path, "transformer", "model.weights") if path else None)
    return Asked(config, cfg, chosen, state.abstract(config, cfg, chosen))


def plan_all(
    asked: Asked, chosen: list[dict[str, int]], device: devices.Device, node: int
) -> tuple[list[Case], list[tuple[dict[str, int], str]]]:
    """Returns what each mesh takes, the cheapest that fits first, and the meshes that cannot be, with the reason.

    Cheapest are the fewest seconds for a sample, times devices; of equal ones the least memory.

    Raises:
      UserError: no mesh can be.
    """
    cases, refused, known = [], [], {}
    for sizes in tqdm(chosen, desc="meshes", disable=len(chosen) < 2):
        try:
            cases.append(plan_one(asked, sizes, devices.Cluster(device, sizes, node), known))
        except UserError as error:
            refused.append((sizes, str(error)))
    if not cases:
        raise UserError(refused[0][1])
    return sorted(cases, key=lambda case: (not case.fits, case.plan.seconds, case.plan.peak)), refused


def plan_one(asked: Asked, sizes: Mapping[str, int], cluster: devices.Cluster, known: dict) -> Case:
    """Returns what a mesh takes, with what is `known` of others; UserError where it cannot be."""
    config, problem = asked.config, pose(asked, predict.Planned(sizes), torch.device("meta"))
    encoded = encoders_of(config, problem, cluster.device)
    found = predict.predict(dataclasses.replace(problem, **encoded), cluster, known)
    tokens = ((config.data.image_size // 16) ** 2, config.text.max_length)
    operations = flops.training_flops(asked.cfg, *tokens) * config.train.batch_size * adapt.share_of_flops(config)
    return Case(cluster, found, config.train.batch_size, operations)


def pose(asked: Asked, over: mesh.Mesh, device: torch.device) -> predict.Problem:
    """Returns a step of a run over a mesh, without its encoders; UserError where the mesh cannot be."""
    config, cfg, opt, shapes = asked
    # Of a state in the host's memory the gradients stay where they are: nothing can be copied off the meta device.
    split = dataclasses.replace(layout.build(config, cfg, opt, over, device), home=device)
    base = None
    if config.lora.rank:
        under = dataclasses.replace(layout.of_weights(config, cfg, over, device), home=device)
        base = adapt.Base(predict.parts(under.params, over), under, cfg)
    placed = state.placement(shapes, split)
    each = (placed[path] for path in tree.flatten(shapes))
    count = config.train.batch_size // over.size(split.batch_axes) // config.train.accumulate
    update = functools.partial(
        steps.apply, loss=torch.zeros((), device="meta"), step=0, config=config, optimizer=opt, sharding=split
    )
    return predict.Problem(
        cfg=cfg,
        sharding=split,
        state=tree.map(lambda _: next(each), shapes),
        batch=batch(config, cfg, count),
        ops=layout.ops(config, cfg, split),
        remat=layout.remat(config),
        accumulate=config.train.accumulate,
        update=update,
        offload=config.parallel.offload,
        base=base,
    )


def batch(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, count: int) -> dict[str, torch.Tensor]:
    """Returns a batch of `ff.loss` of `count` samples on the meta device."""
    encoded = state.DTYPES[config.numerics.compute] if config.text.kind == "hf" else torch.float32
    side, make = config.data.image_size // encoders.PIXELS_PER_LATENT, functools.partial(torch.empty, device="meta")
    latents = (count, encoders.LATENT_CHANNELS, side, side)
    return {
        "latents": make(latents),
        "noise": make(latents),
        "timesteps": make(count),
        "txt": make(count, config.text.max_length, cfg.context_in_dim, dtype=encoded),
        "y": make(count, cfg.vec_in_dim, dtype=encoded),
        **({"guidance": make(count)} if cfg.guidance_embed else {}),
    }


def encoders_of(config: ml_collections.ConfigDict, problem: predict.Problem, device: devices.Device) -> dict[str, Any]:
    """Returns `predict.Problem`'s fields of the encoders; UserError where they do not serve."""
    dtype = state.DTYPES[config.numerics.compute]
    image_cfg = autoencoder.AutoencoderConfig(kind=config.autoencoder.kind)
    try:
        text_cfg = encoders.text_config(config, problem.cfg)
        split = encoders.t5_sharding(config, text_cfg, dtype, torch.device("meta"), problem.sharding.mesh)
        count = len(problem.batch["latents"])
        done = encoding.steps(text_cfg, image_cfg, split, count, config.data.image_size, dtype, device)
        return {"frozen": encoding.weights(text_cfg, image_cfg, split, dtype), "encode": tuple(done)}
    except ValueError as error:
        raise UserError(str(error)) from error


def trace_of(asked: Asked, case: Case) -> tuple[predict.Plan, trace.Trace]:
    """Returns the plan of a mesh without encoders, and what the fold did on it."""
    planned = pose(asked, predict.Planned(case.cluster.sizes), torch.device("meta"))
    with trace.processes(case.cluster.sizes) as over:
        found = trace.trace(pose(asked, over, torch.device("cpu")))
    return predict.predict(planned, case.cluster), found


# What is said.


def describe(asked: Asked, case: Case) -> str:
    """Returns what is planned for, and the table of its placements."""
    config, over = asked.config, predict.Planned(case.cluster.sizes)
    problem = pose(asked, over, torch.device("meta"))
    tokens = (config.data.image_size // 16) ** 2 + config.text.max_length
    micro = len(problem.batch["latents"])
    lines = [
        f"{config.model.flavor or config.model.weights}, {flops.parameters(problem.cfg):,} parameters, "
        f"{config.data.image_size} pixels, {tokens} tokens, remat {config.remat.policy}",
        f"{over.size()} {case.cluster.device.name}, {case.cluster.node} to a node; batch {config.train.batch_size}: "
        f"{config.train.accumulate} x {micro} on a process",
        "",
        layout.say(tree.flatten(problem.state), over),
        *([adapt.say(problem.base)] if problem.base else []),
    ]
    return "\n".join(lines)


def write(path: str, content: dict[str, Any]) -> None:
    """Writes JSON; UserError where that cannot be."""
    try:
        Path(path).write_text(json.dumps(content, indent=1, default=list), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json is {path!r}: cannot be written ({error.strerror}); name another file") from error


if __name__ == "__main__":
    run()
