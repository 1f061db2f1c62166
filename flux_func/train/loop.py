"""A training run from its config to its last checkpoint: what `train_main` does."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import torch
from absl import logging

from flux_func import config as configs
from flux_func import tree
from flux_func.data import images as pictures
from flux_func.data import pipeline, sources
from flux_func.errors import UserError
from flux_func.interop.stored import Stored
from flux_func.launch import processes
from flux_func.models import flops, flux
from flux_func.models.layers import Ops, Params
from flux_func.parallel import mesh as meshes
from flux_func.parallel import placements
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import Sharding
from flux_func.parallel.timeline import listening
from flux_func.train import (
    adapt,
    checkpoint,
    encoders,
    generate,
    layout,
    meter,
    metrics,
    optimizer,
    profile,
    state,
    validate,
)
from flux_func.train import step as steps
from flux_func.train import workdir as workdirs


@dataclass(frozen=True)
class Run:
    """What stays the same through a run; `weights`, unread, are those that it is about to start from, or to adapt."""

    config: ml_collections.ConfigDict
    workdir: Path
    device: torch.device
    cfg: flux.FluxConfig
    weights: Stored | None
    encoders: encoders.Encoders
    sharding: Sharding
    ops: Ops
    optimizer: optimizer.Optimizer
    schedule: Callable[[int], float]
    train_source: Any
    validation_source: Any
    base: adapt.Base | None = None  # what is under a LoRA


def train(
    config: ml_collections.ConfigDict, workdir: str, device: torch.device, stop: Callable[[], str] = lambda: ""
) -> None:
    """Trains from the workdir's newest checkpoint, or from the start, to train.steps.

    Args:
      config: as `config.default` gives it.
      workdir: where everything is written; made once all settings are found good.
      device: what to compute on.
      stop: returns a word (the name of a signal) when the run is to save and end before its time.

    Raises:
      UserError: a setting that cannot be honoured, before anything is written.
    """
    processes.agree({"workdir": workdir, **dict(configs.flat(config))})
    configs.validate(config)
    mesh = meshes.build(config.parallel, "cpu" if config.parallel.offload else device.type, processes.limit())
    with processes.together():
        resumed, run = prepare(config, workdir, device, mesh)
    if config.lora.rank:
        run = dataclasses.replace(run, base=adapt.load(config, run.cfg, run.weights, mesh, device))
    current, start = begin(run, resumed), resumed or 0
    with contextlib.ExitStack() as held:
        with processes.together():
            if processes.is_first():
                held.enter_context(workdirs.keeping_others_out(run.workdir))
            if checkpoint.latest(workdir) != resumed:
                raise UserError(f"workdir is {workdir!r}: another run saved a checkpoint there meanwhile; start again")
        if processes.is_first():
            metrics.write_json(run.workdir / "config.json", to_json(config))
        kept = config.checkpoint.keep_last, config.checkpoint.keep_every
        checkpoints = held.enter_context(checkpoint.Checkpoints(workdir, *kept))
        opened = metrics.open_metrics(
            workdir,
            config.train.steps,
            start,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            config=to_json(config),
            first=processes.is_first(),
        )
        writer = held.enter_context(opened)
        writer.say(layout.say(state.placement(state.abstract(config, run.cfg, run.optimizer), run.sharding), mesh))
        if run.base:
            writer.say(adapt.say(run.base))
        with contextlib.closing(batches(run, start)) as data:
            step, signal = loop(run, current, start, data, checkpoints, writer, stop)
        finish(run, current, step, checkpoints, writer, signal)


def prepare(
    config: ml_collections.ConfigDict, workdir: str, device: torch.device, mesh: Mesh
) -> tuple[int | None, Run]:
    """Checks everything that can be checked and builds what a run needs; writes nothing."""
    workdirs.check_workdir(workdir)
    if config.metrics.wandb:
        metrics.import_wandb(config.metrics.wandb)
    resumed = None
    found = checkpoint.resume_point(workdir)
    if found:
        resumed, saved = found
        configs.check_resume(saved, config)
        if resumed > config.train.steps:
            raise UserError(
                f"train.steps is {config.train.steps}: should be at least {resumed}, the step of the checkpoint in "
                f"the workdir; or name another --workdir"
            )
    chosen, (cfg, weights) = optimizer.from_config(config), choose_model(config, workdir, resumed)
    sharding = layout.build(config, cfg, chosen, mesh, device)
    profile.check(config, resumed or 0)
    upcoming = [step for step in range((resumed or 0) + 1, config.train.steps) if due(step, config.checkpoint.every)]
    kept = state.abstract(config, cfg, chosen)
    if not upcoming and config.checkpoint.last_weights_only:
        kept = checkpoint.weights(kept)
        if config.checkpoint.export_dtype:
            kept = tree.map(lambda leaf: leaf.to(state.DTYPES[config.checkpoint.export_dtype]), kept)
    workdirs.check_room(
        workdir,
        state.size_in_bytes(kept),
        [*upcoming, config.train.steps],
        config.checkpoint.keep_last,
        config.checkpoint.keep_every,
    )
    run = Run(
        config=config,
        workdir=Path(workdir),
        device=device,
        cfg=cfg,
        weights=weights,
        sharding=sharding,
        ops=layout.ops(config, cfg, sharding),
        optimizer=chosen,
        schedule=optimizer.schedule_from_config(config),
        train_source=sources.build(config, config.data.split),
        validation_source=sources.build(config, config.validate.split) if needs_validation(config) else None,
        encoders=encoders.build(config, cfg, device, mesh),  # last, as this may take minutes
    )
    return resumed, run


def choose_model(
    config: ml_collections.ConfigDict, workdir: str, resumed: int | None
) -> tuple[flux.FluxConfig, Stored | None]:
    """Returns the model to train, and the weights that it starts from or adapts; a whole checkpoint has its own."""
    if resumed is not None:
        cfg = checkpoint.read_model(workdir, resumed)
        return cfg, adapt.find(config, cfg) if config.lora.rank else None
    path = config.model.weights
    weights = state.find_weights(path, "transformer", "model.weights") if path else None
    return state.model_config(config, weights), weights


def needs_validation(config: ml_collections.ConfigDict) -> bool:
    """Returns whether anything of a run is taken from the validation split."""
    return bool(config.validate.every or (config.sample.every and not config.sample.prompts))


def begin(run: Run, resumed: int | None) -> dict:
    """Returns the state to go on from: the checkpoint's, or a fresh one."""
    home = run.sharding.home or run.device
    if resumed is None:
        return state.create(run.config, run.cfg, run.optimizer, home, run.weights, run.sharding)
    like = state.abstract(run.config, run.cfg, run.optimizer)
    places = state.placement(like, run.sharding)
    return checkpoint.restore(run.workdir, resumed, like, home, placements=places, mesh=run.sharding.mesh)


