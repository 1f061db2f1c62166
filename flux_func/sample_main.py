"""Samples images from a run's checkpoint, or from a whole pipeline of diffusers'.

    sample_main --workdir=DIR --prompt="a handwritten three" --prompt="a handwritten five"
    sample_main --workdir=DIR --prompts_file=prompts.txt --ema --steps=50 --cfg_scale=5
    sample_main --weights=FLUX.1-schnell --prompt="a red bird" --height=768 --width=1360
    sample_main --weights=FLUX.1-dev --lora=style.safetensors:0.8 --lora=subject.safetensors --prompt="a red bird"
    torchrun --nproc-per-node=8 -m flux_func.sample_main --weights=FLUX.1-dev --prompts_file=prompts.txt

--weights is a folder with model_index.json, as diffusers saves FLUX.1 (dev, schnell, Krea and their like). What is left
out is then as the model is meant to be sampled: 50 steps, guidance 3.5 and 512 text tokens where it has a guidance
embedding (dev), 4 steps and 256 tokens where it has none (schnell); 1024x1024 pixels; the schedule of its scheduler.

--lora is a LoRA's file in any form, and after a colon how much of it; docs/lora.md has more.

Writes one PNG a prompt, its settings in the metadata, and a grid of them all, into --out. Several processes share the
prompts, and the weights, of which each has a part and gathers the rest block by block (--shard).
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from absl import flags
from PIL import PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from flux_func import cli, tree
from flux_func import config as configs
from flux_func.data import images as pictures
from flux_func.errors import UserError
from flux_func.interop import lora_files
from flux_func.launch import memory, processes
from flux_func.models import flux
from flux_func.models.layers import Params
from flux_func.parallel import mesh as meshes
from flux_func.parallel import placements
from flux_func.parallel.mesh import ONE, Mesh
from flux_func.parallel.sharding import Sharding
from flux_func.train import adapt, encoders, generate, layout, origin
from flux_func.train.origin import Origin
from flux_func.train.state import DTYPES
from flux_func.transforms import lora

# More than this and a grid is no longer looked at: the first ones stand for all.
GRID_IMAGES = 100
# Up to this many prompts of a process are encoded before the model is read, so that T5 and the model are never there
# at once; the encodings of more would be as large as T5.
ENCODED_AHEAD = 256
# Flags that stand for a field of the config where they are left out.
FROM_CONFIG = {
    "height": "data.image_size",
    "width": "data.image_size",
    "steps": "sample.steps",
    "guidance": "sample.guidance",
    "cfg_scale": "sample.cfg_scale",
    "seed": "sample.seed",
    "max_length": "text.max_length",
    "dtype": "numerics.compute",
}
# Those of them that are the encoders' and the weights' affair, and not the sampler's.
OF_ENCODERS = ("max_length", "dtype")
# Flags that say which of a run's weights.
OF_RUNS = ("step", "ema")
# Flags that every process is to be given alike.
ALIKE = (
    *FROM_CONFIG,
    *OF_RUNS,
    "workdir",
    "weights",
    "lora",
    "prompt",
    "prompts_file",
    "negative_prompt",
    "batch_size",
    "shard",
    "out",
    "overwrite",
)


def run() -> None:
    """The console script."""
    _define_flags()
    cli.run(main)


def _define_flags() -> None:
    cli.define_workdir("Folder of the run to sample from.", required=False)
    flags.DEFINE_string("weights", None, "Folder of the pipeline to sample from, in place of --workdir.")
    flags.DEFINE_integer("step", None, "Step of the run's checkpoint; left out: the newest.")
    flags.DEFINE_bool("ema", False, "Sample from the run's averaged weights.")
    flags.DEFINE_multi_string("lora", [], "FILE or FILE:WEIGHT, a LoRA on top; may be given several times.")
    flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "A text file with a prompt a line, in place of --prompt.")
    flags.DEFINE_string("negative_prompt", None, "What not to draw, where --cfg_scale is not 1; left out: no words.")
    flags.DEFINE_integer("seed", None, "Of the noise; left out: sample.seed of the run, or 0.")
    flags.DEFINE_integer("height", None, "Pixels, a multiple of 16; left out: data.image_size of the run, or 1024.")
    flags.DEFINE_integer("width", None, "Pixels, a multiple of 16; left out: data.image_size of the run, or 1024.")
    flags.DEFINE_integer("steps", None, "Euler steps; left out: sample.steps of the run, or the pipeline's.")
    flags.DEFINE_float("guidance", None, "Distilled guidance, where the model has it; left out: the run's, or 3.5.")
    flags.DEFINE_float("cfg_scale", None, "Classifier-free guidance, 1: none; left out: the run's, or 1.")
    flags.DEFINE_integer("max_length", None, "Tokens of the T5 sequence; left out: the run's, or the pipeline's.")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "What to compute in; left out: the run's numerics.compute, or float32 for a pipeline that is, else bfloat16.",
    )
    flags.DEFINE_integer("batch_size", 8, "Images that a process samples at once.")
    flags.DEFINE_integer("shard", -1, "Processes that the weights are split over; 1: each has them whole; -1: all.")
    flags.DEFINE_string(
        "out", None, "Folder to write to; left out: samples/sample_main_NNN in the run's folder, or in this one."
    )
    flags.DEFINE_bool("overwrite", False, "Write into --out though it is not empty.")
    cli.define_device()


def main(argv: list[str]) -> None:
    """Samples as the flags say."""
    del argv
    device = cli.choose_device(flags.FLAGS.device)
    memory.keep_freed(device.type)
    processes.start(device)
    sample(flags.FLAGS, device)
    processes.stop()


def sample(given: Any, device: torch.device) -> None:
    """Samples as `given`, whose attributes are the flags, says; UserError before anything is written."""
    with processes.together():
        prompts = read_prompts(given.prompt, given.prompts_file)
        source = choose_loras(choose_origin(given), given.lora)
        names = (*FROM_CONFIG, "batch_size", "negative_prompt")
        settings = choose_settings(source, {name: getattr(given, name) for name in names})
        sizes = choose_mesh(given.shard, processes.world())
        out = choose_out(given.workdir or ".", given.out, given.overwrite)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    processes.agree({**{f"--{flag}": getattr(given, flag) for flag in ALIKE}, "the hash of the prompts": digest})
    out = processes.from_first(out)  # a number of a folder is taken once
    sharding = lay_out(source.cfg, sizes, DTYPES[settings["dtype"]], device)
    params, codecs = load(source, prompts, settings, sharding)
    about = {**settings, **source.about, "shift": source.config.sample.shift}
    images = draw(params, source, codecs, prompts, settings, sharding)
    write(out, images, prompts, about, sharding.mesh)
    processes.gather(None)
    print(f"{len(prompts)} images and grid.png are in {out}")


def choose_origin(given: Any) -> Origin:
    """Returns what --workdir or --weights names; UserError for both or none, or flags of the one with the other."""
    if bool(given.workdir) == bool(given.weights):
        raise UserError(f"--workdir is {given.workdir!r} and --weights is {given.weights!r}: give one of them")
    if given.workdir:
        return origin.of_run(given.workdir, given.step, given.ema)
    for flag in OF_RUNS:
        value = getattr(given, flag)
        if value is not None and value is not False:
            raise UserError(f"--{flag} is {value}: is read only with --workdir; leave it out")
    return origin.of_pipeline(given.weights)


def choose_loras(source: Origin, given: Sequence[str]) -> Origin:
    """Returns the origin with the LoRAs of --lora on top, which are read; UserError for one that cannot be."""
    loras, named = list(source.loras), []
    for text in given:
        file, weight = cli.split_weight(text)
        try:
            loras.append((lora_files.load(file, source.cfg), weight))
        except UserError as error:
            raise UserError(f"--lora is {text!r}: {str(error).removeprefix(f'{file}: ')}") from error
        named.append([file, weight])
    about = {**source.about, "lora": named} if named else source.about
    return dataclasses.replace(source, loras=tuple(loras), about=about)


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


def choose_settings(source: Origin, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags given, and for the others what the config of the run or pipeline says.

    Raises:
      UserError: a value out of range, or one that would not be looked at.
    """
    fields = dict(configs.flat(source.config))
    settings = {**given, **{flag: fields[field] for flag, field in FROM_CONFIG.items() if given[flag] is None}}
    for flag in ("height", "width"):
        pixels = settings[flag]
        if pixels < 16 or pixels % 16:
            nearest = max(16, round(pixels / 16) * 16)
            raise UserError(f"--{flag} is {pixels}: should be a multiple of 16, such as {nearest}")
    for flag in ("steps", "batch_size", "max_length"):
        if settings[flag] < 1:
            raise UserError(f"--{flag} is {settings[flag]}: should be at least 1")
    for flag in ("guidance", "cfg_scale"):
        if not math.isfinite(settings[flag]):
            raise UserError(f"--{flag} is {settings[flag]}: should be finite")
    if given["negative_prompt"] is not None and settings["cfg_scale"] == 1:
        raise UserError(f"--negative_prompt is {given['negative_prompt']!r}: is read only where --cfg_scale is not 1")
    settings["negative_prompt"] = given["negative_prompt"] or ""
    if not source.cfg.guidance_embed:
        if given["guidance"] is not None:
            raise UserError(
                f"--guidance is {given['guidance']}: {source.name} has no guidance embedding; "
                f"leave it out, or use --cfg_scale"
            )
        settings["guidance"] = None
    return settings


