"""All that is to be measured on one H200: the whole of FLUX at full speed, torchtitan beside it, and narrow types.

    python docs/h200.py --reference_python=titan/bin/python --out=runs/h200
    python docs/h200.py --tiny --device=cpu --peer=bfl --out=runs/h200_tiny

The second tries all of it out on a CPU, in a minute or two. The parts, each of which may be left out of --parts:

256, 1024: training steps of flux-schnell (11.9B parameters, configs/flux_schnell_h200.py) at so many pixels, in
bfloat16 and in Float8 in turn, from random latents and encodings that lie on the device, as encodings made beforehand
would. Then one step more in bfloat16 under torch's profiler.
peer: bench_main against torchtitan, with as many of flux-schnell's blocks as both hold at once.
curves: flux-debug for 200 steps by train_main, in float32, bfloat16 and Float8, with the same data and noise; running
means of 10 steps are compared.

Writes OUT/h200.json, h200.txt (each figure beside its goal) and h200.png, again after each part, so that what was
measured is kept whatever comes after it. A part that fails, or a type of it, is named with its cause, its traceback is
in OUT/PART.failure.txt, and the others go on. Exit code 1: a goal is missed, or a part failed.
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import runpy
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import torch
from absl import flags
from torch import Tensor

from flux_func import cli
from flux_func.bench import cases, ours, report, serve
from flux_func.config import one_of
from flux_func.errors import UserError
from flux_func.interop import target
from flux_func.models import flops, flux
from flux_func.parity import problem, process
from flux_func.train import metrics, optimizer, profile, state

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "flux_schnell_h200.py"
PARTS = ("256", "1024", "peer", "curves")
# Each as configs/flux_schnell_h200.py is, or would be.
BFLOAT16 = dict.fromkeys(("numerics.param", "numerics.compute", "numerics.reduce"), "bfloat16")
BFLOAT16["optimizer.moments"] = "8bit"
NUMERICS = {"bfloat16": BFLOAT16, "float8": {**BFLOAT16, "numerics.linear": "float8_tensorwise"}}
WARMUP = 2
SMOOTHED = 10


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
      steps: {part: the config's fields}, of the training steps.
      peer: bench_main's flags.
      curves: train_main's fields.
    """

    steps: Mapping[str, Mapping[str, Any]]
    peer: Sequence[str]
    curves: Mapping[str, Any]


# Micro-batches are what plan_main finds room for: see the config. Each part's batch is four of them.
FULL = Sizes(
    steps={
        "256": {"data.image_size": 256, "text.max_length": 256, "train.batch_size": 48},
        "1024": {"data.image_size": 1024, "text.max_length": 512, "train.batch_size": 4},
    },
    peer=("--flavor=flux-schnell", "--depth=4+8", "--batch=8", "--compile"),
    curves={"train.steps": 200, "train.batch_size": 16},
)
_SMALL = {"model.flavor": "flux-tiny", "text.max_length": 16, "train.batch_size": 2, "compile.enabled": False}
_SMALL["optimizer.warmup_steps"] = 0
TINY = Sizes(
    steps={
        "256": {**_SMALL, "data.image_size": 64, "train.accumulate": 2},
        "1024": {**_SMALL, "data.image_size": 128, "train.accumulate": 2},
    },
    peer=("--flavor=flux-tiny", "--depth=1", "--batch=1", "--image_size=32", "--tokens=16"),
    curves={**_SMALL, "train.steps": 4, "data.image_size": 64},
)


