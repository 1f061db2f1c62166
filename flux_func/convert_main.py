"""Converts FLUX's weights from any format to any other, a tensor at a time.

    convert_main --from=flux1-dev.safetensors --to=transformer --format=diffusers
    convert_main --from=WORKDIR --ema --to=flux1-mine.safetensors --format=bfl --dtype=bfloat16
    convert_main --from=hf://black-forest-labs/FLUX.1-dev --to=FLUX.1-dev --format=diffusers

    convert_main --from=style.safetensors --to=style_diffusers.safetensors --format=diffusers
    convert_main --from=FLUX.1-dev --lora=style.safetensors:0.8 --lora=WORKDIR --to=merged --format=diffusers

What --from holds is told from its content. A pipeline becomes a whole pipeline again. docs/weights.md has the formats.
A LoRA's file, or the folder of a run that trained one, becomes a LoRA's file; --lora adds one to weights: docs/lora.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from absl import flags
from tqdm import tqdm

from flux_func import cli, tree
from flux_func.errors import UserError
from flux_func.interop import conversion, hub, lora_files, merging, target, weights
from flux_func.train import adapt
from flux_func.train.state import DTYPES
from flux_func.transforms import lora


def run() -> None:
    """The console script."""
    _define_flags()
    cli.run(main, alone=True)


def _define_flags() -> None:
    flags.DEFINE_string(
        "from",
        None,
        "A safetensors file; a folder of diffusers (a model or a whole pipeline), of torchtitan's checkpoints or of a "
        "run of train_main; or hf://owner/repo[@revision][/path].",
        required=True,
    )
    flags.DEFINE_multi_string(
        "lora", [], "FILE or FILE:WEIGHT, a LoRA to add to the weights; a run's folder or hf://owner/repo in its place."
    )
    flags.DEFINE_string("to", None, "File (.safetensors) or folder to write.", required=True)
    formats = list(dict.fromkeys((*weights.FORMATS, *lora_files.FORMATS)))
    flags.DEFINE_enum("format", None, formats, "What to write; kohya is for LoRAs alone.", required=True)
    flags.DEFINE_enum("dtype", None, list(DTYPES), "Type of the weights; left out: as they are.")
    flags.DEFINE_enum("part", None, conversion.PARTS, "Which part; left out: all that --to can hold.")
    flags.DEFINE_integer("step", None, "Of a run: which checkpoint; left out: the newest.")
    flags.DEFINE_bool("ema", False, "Of a run: the averaged weights.")
    flags.DEFINE_bool("overwrite", False, "Replace what is at --to, if it is nothing but weights.")
    for name in ("from", "to"):
        flags.register_validator(name, lambda value: value != "", message="should name a file or folder")


def main(argv: list[str]) -> None:
    """Converts as the flags say."""
    del argv
    given = flags.FLAGS
    source, to = given["from"].value, given["to"].value
    dtype = DTYPES[given["dtype"].value] if given["dtype"].value else None
    if not given.overwrite:
        target.check(to, 0)  # before anything is downloaded
    adapters = [read_adapter(text) for text in given.lora]
    if updates := find_lora(source, given.step, given.ema):
        convert_lora(updates, source, to, dtype)
        return
    if given.format not in weights.FORMATS:
        raise UserError(f"--format is {given.format!r}: is for LoRAs, and {source} holds none; choose another")
    plan = conversion.plan(source, to, given.format, dtype, given.part, given.step, given.ema)
    if adapters:
        plan = add(plan, adapters)
    conversion.check(plan, given.overwrite)
    say(plan, adapters)
    try:
        with tqdm(total=plan.size(), desc="converting", unit="B", unit_scale=True, delay=0.5) as bar:
            conversion.run(plan, given.overwrite, bar.update)
    except KeyboardInterrupt:
        print(f"interrupted: {to} is as it was, or new and whole", file=sys.stderr)
        raise
    print(f"{to}: written in format {plan.format}, {tqdm.format_sizeof(plan.size())}B")


def read_adapter(text: str) -> merging.Adapter:
    """Returns the LoRA that a --lora names; UserError for one that cannot be."""
    name, weight = cli.split_weight(text)
    try:
        if adapt.is_run(name):
            return merging.Adapter(name, lora.updates(adapt.of_run(name)), weight)
        path = hub.fetch(name, ())[""] if hub.is_address(name) else name
        updates, scales = lora_files.read_all(path)
    except UserError as error:
        said = str(error).removeprefix(f"--from is {name!r}: ").removeprefix(f"{name}: ")
        raise UserError(f"--lora is {text!r}: {said}") from error
    return merging.Adapter(name, updates, weight, scales)


def add(plan: conversion.Plan, adapters: Sequence[merging.Adapter]) -> conversion.Plan:
    """Returns the plan with LoRAs added; UserError for those that do not fit, or would be written over."""
    to = plan.to.resolve()
    for each in adapters:
        if to in (Path(each.name).resolve(), *Path(each.name).resolve().parents):
            raise UserError(f"{plan.to}: holds what is read ({each.name}); choose another path")
    return conversion.adapted(plan, adapters)


def find_lora(source: str, step: int | None, ema: bool) -> lora_files.Updates:
    """Returns the LoRA in a file, in a run's folder or on the hub, by path; {} where there is something else."""
    if adapt.is_run(source):
        return lora.updates(adapt.of_run(source, step, ema))
    if step is not None or ema:
        return {}
    path = source
    if hub.is_address(source):
        try:
            path = hub.fetch(source, ()).get("", "")
        except UserError:
            return {}  # it is said of the weights
    return lora_files.read(path) if lora_files.is_lora(path) else {}


def convert_lora(updates: lora_files.Updates, source: str, to: str, dtype: torch.dtype | None) -> None:
    """Writes a LoRA as the flags say."""
    given = flags.FLAGS
    if given.lora:
        raise UserError(f"--lora is {', '.join(given.lora)}: is added to weights, and {source} is a LoRA; leave it out")
    if given.part is not None:
        raise UserError(f"--part is {given.part!r}: is not read for a LoRA, which {source} is; leave it out")
    lora_files.check(to, given.format)
    count = sum(leaf.numel() for leaf in tree.leaves(dict(updates)))
    print(f"{source}: LoRA of {len(updates)} linears, {count:,} parameters", flush=True)
    lora_files.save(to, updates, given.format, dtype, given.overwrite)
    print(f"{to}: written in format {given.format}")


def say(plan: conversion.Plan, adapters: Sequence[merging.Adapter] = ()) -> None:
    """Says what was found, and what becomes of it beside the weights."""
    for stored in plan.stored.values():
        print(conversion.describe(stored))
    for each in adapters:
        norms = f" and {len(each.scales)} norms" if each.scales else ""
        print(f"{each.name}: LoRA of {len(each.updates)} linears{norms}, added times {each.weight:g}")
    if plan.copies:
        print(f"copied as they are: {', '.join(plan.copies)}")
    if plan.left_out:
        print(f"left out: {', '.join(plan.left_out)}")
    sys.stdout.flush()


if __name__ == "__main__":
    run()
