"""Measures time and memory beside other implementations of FLUX, with the same weights, inputs and optimizer.

    bench_main --peers=ours,bfl,diffusers
    bench_main --peers=ours,torchtitan --reference_python=/path/to/its/venv/bin/python --work=forward,train_step
    bench_main --flavor=flux-tiny --depth=2,4,8 --batch=1,2,4 --compile
    bench_main --peers=ours --dtype=float32,bfloat16 --remat=none,full
    bench_main --peers=ours --flavor=flux-tiny --work=compile --depth=2,19+38

Each is a process of its own, and all take their steps in turn, so that what else the machine does meets all. Their
losses are compared first: exit code 1, and no time, where they differ. Prints a table and writes it, bench.json (every
time, versions, machine) and bench.png. A list in --flavor, --depth, --work, --image_size, --tokens or --batch is every
combination of them, one after another; in --peers, --dtype or --remat, all side by side.

train_step: from a batch of latents, noise, timesteps and encodings to updated weights: forward, backward, clipping, and
AdamW by torch's fused kernel. Ours is train_main's; theirs are their model with torch's autograd, clip_grad_norm_,
AdamW and zero_grad, patches and positions made ready beforehand. forward: to the loss, without gradients, ours as
train_main validates. sample: each one's own loop, unshifted. compile: the first compiled training step of a fresh
process that finds nothing compiled, as a user waits for it. --dtype=bfloat16 keeps weights in float32: ours computes by
numerics.compute, theirs under torch.autocast. --compile compiles each block.

ratio: the median over the rounds of the time to that of the fastest of the others in the same type, in the same round.
peak GiB: the most memory in a timed step, resident in the process or allocated on the GPU. It is the sum of imports
(there before the weights were), kept (weights and moments, counted) and rest: gradients, activations and what is
allocated beside them.
"""

import itertools
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from flux_func import cli
from flux_func import config as configs
from flux_func.bench import cases, measure, report
from flux_func.bench.cases import Case, Settings, Side
from flux_func.bench.measure import Row
from flux_func.errors import UserError
from flux_func.interop import target
from flux_func.models import flux
from flux_func.parallel import fold
from flux_func.parity import process


def run() -> None:
    """The console script."""
    _define_flags()
    cli.run(main, alone=True)


def _define_flags() -> None:
    flags.DEFINE_list("peers", ["ours", "bfl", "diffusers"], f"Of {','.join(cases.PEERS)}, in this order.")
    flags.DEFINE_string("reference_python", None, "Python of torchtitan's environment; left out: this one.")
    flags.DEFINE_list("flavor", ["flux-debug"], f"Of {','.join(flux.FLAVORS)}.")
    flags.DEFINE_list("depth", [], "Blocks: 4 double and as many single ones, or 19+38; left out: the flavor's own.")
    flags.DEFINE_list("work", ["train_step"], f"Of {','.join(cases.WORK)}.")
    flags.DEFINE_list("image_size", ["256"], "Pixels of a square's side, a multiple of 16.")
    flags.DEFINE_list("tokens", ["256"], "Of the text.")
    flags.DEFINE_list("batch", ["2"], "Samples.")
    flags.DEFINE_list("dtype", ["float32"], f"What to compute in, of {','.join(measure.BOUNDS)}.")
    flags.DEFINE_list("remat", ["none"], f"Our policy of recomputation in training, of {','.join(fold.REMAT)}.")
    flags.DEFINE_bool("compile", False, "Compile each block, by torch.compile.")
    flags.DEFINE_integer("steps", 4, "Euler steps of a sample.", lower_bound=1)
    flags.DEFINE_integer("warmup", 3, "Steps of each before those; their losses are compared.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Timed steps of each; of compile, processes.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of weights and inputs.")
    flags.DEFINE_string("out", None, "Folder of the report, new or empty; left out: bench/NNN.")
    cli.define_device()


def main(argv: list[str]) -> int:
    """Measures as the flags say; returns the exit code."""
    del argv
    # What is in the temporary folder goes with the process, and so do those that are measured.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given = flags.FLAGS
    asked, sides = choose_cases(given), choose_sides(given)
    settings = choose_settings(given)
    check(asked, sides, settings)
    pythons = choose_pythons(given)
    out = choose_out(given.out)
    try:
        rows = measure_all(asked, sides, settings, pythons)
    except measure.Disagreement as error:
        print(f"bench_main: {error}", file=sys.stderr)
        return 1
    report.write(out, rows, settings)
    print(report.table(rows))
    print(f"\n{out / 'bench.json'}")
    return 0


# Flags.


