"""Samples images from a run's checkpoint.

    sample_main --workdir=DIR --prompt="a handwritten three" --prompt="a handwritten five"
    sample_main --workdir=DIR --prompts_file=prompts.txt --ema --steps=50 --cfg_scale=5

Writes one PNG a prompt, its settings in the metadata, and a grid of them all.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import torch
from absl import flags
from PIL import PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from flux_func import cli
from flux_func import config as configs
from flux_func.data import images as pictures
from flux_func.errors import UserError
from flux_func.models import flux
from flux_func.models.layers import Params
from flux_func.train import checkpoint, encoders, generate
from flux_func.train.state import DTYPES, model_config

# More than this and a grid is no longer looked at: the first ones stand for all.
GRID_IMAGES = 100
# Flags that stand for a field of the run's config where they are left out.
FROM_CONFIG = {
    "height": "data.image_size",
    "width": "data.image_size",
    "steps": "sample.steps",
    "guidance": "sample.guidance",
    "cfg_scale": "sample.cfg_scale",
    "seed": "sample.seed",
}


def run() -> None:
    """The console script."""
    _define_flags()
    cli.run(main)


def _define_flags() -> None:
    cli.define_workdir("Folder of the run to sample from.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint; left out: the newest.")
    flags.DEFINE_bool("ema", False, "Sample from the averaged weights.")
    flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "A text file with a prompt a line, in place of --prompt.")
    flags.DEFINE_integer("seed", None, "Of the noise; left out: sample.seed of the run.")
    flags.DEFINE_integer("height", None, "Pixels, a multiple of 16; left out: data.image_size of the run.")
    flags.DEFINE_integer("width", None, "Pixels, a multiple of 16; left out: data.image_size of the run.")
    flags.DEFINE_integer("steps", None, "Euler steps; left out: sample.steps of the run.")
    flags.DEFINE_float("guidance", None, "Distilled guidance, where the model has it; left out: the run's.")
    flags.DEFINE_float("cfg_scale", None, "Classifier-free guidance, 1: none; left out: sample.cfg_scale of the run.")
    flags.DEFINE_integer("batch_size", 8, "Images sampled at once.")
    flags.DEFINE_string("out", None, "Folder to write to; left out: WORKDIR/samples/sample_main_NNN.")
    flags.DEFINE_bool("overwrite", False, "Write into --out though it is not empty.")
    cli.define_device()


def main(argv: list[str]) -> None:
    """Samples as the flags say."""
    del argv
    sample(flags.FLAGS)


def sample(given: Any) -> None:
    """Samples as `given`, whose attributes are the flags, says; UserError before anything is written."""
    prompts = read_prompts(given.prompt, given.prompts_file)
    config = read_config(given.workdir)
    step = choose_step(given.workdir, given.step)
    settings = choose_settings(config, {name: getattr(given, name) for name in (*FROM_CONFIG, "batch_size")})
    out = choose_out(given.workdir, given.out, given.overwrite)
    device = cli.choose_device(given.device)
    params = load(given.workdir, step, given.ema, config, device)
    codecs = encoders.build(config, model_config(config), device)
    about = {"step": step, "ema": given.ema, "flavor": config.model.flavor, "shift": config.sample.shift}
    write(out, draw(params, config, codecs, prompts, settings), prompts, {**settings, **about})
    print(f"{len(prompts)} images and grid.png are in {out}")


def read_prompts(prompts: Sequence[str], path: str | None) -> list[str]:
    """Returns the prompts of the flags or of a text file, one a line, blank lines left out; UserError for none."""
    if bool(prompts) == bool(path):
        raise UserError(f"--prompt is {list(prompts)} and --prompts_file is {path!r}: give one of them")
    if not path:
        return list(prompts)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file is {path!r}: cannot be read as UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file is {path!r}: it has no prompts; write one a line")
    return prompts


def read_config(workdir: str) -> ml_collections.ConfigDict:
    """Returns the configuration that a run left in its workdir; UserError where there is none, or it is not ours."""
    path = Path(workdir) / "config.json"
    config = configs.default()
    try:
        saved = json.loads(path.read_text())
        configs.check_known([*saved, *dict(configs.flat(saved))])
        config.update(saved)
    except OSError as error:
        remedy = "should be the --workdir of a train_main run"
        raise UserError(f"--workdir is {workdir!r}: {path} cannot be read ({error.strerror}); {remedy}") from error
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--workdir is {workdir!r}: {path} is not a config of this version ({error})") from error
    configs.validate(config)
    return config


def choose_step(workdir: str, step: int | None) -> int:
    """Returns the step asked for, or the newest; UserError names the steps there are."""
    steps = checkpoint.steps(workdir)
    if not steps:
        raise UserError(f"--workdir is {workdir!r}: there is no checkpoint in it yet; train_main writes them")
    if step is not None and step not in steps:
        raise UserError(f"--step is {step}: should be one of {', '.join(map(str, steps))}, which {workdir} holds")
    return steps[-1] if step is None else step


def choose_settings(config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `generate.batches` is told: the flags given, and the run's config for the others.

    Raises:
      UserError: a value out of range, or guidance for a model that has no embedding of it.
    """
    fields = dict(configs.flat(config))
    settings = {**given, **{flag: fields[field] for flag, field in FROM_CONFIG.items() if given[flag] is None}}
    for flag in ("height", "width"):
        pixels = settings[flag]
        if pixels < 16 or pixels % 16:
            nearest = max(16, round(pixels / 16) * 16)
            raise UserError(f"--{flag} is {pixels}: should be a multiple of 16, such as {nearest}")
    for flag in ("steps", "batch_size"):
        if settings[flag] < 1:
            raise UserError(f"--{flag} is {settings[flag]}: should be at least 1")
    for flag in ("guidance", "cfg_scale"):
        if not math.isfinite(settings[flag]):
            raise UserError(f"--{flag} is {settings[flag]}: should be finite")
    if not model_config(config).guidance_embed:
        if given["guidance"] is not None:
            raise UserError(
                f"--guidance is {given['guidance']}: {config.model.flavor} of this run has no guidance embedding; "
                f"leave it out, or use --cfg_scale"
            )
        settings["guidance"] = None
    return settings


