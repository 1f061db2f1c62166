"""Compares with a reference, side by side: the same weights and inputs through its own code and through ours.

    parity_main --reference=bfl
    parity_main --reference=diffusers --weights=FLUX.1-dev --parts=transformer
    parity_main --reference=torchtitan --reference_python=/path/to/its/venv/bin/python

Forward in float32 and bfloat16, each stage by itself, every parameter's gradient, embeddings, the sampler's trajectory,
the autoencoder both ways, T5 and CLIP: a table of measures and bounds, report.json and report.html. Exit code 0 where
all is within bounds, 1 where something is not, 2 for what a user can put right. Without --weights they are drawn such
that none is zero, since zeros hide errors.
"""

import dataclasses
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import torch
from absl import flags

import flux_func
from flux_func import cli, tree
from flux_func import config as configs
from flux_func.errors import UserError
from flux_func.interop import diffusers, formats, pipelines, recognize, target
from flux_func.models import flux, text
from flux_func.models.autoencoder import AutoencoderConfig
from flux_func.models.flux import FluxConfig
from flux_func.models.text import TextConfig
from flux_func.parity import compare, exchange, problem, process, report
from flux_func.parity.problem import Problem


def run() -> None:
    """The console script."""
    _define_flags()
    cli.run(main, alone=True)


def _define_flags() -> None:
    cli.define_config(required=False)
    flags.DEFINE_enum("reference", None, problem.REFERENCES, "Whose code to compare with.", required=True)
    flags.DEFINE_string("reference_python", sys.executable, "Python of the environment that the reference is in.")
    flags.DEFINE_string("weights", None, "File, folder or pipeline to compare with, of any format; left out: drawn.")
    flags.DEFINE_string("out", None, "Folder of the report, new or empty; left out: parity/REFERENCE_NNN.")
    flags.DEFINE_string("corrupt", None, "A weight whose first row to damage on our side: the run is to find it.")
    flags.DEFINE_list("parts", None, f"Of {','.join(problem.PARTS)}; left out: all that apply.")
    flags.DEFINE_string("prompt", None, "What the sampler draws, where --weights is a whole pipeline; left out: noise.")
    flags.DEFINE_integer("seed", 0, "Of the inputs, and of weights that are drawn.")
    flags.DEFINE_integer("batch_size", 2, "Samples in forward, gradients and sampler.")
    flags.DEFINE_integer("height", 128, "Pixels, a multiple of 16.")
    flags.DEFINE_integer("width", 192, "Pixels, a multiple of 16.")
    flags.DEFINE_integer("text_tokens", 64, "Length of the T5 sequence.")
    flags.DEFINE_integer("steps", 4, "Euler steps of the sampler.")
    flags.DEFINE_float("guidance", None, "What the sampler is guided with, where the model has it; left out: 3.5.")
    flags.DEFINE_float("cfg_scale", None, "Of classifier-free guidance in the sampler, above 1; left out: without.")
    flags.DEFINE_bool(
        "shift", None, "Whether the sampler's schedule is shifted; left out: as the pipeline, or shifted."
    )
    cli.define_device()


def main(argv: list[str]) -> int:
    """Compares as the flags say; returns the exit code."""
    del argv
    # What is in the temporary folder, weights and gradients, goes with the process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return parity(flags.FLAGS)


def parity(given: Any) -> int:
    """Compares as `given`, whose attributes are the flags, says; returns the exit code."""
    start = time.perf_counter()
    configs.validate(given.config)
    check(given)
    out = choose_out(given.out, given.reference)
    process.check(given.reference, given.reference_python)
    asked = prepare(given, given.config, _say(start))
    ours = asked.params if given.corrupt is None else compare.damaged(asked.params, given.corrupt)
    with tempfile.TemporaryDirectory(prefix="parity_") as folder:
        exchange.ask(asked, Path(folder))
        process.answer(given.reference, given.reference_python, Path(folder), _say(start, f"{given.reference}: "))
        comparison = compare.compare(asked, ours, Path(folder), _say(start, "ours: "))
        theirs = exchange.about(Path(folder))
    about = describe(given, asked, theirs, time.perf_counter() - start)
    report.write(out, comparison, about)
    print(report.table(comparison.rows))
    print(f"\n{report.verdict(comparison)}")
    print(f"{out / 'report.html'} ({about['resources']['seconds']} s)")
    return 0 if all(row.passed for row in comparison.rows) else 1


def _say(start: float, prefix: str = "") -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {prefix}{line}", file=sys.stderr, flush=True)

    return say