def loop(
    run: Run,
    current: dict,
    start: int,
    data: Iterator[dict[str, Any]],
    checkpoints: checkpoint.Checkpoints,
    writer: metrics.Metrics,
    stop: Callable[[], str],
) -> tuple[int, str]:
    """Takes the steps from `start` to train.steps, with what is due after each.

    Returns:
      The last step taken, and the word of `stop` (of any process) that ended the run before its time, or "".
    """
    config, step, skipped = run.config, start, writer.last("samples_skipped", 0) if start else 0
    times = meter.Meter(config, run.cfg, run.sharding, run.device, run.schedule, writer, skipped)
    signal = processes.agreed_stop(stop)
    traced = profile.traced(config.profile.steps, start, run.workdir, run.device, writer.say, times.aside)
    with traced as trace, listening(times.listener):
        while step < config.train.steps and not signal:
            batch = times.next(data)
            say_skipped(batch, f"step {step + 1}", writer)
            current, out = steps.train_step(
                current,
                batch,
                step,
                cfg=run.cfg,
                config=config,
                encoders=run.encoders,
                optimizer=run.optimizer,
                device=run.device,
                sharding=run.sharding,
                ops=run.ops,
                base=run.base,
            )
            step += 1
            last, signal = step == config.train.steps, processes.agreed_stop(stop)
            times.took(step, out, due(step, config.log.every) or last or bool(signal))
            trace()
            if any(due(step, group.every) for group in (config.validate, config.sample, config.checkpoint)):
                times.flush()
                with times.aside():
                    between(run, current, step, last, checkpoints, writer)
        times.flush()
    return step, signal


def between(
    run: Run, current: dict, step: int, last: bool, checkpoints: checkpoint.Checkpoints, writer: metrics.Metrics
) -> None:
    """Does what is due after a step; the checkpoint of the last one is `finish`'s."""
    config = run.config
    if due(step, config.validate.every):
        writer.write(step, validation(run, current, step, writer))
    if due(step, config.sample.every):
        draw(run, current, prompts(run), f"step_{step:06d}.png")
    if due(step, config.checkpoint.every) and not last:
        checkpoints.save(step, current, run.cfg, to_json(config))
        writer.draw()