def choose_out(folder: str, out: str | None, overwrite: bool) -> Path:
    """Returns the folder to write to, which is not made yet: `out`, or one below `folder`.

    Raises:
      UserError: `out` is not empty and not to be overwritten.
    """
    if out is None:
        numbers = (Path(folder) / "samples" / f"sample_main_{number:03d}" for number in range(10**6))
        return next(path for path in numbers if not path.exists())
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out is {out!r}: should be a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--out is {out!r}: it is not empty; name another folder, or add --overwrite")
    return path


def choose_mesh(shard: int, count: int) -> dict[str, int]:
    """Returns the mesh's sizes: the weights split over `shard` (-1: all) of `count` processes, and repeated."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    if shard not in (-1, *divisors):
        there = f"{count} processes" if count > 1 else "1 process"
        raise UserError(f"--shard is {shard}: should be -1 or divide the {there}: {', '.join(map(str, divisors))}")
    shard = count if shard == -1 else shard
    return {"replicate": count // shard, "shard": shard, "context": 1}


def lay_out(cfg: flux.FluxConfig, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Sharding:
    """Returns where the model's weights are; UserError where they do not divide."""
    mesh, shapes = meshes.build(sizes, device.type, processes.limit()), tree.flatten(flux.abstract(cfg, dtype))
    places = placements.resolve((("*", {"shard": 0}),), shapes, mesh, "--shard")
    return Sharding(mesh, tree.unflatten(places), compute=dtype, device=device)