@dataclass(frozen=True)
class Goal:
    """A figure, what it should at least (or at most) be, and whether it is."""

    name: str
    value: float
    bound: float
    most: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is as it should be; what is no number is not."""
        return self.value <= self.bound if self.most else self.value >= self.bound

    def __str__(self) -> str:
        side = "at most" if self.most else "at least"
        return f"{self.name}: {self.value:.4g}, {side} {self.bound:g}: {'reached' if self.reached else 'MISSED'}"


# Training steps of the whole model.


def take_steps(fields: Mapping[str, Any], device: str, rounds: int, out: Path) -> dict[str, dict[str, Any]]:
    """Returns what steps take in each of `NUMERICS`, in turn over one state; writes a profile of the first into `out`.

    For a process of its own, whose memory goes with it. What cannot take its first steps has {"failed": its cause}, and
    the traceback is in a file beside `out`.
    """
    configs = {name: settings({**fields, **numerics}) for name, numerics in NUMERICS.items()}
    first = configs["bfloat16"]
    cfg = state.model_config(first)
    params = cases.draw(cfg, 0, state.DTYPES[first.numerics.param], device)
    here = {"params": params, "opt": optimizer.from_config(first).init(params)}
    batch = random_batch(first, cfg, device)
    tokens = ((first.data.image_size // 16) ** 2, first.text.max_length)
    operations = flops.training_flops(cfg, *tokens) * first.train.batch_size
    found, steps = {}, {}
    for name, config in configs.items():
        try:
            steps[name] = ours.training(config, cfg, here, batch, torch.device(device))
            warm = [serve.timed(steps[name], device)[1] for _ in range(WARMUP)]
            found[name] = {"seconds": [], "losses": warm, "peak_bytes": 0, "flops": operations}
        except Exception as error:  # the other's time is worth something
            steps.pop(name, None)
            found[name] = {"failed": cause(error, out.with_name(f"{out.name}.{name}"))}
    for _ in range(rounds):
        for name, step in steps.items():
            serve.reset_peak(device)
            seconds, loss = serve.timed(step, device)
            found[name]["losses"].append(loss)
            found[name]["seconds"].append(seconds)
            found[name]["peak_bytes"] = max(found[name]["peak_bytes"], serve.peak_bytes(device))
    try:
        trace_one(steps["bfloat16"], device, out)
    except Exception as error:  # a profiler may fail by itself
        found["bfloat16"]["profile"] = cause(error, out.with_name(f"{out.name}.profile"))
    return found


def trace_one(step: Callable[[], Any], device: str, out: Path) -> None:
    """Writes a profile of one step, after some, into `out`."""
    with profile.traced(1, 0, out, torch.device(device), print, contextlib.nullcontext) as trace:
        for _ in range(profile.WARMUP + 1):
            step()
            trace()


def cause(error: Exception, path: Path) -> str:
    """Returns in a line what went wrong; writes the traceback into PATH.failure.txt."""
    path.with_name(f"{path.name}.failure.txt").write_text("".join(traceback.format_exception(error)))
    said = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
    return f"{type(error).__name__}: {said}"


def settings(fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns configs/flux_schnell_h200.py with these fields, by dotted name."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(dict(fields))
    return config


def random_batch(config: ml_collections.ConfigDict, cfg: flux.FluxConfig, device: str) -> dict[str, Tensor]:
    """Returns a batch of `ff.loss`, drawn on the device."""
    count, side = config.train.batch_size, config.data.image_size // 8
    draws = torch.Generator(device).manual_seed(0)
    latents = (count, cfg.in_channels // 4, side, side)
    shapes = {"latents": latents, "noise": latents, "y": (count, cfg.vec_in_dim)}
    shapes["txt"] = (count, config.text.max_length, cfg.context_in_dim)
    drawn = {name: torch.randn(shape, generator=draws, device=device) for name, shape in shapes.items()}
    return {**drawn, "timesteps": torch.rand(count, generator=draws, device=device)}


# Programs of ours.


def beside(
    peer: str, python: str | None, given: Sequence[str], device: str, rounds: int, out: Path
) -> dict[str, float]:
    """Returns the median seconds of a training step, ours and a peer's, as bench_main finds them."""
    process.try_import(peer, python or sys.executable)  # now, and not when its weights are written
    command = ["bench_main", f"--peers=ours,{peer}", f"--out={out / 'bench'}", f"--device={device}", *given]
    command += ["--dtype=bfloat16", f"--rounds={rounds}"]
    call({"peer": command + ([f"--reference_python={python}"] if python else [])}, out)
    rows = json.loads((out / "bench" / "bench.json").read_text())["rows"]
    return {row["side"]["peer"]: row["median"] for row in rows}