def finish(
    run: Run, current: dict, step: int, checkpoints: checkpoint.Checkpoints, writer: metrics.Metrics, signal: str
) -> None:
    """Saves the last checkpoint, waits for it, and writes the summary."""
    config, done = run.config, step == run.config.train.steps
    weights_only = done and config.checkpoint.last_weights_only
    kept = checkpoint.weights(current, config.checkpoint.export_dtype) if weights_only else current
    checkpoints.save(step, kept, run.cfg, to_json(config), wait=True)
    if not done:
        writer.say(
            f"stopped by {signal} after step {step} of {config.train.steps}; the checkpoint is saved: "
            f"the same command goes on from it"
        )
    summary = writer.close(parameters=flops.parameters(run.cfg), processes=processes.world())
    if processes.is_first():
        if summary["time_share_median"]:
            print(f"where a step's time went: {metrics.say_shares(summary['time_share_median'])}")
        print(f"{run.workdir} holds the run: step {step}, loss {summary['final_loss']}", flush=True)


def batches(run: Run, start: int) -> Iterator[dict[str, Any]]:
    """Returns the training batches from step `start` on."""
    return pipeline.batches(
        run.config,
        run.train_source,
        run.encoders.tokenize,
        batch_size=run.config.train.batch_size,
        start_step=start,
        posterior_noise=run.encoders.posterior_noise,
        rank=run.sharding.mesh.index(run.sharding.batch_axes),
        world=run.sharding.mesh.size(run.sharding.batch_axes),
    )


def held_out(run: Run, count: int, batch_size: int, mesh: Mesh = ONE) -> Iterator[dict[str, Any]]:
    """Returns the first `count` samples of the validation split, the same at every validation, dealt to processes."""
    return pipeline.batches(
        run.config,
        run.validation_source,
        run.encoders.tokenize,
        batch_size=batch_size * mesh.size(),
        training=False,
        limit=count,
        posterior_noise=run.encoders.posterior_noise,
        rank=mesh.rank,
        world=mesh.size(),
    )


def say_skipped(batch: dict[str, Any], when: str, writer: metrics.Metrics) -> dict[str, Any]:
    """Names the samples that were replaced in a batch; returns the batch."""
    for line in batch["skipped"]:
        said = f"{when}: a sample was replaced: {line}"
        # What the others print is not seen, what they log is.
        writer.say(said) if processes.is_first() else logging.warning("%s", said)
    return batch


def validation(run: Run, current: dict, step: int, writer: metrics.Metrics) -> dict[str, Any]:
    """Returns the validation loss, after drawing the split's own captions where that is asked for."""
    v, mesh = run.config.validate, run.sharding.mesh
    if v.images:
        draw(run, current, captions(run, v.images), f"validation_{step:06d}.png")
    held = held_out(run, v.samples, validate.samples_per_pass(v.samples, v.batch_size, mesh), mesh)
    params, sharding, ops = evaluated(run, current)
    return validate.run(
        params,
        run.cfg,
        (say_skipped(batch, "validation", writer) for batch in held),
        config=run.config,
        encoders=run.encoders,
        device=run.device,
        sharding=sharding,
        ops=ops,
    )


def evaluated(run: Run, current: dict) -> tuple[Params, Sharding, Ops]:
    """Returns the parameters, sharding and ops of forward passes alone, by the averaged weights where there are any."""
    ops = layout.evaluation(run.device, run.config.kernels.attention)
    return adapt.forward(run.base, placements.shards(state.averaged(current)), run.sharding, ops)


def prompts(run: Run) -> list[str]:
    """Returns the prompts of the sample grids."""
    return list(run.config.sample.prompts) or captions(run, 4)


def captions(run: Run, count: int) -> list[str]:
    """Returns the first captions of the validation split."""
    return [caption for batch in held_out(run, count, count) for caption in batch["caption"]]


def draw(run: Run, current: dict, texts: list[str], name: str) -> None:
    """Samples a grid with the settings of config.sample into samples/NAME."""
    s, size = run.config.sample, run.config.data.image_size
    params, sharding, ops = evaluated(run, current)
    images = generate.generate(
        params,
        run.cfg,
        run.encoders,
        texts,
        seed=s.seed,
        height=size,
        width=size,
        steps=s.steps,
        guidance=s.guidance,
        cfg_scale=s.cfg_scale,
        shift=s.shift,
        ops=ops,
        sharding=sharding,
    )
    if images is not None:
        pictures.save(pictures.grid(images.numpy(), texts), run.workdir / "samples" / name)


def due(step: int, every: int) -> bool:
    """Returns whether something done `every` steps (0: never) is done after this one."""
    return bool(every) and step % every == 0


def to_json(config: ml_collections.ConfigDict) -> dict:
    """Returns the config as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))