def choose_out(workdir: str, out: str | None, overwrite: bool) -> Path:
    """Returns the folder to write to, which is not made yet; UserError if it is not empty and not to be overwritten."""
    if out is None:
        numbers = (Path(workdir) / "samples" / f"sample_main_{number:03d}" for number in range(10**6))
        return next(path for path in numbers if not path.exists())
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out is {out!r}: should be a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--out is {out!r}: it is not empty; name another folder, or add --overwrite")
    return path


def load(workdir: str, step: int, ema: bool, config: ml_collections.ConfigDict, device: torch.device) -> Params:
    """Returns a checkpoint's weights, or their average, in the type that the run computes in."""
    member = "ema" if ema else "params"
    if member not in checkpoint.abstract(workdir, step):
        raise UserError(f"--ema is True: the checkpoint of step {step} holds no average (ema.decay); leave --ema out")
    like = flux.abstract(model_config(config), DTYPES[config.numerics.compute])
    return checkpoint.restore(workdir, step, {member: like}, device, cast=True)[member]


def draw(
    params: Params,
    config: ml_collections.ConfigDict,
    codecs: encoders.Encoders,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
) -> Iterator[Tensor]:
    """Yields the prompts' images, [b, 3, H, W] at a time, under a progress bar that counts Euler steps."""
    total = generate.batch_count(len(prompts), settings["batch_size"]) * settings["steps"]
    with tqdm(total=total, desc="sampling", unit="step") as bar:
        yield from generate.batches(
            params,
            model_config(config),
            codecs,
            prompts,
            **settings,
            shift=config.sample.shift,
            progress=bar.update,
        )


def write(out: Path, batches: Iterable[Tensor], prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Writes each image as soon as it is there, as NNN_the-prompt.png, and then grid.png.

    Args:
      out: the folder; it is made if need be.
      batches: images [b, 3, H, W] in [-1, 1], in the order of the prompts.
      prompts: one for each image.
      settings: what goes into each PNG's text metadata, beside its prompt and its index.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {os.fspath(out)!r}: cannot be made ({error.strerror}); name another") from error
    digits, shown, index = max(3, len(str(len(prompts) - 1))), [], 0
    for batch in batches:
        for image in batch:
            about = {"prompt": prompts[index], "index": index, **settings}
            name = f"{index:0{digits}d}_{slug(prompts[index])}".rstrip("_")
            pictures.to_pil(image.numpy()).save(out / f"{name}.png", pnginfo=metadata(about))
            shown += [image.numpy()] if len(shown) < GRID_IMAGES else []
            index += 1
    pictures.grid(shown, prompts[: len(shown)]).save(out / "grid.png")


def metadata(about: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """Returns PNG text chunks, a JSON value for each key but the prompt, which is written as it is."""
    info = PngImagePlugin.PngInfo()
    for key, value in about.items():
        info.add_itxt(key, value if key == "prompt" else json.dumps(value))
    return info


def slug(text: str, length: int = 60) -> str:
    """Returns a text's letters and digits, lower case, in ASCII where they have a counterpart, joined by dashes."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text)[:length].strip("-")


if __name__ == "__main__":
    run()