def check(given: Any) -> None:
    """Checks the flags that can be checked by themselves; UserError names the first that is wrong."""
    for flag in ("height", "width"):
        pixels = getattr(given, flag)
        if pixels < 16 or pixels % 16:
            raise UserError(
                f"--{flag} is {pixels}: should be a multiple of 16, such as {max(16, round(pixels / 16) * 16)}"
            )
    for flag in ("batch_size", "text_tokens", "steps"):
        if getattr(given, flag) < 1:
            raise UserError(f"--{flag} is {getattr(given, flag)}: should be at least 1")
    if given.cfg_scale is not None and not given.cfg_scale > 1:
        raise UserError(f"--cfg_scale is {given.cfg_scale}: should be more than 1; leave it out to guide by none")
    if given.cfg_scale is not None and given.reference == "bfl":
        raise UserError(
            f"--cfg_scale is {given.cfg_scale}: bfl's sampler has no such guidance; use diffusers or torchtitan"
        )
    if given.parts == []:
        raise UserError(f"--parts is '': should be some of {', '.join(problem.PARTS)}")
    for part in given.parts or ():
        if part not in problem.PARTS:
            raise UserError(f"--parts is {','.join(given.parts)!r}: {configs.one_of(part, problem.PARTS)}")
    if given.parts is not None and "sampler" in given.parts and "transformer" not in given.parts:
        raise UserError(f"--parts is {','.join(given.parts)!r}: sampler needs transformer beside it")


def choose_out(out: str | None, reference: str) -> Path:
    """Returns the report's folder, which is not there yet or empty; UserError where it cannot be written."""
    numbers = (Path("parity") / f"{reference}_{number:03d}" for number in range(10**6))
    path = next(path for path in numbers if not path.exists()) if out is None else Path(out)
    target.check(path, 2**24)
    return path


# The problem.


def prepare(given: Any, config: ml_collections.ConfigDict, say: Callable[[str], object]) -> Problem:
    """Returns the problem that the flags and a config pose; UserError, before `say`, where they cannot be honoured."""
    device, weights = str(cli.choose_device(given.device)), given.weights or config.model.weights
    stored = recognize.find(weights, "transformer") if weights else None
    cfg = choose_model(given.reference, config, stored.cfg if stored else None)
    pipeline = pipelines.open_pipeline(weights) if weights and (Path(weights) / pipelines.INDEX).is_file() else None
    parts, shift = choose_parts(given, cfg), choose_shift(given, pipeline.shift if pipeline else True)
    if given.guidance is not None and not cfg.guidance_embed:
        raise UserError(f"--guidance is {given.guidance}: this model has no guidance embedding; leave it out")
    if given.prompt is not None and not (pipeline and "sampler" in parts):
        raise UserError(
            f"--prompt is {given.prompt!r}: is read only where --weights is a whole pipeline and sampled from"
        )
    leaves = tree.flatten(flux.abstract(cfg))
    if given.corrupt is not None and "transformer" not in parts:
        raise UserError(f"--corrupt is {given.corrupt!r}: is a weight of the transformer, and --parts leaves that out")
    if given.corrupt not in (None, *leaves):
        raise UserError(
            f"--corrupt is {given.corrupt!r}: {configs.nearest(given.corrupt, leaves)}should be a weight's path"
        )
    say("weights")
    stored_eps = stored.cfg.qk_norm_eps if stored and stored.cfg.qk_norm_eps != cfg.qk_norm_eps else None
    if stored_eps is not None:
        say(f"qk_norm_eps is {stored_eps} with these weights: both sides take {given.reference}'s, {cfg.qk_norm_eps}")
    if stored:
        params = stored.params(torch.float32, device)
    else:
        params = flux.init(cfg, given.seed, device=device, scheme="nonzero")
    return Problem(
        reference=given.reference,
        cfg=cfg,
        params=params,
        parts=parts,
        **(choose_autoencoder(weights if pipeline else None, given.seed, device) if "autoencoder" in parts else {}),
        text_path=os.path.abspath(weights) if pipeline else "",
        conditioning=encode(weights, given.prompt, given.text_tokens) if given.prompt is not None else None,
        stored_eps=stored_eps,
        seed=given.seed,
        batch=given.batch_size,
        height=given.height,
        width=given.width,
        text_tokens=given.text_tokens,
        steps=given.steps,
        guidance=3.5 if given.guidance is None else given.guidance,
        cfg_scale=given.cfg_scale,
        shift=shift,
        device=device,
    )


