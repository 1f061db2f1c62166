"""Says what a run will take before anything is rented: memory, communication, time, and the mesh that is cheapest.

    plan_main --config=configs/flux_dev.py --mesh=replicate=16,shard=64 --device=h200
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
from typing import Any

import ml_collections
from absl import flags

from flux_func import cli
from flux_func import config as configs
from flux_func.errors import UserError
from flux_func.parallel import devices, mesh

GIB = 2**30
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
    cli.run(main)


def main(argv: list[str]) -> int:
    """Plans as the flags say; exit code 1 where nothing fits."""
    del argv
    given = flags.FLAGS
    device, chosen = choose_device(given), choose_meshes(given)
    with complete(given.config) as config:
        configs.validate(config)
        found, refused = plan_all(config, chosen, device, given.node)
        best = found[0]
        report = Report(config, device, given.node)
        if len(chosen) > 1:
            print(report.comparison(found, refused))
        print(report.details(best))
        checked = check(config, best, given) if given.trace else None
        if checked:
            print(report.trace(best, checked))
        if given.json:
            write(given.json, [report.as_json(each) for each in found], checked)
    return 0 if report.fits(best) else 1
