"""Converts FLUX's weights from any format to any other, a tensor at a time.

    convert_main --from=flux1-dev.safetensors --to=transformer --format=diffusers
    convert_main --from=WORKDIR --ema --to=flux1-mine.safetensors --format=bfl --dtype=bfloat16
    convert_main --from=hf://black-forest-labs/FLUX.1-dev --to=FLUX.1-dev --format=diffusers

    convert_main --from=style.safetensors --to=style_diffusers.safetensors --format=diffusers

What --from holds is told from its content. A pipeline becomes a whole pipeline again. docs/weights.md has the formats.
A LoRA's file, or the folder of a run that trained one, becomes a LoRA's file: docs/lora.md.
"""

import sys

import torch
from absl import flags
from tqdm import tqdm

from flux_func import cli, tree
from flux_func.errors import UserError
from flux_func.interop import conversion, hub, lora_files, target, weights
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
    if updates := find_lora(source, given.step, given.ema):
        convert_lora(updates, source, to, dtype)
        return
    if given.format not in weights.FORMATS:
        raise UserError(f"--format is {given.format!r}: is for LoRAs, and {source} holds none; choose another")
    plan = conversion.plan(source, to, given.format, dtype, given.part, given.step, given.ema)
    conversion.check(plan, given.overwrite)
    say(plan)
    try:
        with tqdm(total=plan.size(), desc="converting", unit="B", unit_scale=True, delay=0.5) as bar:
            conversion.run(plan, given.overwrite, bar.update)
    except KeyboardInterrupt:
        print(f"interrupted: {to} is as it was, or new and whole", file=sys.stderr)
        raise
    print(f"{to}: written in format {plan.format}, {tqdm.format_sizeof(plan.size())}B")


def find_lora(source: str, step: int | None, ema: bool) -> lora_files.Updates:
    """Returns the LoRA in a file or in a run's folder, by path; {} where there is something else."""
    if adapt.is_run(source):
        return lora.updates(adapt.of_run(source, step, ema))
    if hub.is_address(source) or step is not None or ema or not lora_files.is_lora(source):
        return {}
    return lora_files.read(source)


def convert_lora(updates: lora_files.Updates, source: str, to: str, dtype: torch.dtype | None) -> None:
    """Writes a LoRA as the flags say."""
    given = flags.FLAGS
    if given.part is not None:
        raise UserError(f"--part is {given.part!r}: is not read for a LoRA, which {source} is; leave it out")
    lora_files.check(to, given.format)
    count = sum(leaf.numel() for leaf in tree.leaves(dict(updates)))
    print(f"{source}: LoRA of {len(updates)} linears, {count:,} parameters", flush=True)
    lora_files.save(to, updates, given.format, dtype, given.overwrite)
    print(f"{to}: written in format {given.format}")


def say(plan: conversion.Plan) -> None:
    """Says what was found, and what becomes of it beside the weights."""
    for stored in plan.stored.values():
        print(conversion.describe(stored))
    if plan.copies:
        print(f"copied as they are: {', '.join(plan.copies)}")
    if plan.left_out:
        print(f"left out: {', '.join(plan.left_out)}")
    sys.stdout.flush()


if __name__ == "__main__":
    run()