def choose_model(reference: str, config: ml_collections.ConfigDict, stored: FluxConfig | None) -> FluxConfig:
    """Returns the model: the weights', or the config's where there are none, with the reference's qk_norm_eps.

    Raises:
      UserError: the reference cannot compute it.
    """
    embed, cfg = config.model.guidance_embed, stored or flux.flavor(config.model.flavor)
    if stored is None and embed is not None:
        cfg = dataclasses.replace(cfg, guidance_embed=embed)
    if embed not in (None, cfg.guidance_embed):
        raise UserError(f"model.guidance_embed is {embed}: the weights say {cfg.guidance_embed}; leave it out")
    if reference == "torchtitan" and cfg.guidance_embed:
        raise UserError(
            "--reference is 'torchtitan': it has no guidance embedding, and this model has one; compare with bfl"
        )
    fixed = diffusers.FIXED if reference == "diffusers" else {}
    for name in ("mlp_ratio", "qkv_bias", "theta"):
        value = getattr(cfg, name)
        if value != fixed.get(name, value):
            raise UserError(
                f"--reference is 'diffusers': it has {name} {fixed[name]} alone, this model {value}; use bfl"
            )
    eps = formats.qk_norm_eps(reference)
    if config.model.qk_norm_eps not in (None, eps):
        raise UserError(
            f"model.qk_norm_eps is {config.model.qk_norm_eps}: {reference} computes with {eps}; leave it out"
        )
    return dataclasses.replace(cfg, qk_norm_eps=eps)


def choose_parts(given: Any, cfg: FluxConfig) -> tuple[str, ...]:
    """Returns what is compared: what was asked for, or all that applies."""
    samples = cfg.in_channels == cfg.out_channels
    if given.parts is None:
        return tuple(part for part in problem.PARTS if samples or part != "sampler")
    if "sampler" in given.parts and not samples:
        raise UserError(f"--parts is {','.join(given.parts)!r}: a model with {cfg.in_channels} input channels needs an "
                        f"image to go by, which is not sampled here; leave sampler out")  # fmt: skip
    return tuple(part for part in problem.PARTS if part in given.parts)


def choose_shift(given: Any, usual: bool) -> bool:
    """Returns whether the sampler's schedule is shifted: torchtitan's always is."""
    if given.reference == "torchtitan":
        if given.shift is False:
            raise UserError("--shift is False: torchtitan's sampler always shifts; leave it out")
        return True
    return usual if given.shift is None else given.shift


def choose_autoencoder(pipeline: str | None, seed: int, device: str) -> dict[str, Any]:
    """Returns the problem's autoencoder: the pipeline's, or FLUX's with weights that are drawn."""
    if pipeline is None:
        cfg = AutoencoderConfig(kind="kl")
        return {"autoencoder_cfg": cfg, "autoencoder_params": problem.autoencoder_weights(cfg, seed, device)}
    stored = recognize.find(pipeline, "autoencoder")
    return {"autoencoder_cfg": stored.cfg, "autoencoder_params": stored.params(torch.float32, device)}


def encode(pipeline: str, prompt: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns txt [2, length, context] and y [2, vec] of a prompt and of none, by the pipeline's own encoders."""
    cfg = TextConfig(kind="hf", path=pipeline, max_length=length)
    try:
        return text.encode(text.load(cfg), cfg, text.tokenizer(cfg)([prompt, ""]))
    except ValueError as error:
        raise UserError(f"--weights is {pipeline!r}: {error}") from error


# The report.


def describe(given: Any, asked: Problem, theirs: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Returns what the report says beside its rows."""
    cfg = dataclasses.asdict(asked.cfg)
    distribution, version = next(iter((k, v) for k, v in theirs["versions"].items() if k != "python"))
    names = ("parts", "seed", "batch", "height", "width", "text_tokens", "steps", "shift", "device")
    settings = {name: getattr(asked, name) for name in names}
    settings |= {"guidance": asked.guidance} if asked.cfg.guidance_embed else {}
    settings |= {"cfg_scale": asked.cfg_scale} if asked.cfg_scale else {}
    if asked.stored_eps is not None:
        settings["qk_norm_eps"] = f"{asked.cfg.qk_norm_eps}, the reference's; {asked.stored_eps} with these weights"
    settings |= {"weights": given.weights or "drawn", "prompt": given.prompt or "drawn"}
    settings |= {"corrupted on our side": given.corrupt} if given.corrupt else {}
    count = sum(leaf.numel() for leaf in tree.leaves(asked.params))
    weights = f"weights of {given.weights}" if given.weights else "weights drawn, none of them zero"
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "title": f"flux_func and {distribution} {version}, side by side",
        "subtitle": f"A FLUX of {count:,} parameters, {weights}; {asked.width}x{asked.height} pixels",
        "model": cfg,
        "settings": settings,
        "versions": {
            **{f"theirs: {name}": value for name, value in theirs["versions"].items()},
            "ours: flux_func": flux_func.__version__,
            "ours: torch": torch.__version__,
            "ours: python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
        },
        "resources": {
            "seconds": round(seconds, 1),
            "seconds of the reference": round(theirs["seconds"], 1),
            "peak memory, ours (GiB)": round(ours / 2**30, 2),
            "peak memory, theirs (GiB)": round(theirs["peak_bytes"] / 2**30, 2),
        },
    }


if __name__ == "__main__":
    run()