def curves(fields: Mapping[str, Any], device: str, out: Path) -> dict[str, list[float]]:
    """Returns the losses of train_main's runs in float32 and in each of `NUMERICS`, which go on at the same time."""
    usual = {"sample.every": 0, "validate.every": 0, "checkpoint.last_weights_only": True, "metrics.tensorboard": False}
    usual["model.init"] = "nonzero"  # as pre-training begins, blocks are shut, and what they round is not seen
    commands = {}
    for name, numerics in {"float32": {}, **NUMERICS}.items():
        given = {**usual, **fields, **numerics}.items()
        where = (f"--config={ROOT / 'configs/flux_debug.py'}", f"--workdir={out / name}", f"--device={device}")
        commands[name] = ["train_main", *where, *(f"--config.{field}={value}" for field, value in given)]
    call(commands, out)
    records = {name: metrics.read_jsonl(out / name / "metrics.jsonl") for name in commands}
    return {name: [record["loss"] for record in found if "loss" in record] for name, found in records.items()}


def call(commands: Mapping[str, Sequence[str]], out: Path) -> None:
    """Runs programs of this package at the same time, with all that they say in OUT/NAME.log.

    Raises:
      UserError: one of them failed, with its last line.
    """
    running = {}
    with contextlib.ExitStack() as held:
        for name, (program, *given) in commands.items():
            log = held.enter_context((out / f"{name}.log").open("w"))
            command = [sys.executable, "-m", f"flux_func.{program}", *given]
            running[name] = held.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            held.callback(running[name].kill)
        failed = [name for name, program in running.items() if program.wait()]
    if failed:
        raise UserError(process.last((out / f"{failed[0]}.log").read_text()))


# What came of it.


def goals(found: Mapping[str, Any], peak_tflops: float) -> list[Goal]:
    """Returns every figure that was found, beside what it should be."""
    listed = []
    for part in ("256", "1024"):
        rates, name = rates_of(found.get(part, {})), f"flux-schnell, {part} pixels"
        if "bfloat16" in rates:
            listed.append(Goal(f"{name}, bfloat16: share of the peak", rates["bfloat16"] / peak_tflops, 0.6))
        if rates.keys() == NUMERICS.keys() and all(rates.values()):
            listed.append(Goal(f"{name}: Float8's speed over bfloat16's", rates["float8"] / rates["bfloat16"], 1.3))
    if "peer" in found:
        (ours_name, own), (peer, other) = found["peer"].items()
        listed.append(Goal(f"speed of {ours_name} over {peer}'s", other / own, 1.25))
    wide = found.get("curves", {}).get("float32", [])
    for name in NUMERICS if wide else ():
        listed.append(Goal(f"loss in {name}, from float32's", apart(found["curves"][name], wide), 0.01, most=True))
    return listed