def choose_cases(given: Any) -> list[Case]:
    """Returns what the flags name; UserError for what there is not."""
    depths = [_depth(given.depth, text) for text in given.depth]
    return [
        case
        for flavor in _some_of("flavor", given.flavor, list(flux.FLAVORS))
        for case in cases.product(
            flavor=[flavor],
            depth=_distinct("depth", depths) or [_own_depth(flavor)],
            work=_some_of("work", given.work, cases.WORK),
            image_size=_numbers("image_size", given.image_size, 16),
            tokens=_numbers("tokens", given.tokens),
            batch=_numbers("batch", given.batch),
        )
    ]


def choose_sides(given: Any) -> list[Side]:
    """Returns who the flags say takes part; UserError for whom there is not."""
    peers, remats = _some_of("peers", given.peers, cases.PEERS), _some_of("remat", given.remat, list(fold.REMAT))
    if remats != ["none"] and ("ours" not in peers or {*given.work} - {*cases.TRAINING}):
        raise UserError(
            f"--remat is {','.join(remats)!r}: is ours, and of {' and '.join(cases.TRAINING)} alone; leave it out"
        )
    return cases.sides(peers, _some_of("dtype", given.dtype, list(measure.BOUNDS)), remats)


def choose_settings(given: Any) -> Settings:
    """Returns how the flags say to measure."""
    names = ("compile", "steps", "warmup", "rounds", "seed")
    return Settings(str(cli.choose_device(given.device)), **{name: getattr(given, name) for name in names})


def check(asked: Sequence[Case], sides: Sequence[Side], settings: Settings) -> None:
    """Raises UserError where a side cannot do what is asked, or the machine cannot hold it."""
    cases.check(asked, [side.peer for side in sides])
    available = report.available_bytes()
    if settings.device == "cpu" and available is not None:
        cases.check_memory(asked, len(sides), available)


def choose_pythons(given: Any) -> dict[str, str]:
    """Returns what each peer is run by; UserError where it is not installed there."""
    pythons = dict.fromkeys(given.peers, sys.executable)
    if given.reference_python is not None:
        if "torchtitan" not in pythons:
            raise UserError(
                f"--reference_python is {given.reference_python!r}: is torchtitan's, and --peers has none; leave it out"
            )
        pythons["torchtitan"] = given.reference_python
    for peer, python in pythons.items():
        if peer != "ours":
            process.check(peer, python, "--peers has")
    return pythons


def choose_out(out: str | None) -> Path:
    """Returns the report's folder, which is not there yet or empty; UserError where it cannot be written."""
    numbers = (Path("bench") / f"{number:03d}" for number in itertools.count())
    path = next(path for path in numbers if not path.exists()) if out is None else Path(out)
    target.check(path, 2**20)
    return path


def _own_depth(flavor: str) -> tuple[int, int]:
    cfg = flux.flavor(flavor)
    return cfg.depth, cfg.depth_single_blocks


def _depth(texts: Sequence[str], text: str) -> tuple[int, int]:
    numbers = text.split("+")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers) or not any(map(int, numbers)):
        raise UserError(
            f"--depth is {','.join(texts)!r}: should be numbers of blocks, such as 4, or 19+38: double and single ones"
        )
    return int(numbers[0]), int(numbers[-1])


def _some_of(flag: str, values: Sequence[str], known: Sequence[str]) -> list[str]:
    for value in values or [""]:
        if value not in known:
            raise UserError(f"--{flag} is {','.join(values)!r}: {configs.one_of(value, known)}")
    return _distinct(flag, list(values))


def _numbers(flag: str, values: Sequence[str], multiple: int = 1) -> list[int]:
    should = f"should be numbers from {multiple} on" + (f", multiples of {multiple}" if multiple > 1 else "")
    for value in values or [""]:
        if not value.isdecimal() or int(value) < multiple or int(value) % multiple:
            raise UserError(f"--{flag} is {','.join(values)!r}: {should}, such as {16 * multiple}")
    return _distinct(flag, [int(value) for value in values])


def _distinct(flag: str, values: list) -> list:
    if len({*values}) < len(values):
        raise UserError(f"--{flag} names one twice: leave one of them out")
    return values


# Measuring.


def measure_all(asked: Sequence[Case], sides: Sequence[Side], settings: Settings, pythons: dict[str, str]) -> list[Row]:
    """Returns the rows of all cases, under a progress bar."""
    rows: list[Row] = []
    with tqdm(total=sum(measure.ticks(case, sides, settings) for case in asked), unit="step") as bar:

        def tick(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        for cfg, of_model in itertools.groupby(asked, key=lambda case: case.cfg):
            with tempfile.TemporaryDirectory(prefix="bench_") as name:
                weights = cases.write_weights(cfg, pythons, settings.seed, Path(name))
                for case in of_model:
                    rows += measure.measure(case, sides, settings, weights, pythons, Path(name), tick)
    return rows


if __name__ == "__main__":
    run()
