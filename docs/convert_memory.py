"""Peak resident memory of convert_main, each conversion a process of its own, on checkpoints of several sizes.

    python docs/convert_memory.py --workdir=/tmp/convert_memory --blocks=1 --blocks=3

A checkpoint has flux-dev's widths, as many double blocks as told and twice as many single ones, in bfloat16: 1.4 GB
with 1, 3.9 GB with 3, and with 19 it is flux-dev, 23.8 GB. It goes from BFL's format through all others and back, and
has to come back byte for byte. At most three copies of it are on the disk at a time; all are removed in the end. The
weights are random numbers that repeat, so that a file system that compresses (btrfs, zfs) holds the largest too.
"""

import dataclasses
import filecmp
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from absl import app, flags

from flux_func import FluxConfig, flavor
from flux_func.interop import formats, weights

FORMATS = ("diffusers", "torchtitan", "orbax", "bfl")
HIGHEST_GB = 4.0


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random weights: a `weights.Source` that holds none of them."""

    cfg: FluxConfig
    types: Mapping[str, torch.dtype]

    def rows(self, path: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows of a leaf, of 1,024 random numbers again and again."""
        shape = (stop - start, *formats.layout(self.cfg, "bfl").ours[path][1:])
        count = math.prod(shape)
        return torch.randn(1024).to(self.types[path]).repeat(-(-count // 1024))[:count].reshape(shape)


def write(path: Path, blocks: int) -> None:
    """Writes a checkpoint in BFL's format, in bfloat16."""
    cfg = dataclasses.replace(flavor("flux-dev"), depth=blocks, depth_single_blocks=2 * blocks)
    types = dict.fromkeys(formats.layout(cfg, "bfl").ours, torch.bfloat16)
    weights.write(Noise(cfg, types), path, "bfl")


def convert(source: Path, to: Path, format: str) -> int:
    """Runs convert_main; returns the most bytes that it had resident."""
    command = [sys.executable, "-m", "flux_func.convert_main", f"--from={source}", f"--to={to}", f"--format={format}"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"convert_main failed with exit code {process.returncode}")
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(workdir: Path, blocks: int) -> tuple[int, dict[str, int]]:
    """Returns the bytes of a checkpoint and {format: most bytes resident in converting it to that}."""
    original = workdir / "original.safetensors"
    write(original, blocks)
    source, peaks = original, {}
    for format in FORMATS:
        to = workdir / ("last.safetensors" if format == "bfl" else format)
        peaks[format] = convert(source, to, format)
        if source != original:
            shutil.rmtree(source)
        source = to
    if not filecmp.cmp(original, source, shallow=False):
        sys.exit(f"{source} is not {original}, byte for byte")
    size = original.stat().st_size
    original.unlink()
    source.unlink()
    return size, peaks


def main(argv: list[str]) -> None:
    """Measures, and prints a table in Markdown."""
    del argv
    workdir = Path(flags.FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [measure(workdir, blocks) for blocks in flags.FLAGS.blocks]
    print(f"\n| checkpoint | {' | '.join(f'to {format}' for format in FORMATS)} |\n|---|{'---|' * len(FORMATS)}")
    for size, peaks in rows:
        print(f"| {size / 1e9:.1f} GB | {' | '.join(f'{peaks[format] / 1e9:.2f} GB' for format in FORMATS)} |")
    if max(max(peaks.values()) for _, peaks in rows) > HIGHEST_GB * 1e9:
        sys.exit(f"more than {HIGHEST_GB} GB resident")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder to write to; made if need be.", required=True)
    flags.DEFINE_multi_integer("blocks", [1, 3], "Double blocks; one for each checkpoint.")
    app.run(main)