def apart(losses: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Returns how far running means of `SMOOTHED` steps are apart at most, relatively; infinity where one is not there.

    Single steps are as far apart as a batch's loss is steep: rounding grows with the steps, to either side.
    """
    if None in (*losses, *expected) or len(losses) != len(expected):
        return math.inf
    pairs = list(zip(losses, expected, strict=True))
    windows = [pairs[at : at + SMOOTHED] for at in range(max(1, len(pairs) - SMOOTHED + 1))]
    return max(abs(sum(a for a, _ in window) / sum(b for _, b in window) - 1) for window in windows)


def rates_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns TFLOP/s of training steps, of each type whose steps were timed and had a loss; 0 where one was none."""
    return {
        name: all(map(math.isfinite, row["losses"])) * row["flops"] / statistics.median(row["seconds"]) / 1e12
        for name, row in rows.items()
        if row.get("seconds")
    }


def draw_all(found: Mapping[str, Any], peak_tflops: float, path: Path) -> None:
    """Draws TFLOP/s as bars beneath the peak, and the curves of the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    rates = {f"{p}, {name}": rate for p in ("256", "1024") for name, rate in rates_of(found.get(p, {})).items()}
    bars.bar_label(bars.bar(rates.keys(), rates.values()), fmt="%.3g")
    bars.axhline(peak_tflops, color="tab:red", linewidth=1)
    bars.set_ylabel("TFLOP/s; red: the peak in bfloat16")
    for name, losses in found.get("curves", {}).items():
        lines.plot(losses, label=name, linewidth=1)
    lines.set(xlabel="step", ylabel="loss")
    if "curves" in found:
        lines.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


# The program.


def run() -> None:
    """Defines the flags and runs."""
    flags.DEFINE_list("parts", list(PARTS), "What to measure, in this order.")
    flags.DEFINE_bool("tiny", False, "All as small as a CPU can do in a minute or two; goals are missed, then.")
    flags.DEFINE_string("peer", "torchtitan", "Whom to be compared with; see bench_main.")
    flags.DEFINE_string("reference_python", None, "Python of torchtitan's environment; left out: this one.")
    flags.DEFINE_integer("rounds", 3, "Timed steps of each.", lower_bound=1)
    flags.DEFINE_float("peak_tflops", 989.0, "Of the device in bfloat16, dense, by its datasheet.", lower_bound=1.0)
    flags.DEFINE_string("out", None, "Folder of the report, new or empty.", required=True)
    cli.define_device()
    cli.run(main, alone=True)


def main(argv: list[str]) -> int:
    """Measures as the flags say; returns the exit code."""
    del argv
    given, start = flags.FLAGS, time.perf_counter()
    python, out, device = (
        given.reference_python or sys.executable,
        Path(given.out),
        str(cli.choose_device(given.device)),
    )
    for part in given.parts or [""]:
        if part not in PARTS:
            raise UserError(f"--parts is {','.join(given.parts)!r}: {one_of(part, PARTS)}")
    if given.peer not in problem.REFERENCES:
        raise UserError(f"--peer is {given.peer!r}: {one_of(given.peer, problem.REFERENCES)}")
    if "peer" in given.parts:
        process.check(given.peer, python, "--peer is")
    target.check(out, 2**32)
    out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if given.tiny else FULL

    def keep(found: Mapping[str, Any], failed: Mapping[str, str]) -> str:
        about = {**report.machine(), **serve.about("flux-func", torch.device(device).type)}
        saved = {"machine": about, "seconds": time.perf_counter() - start, "found": found, "failed": failed}
        metrics.write_json(out / "h200.json", saved)
        listed = goals(found, given.peak_tflops)
        said = "\n".join([*map(str, listed), *(f"{part}: FAILED: {line}" for part, line in failed.items())])
        (out / "h200.txt").write_text(said + "\n")
        draw_all(found, given.peak_tflops, out / "h200.png")
        return said

    found, failed = measure(given.parts, sizes, device, given.rounds, given.peer, given.reference_python, out, keep)
    print(keep(found, failed))
    return 0 if not failed and all(goal.reached for goal in goals(found, given.peak_tflops)) else 1


def measure(
    parts: Sequence[str],
    sizes: Sizes,
    device: str,
    rounds: int,
    peer: str,
    python: str | None,
    out: Path,
    keep: Callable[[Mapping[str, Any], Mapping[str, str]], Any] = lambda found, failed: None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns ({part: what was found}, {part, or type in it: why it failed}), and gives `keep` both after a part."""
    start, found, failed = time.perf_counter(), {}, {}
    for part in parts:
        try:
            if part in sizes.steps:
                found[part] = alone(take_steps, sizes.steps[part], device, rounds, out / part)
                failed |= {f"{part}, {name}": row["failed"] for name, row in found[part].items() if "failed" in row}
            elif part == "peer":
                found[part] = beside(peer, python, sizes.peer, device, rounds, out)
            else:
                found[part] = curves(sizes.curves, device, out)
            keep(found, failed)
        except Exception as error:  # whatever it is, the time of the others is worth something
            failed[part] = cause(error, out / part)
        said = failed.get(part, "done")
        print(f"[{time.perf_counter() - start:4.0f} s] {part}: {said}", file=sys.stderr, flush=True)
    return found, failed


def alone(fn: Callable, *args: Any) -> Any:
    """Returns fn(*args), run in a process of its own."""
    # Steps in turn want memory in different pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(fn, *args).result()


if __name__ == "__main__":
    run()