def load(
    source: Origin, prompts: Sequence[str], settings: Mapping[str, Any], sharding: Sharding
) -> tuple[Params, encoders.Encoders]:
    """Returns what this process has of the parameters, and the encoders, which are done with its prompts already unless
    there are very many."""
    config, mesh = source.config.copy_and_resolve_references(), sharding.mesh
    config.text.max_length, config.numerics.compute = settings["max_length"], settings["dtype"]
    with processes.together():
        codecs = source.encoders(config, sharding.device, mesh)
    if generate.most(len(prompts), mesh) <= ENCODED_AHEAD:
        mine = generate.share(len(prompts), mesh) or generate.stand_in(len(prompts), mesh)
        captions = {*(prompts[i] for i in mine), *([settings["negative_prompt"]] if settings["cfg_scale"] != 1 else [])}
        with tqdm(total=len(captions), desc="encoding", unit="prompt") as bar:
            codecs = encoders.ahead(codecs, sorted(captions), settings["batch_size"], bar.update)
    return source.load(DTYPES[settings["dtype"]], sharding), codecs


def draw(
    params: Params,
    source: Origin,
    codecs: encoders.Encoders,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    sharding: Sharding,
) -> Iterator[Tensor]:
    """Yields the images of this process's prompts, [b, 3, H, W] at a time, under a bar that counts Euler steps."""
    total = generate.batch_count(len(prompts), settings["batch_size"], sharding.mesh) * settings["steps"]
    where, dtype = sharding.device or tree.leaves(params)[0].device, DTYPES[settings["dtype"]]
    ops = layout.evaluation(where)
    if source.loras:
        moved = [(tree.map(lambda leaf: leaf.to(where, dtype), each), None, weight) for each, weight in source.loras]
        params, sharding = adapt.together(params, sharding, moved)
        ops = lora.with_updates(ops)
    drawn_with = {name: value for name, value in settings.items() if name not in OF_ENCODERS}
    with tqdm(total=total, desc="sampling", unit="step") as bar:
        yield from generate.batches(
            params,
            source.cfg,
            codecs,
            prompts,
            **drawn_with,
            shift=source.config.sample.shift,
            ops=ops,
            progress=bar.update,
            sharding=sharding,
        )


def write(
    out: Path, batches: Iterable[Tensor], prompts: Sequence[str], settings: Mapping[str, Any], mesh: Mesh = ONE
) -> None:
    """Writes each image as soon as it is there, as NNN_the-prompt.png, and then, from the first process, grid.png.

    Args:
      out: the folder; it is made if need be.
      batches: images [b, 3, H, W] in [-1, 1] of this process's prompts, in their order.
      prompts: one for each image, of all processes.
      settings: what goes into each PNG's text metadata, beside its prompt and its index.
      mesh: the processes.
    """
    with processes.together():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out is {os.fspath(out)!r}: cannot be made ({error.strerror}); name another") from error
    digits, shown = max(3, len(str(len(prompts) - 1))), prompts[:GRID_IMAGES]
    images, kept = (image for batch in batches for image in batch), []
    for image, index in zip(images, generate.share(len(prompts), mesh), strict=True):
        about = {"prompt": prompts[index], "index": index, **settings}
        name = f"{index:0{digits}d}_{slug(prompts[index])}".rstrip("_")
        pictures.to_pil(image.numpy()).save(out / f"{name}.png", pnginfo=metadata(about))
        kept += [image] if index < len(shown) else []
    every = generate.to_first(kept, len(shown), mesh)
    if every is not None:
        pictures.grid(every.numpy(), shown).save(out / "grid.png")


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
