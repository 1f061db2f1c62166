"""What each policy of numerics costs in accuracy and saves in memory, against float32.

    python docs/numerics.py --out=/tmp/flux_numerics [--steps=200]

Prints the table of docs/numerics.md, and draws docs/numerics.png: the losses of flux-tiny over the steps of a run on
the digits, by each policy from the same weights, data and noise. Errors of gradients are those of a model of the real
one's head size from weights none of which is zero: of each leaf the norm of the difference over the norm of float32's.
Memory is of parameters, gradients and moments of the 11.9B model. Takes some minutes; Float8 is emulated on a CPU.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import ml_collections
import torch
from absl import flags
from matplotlib.figure import Figure
from tqdm import tqdm

import flux_func as ff
from flux_func import cli
from flux_func import config as configs
from flux_func.models.layers import Ops
from flux_func.parallel.mesh import ONE
from flux_func.parallel.sharding import Sharding
from flux_func.train import layout, loop, metrics, optimizer, state

COMPUTE = {"numerics.compute": "bfloat16"}
NARROW = {**COMPUTE, "numerics.param": "bfloat16", "numerics.reduce": "bfloat16"}
EIGHT = {"optimizer.moments": "8bit"}
POLICIES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 compute": COMPUTE,
    "Float8, tensorwise": {**COMPUTE, "numerics.linear": "float8_tensorwise"},
    "Float8, rowwise": {**COMPUTE, "numerics.linear": "float8_rowwise"},
    "MXFP8": {**COMPUTE, "numerics.linear": "mxfp8"},
    "bfloat16 moments": {**COMPUTE, "optimizer.moments": "bfloat16"},
    "8-bit moments": {**COMPUTE, **EIGHT},
    "bfloat16 parameters": NARROW,
    "the same, rounded to the nearest": {**NARROW, "numerics.rounding": "nearest"},
    "bfloat16 parameters, 8-bit moments": {**NARROW, **EIGHT},
    "the same, Float8 rowwise": {**NARROW, **EIGHT, "numerics.linear": "float8_rowwise"},
}
# Two heads of the real model's size.
CFG = dataclasses.replace(
    ff.flavor("flux-tiny"), hidden_size=256, num_heads=2, axes_dim=(16, 56, 56), context_in_dim=32, vec_in_dim=16
)
# Losses are compared as means of so many steps too, of which one batch's luck is less a part.
WINDOW = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """A policy's figures: GiB, relative errors of gradients (the median leaf's, the worst one's), and the losses."""

    memory: float
    median: float
    worst: float
    losses: list[float]


def run() -> None:
    """The program."""
    flags.DEFINE_string("out", None, "Folder for the runs' workdirs.", required=True)
    flags.DEFINE_integer("steps", 200, "Steps of each run.", lower_bound=WINDOW)
    cli.run(main)


def main(argv: list[str]) -> None:
    """Measures every policy, prints the table and draws the losses."""
    del argv
    given, found = flags.FLAGS, {}
    expected = gradients({})
    for name, fields in tqdm(POLICIES.items(), desc="policies"):
        errors = sorted(distances(gradients(fields), expected))
        losses = train(fields, given.steps, Path(given.out) / name.replace(" ", "_"))
        found[name] = Row(memory(fields), statistics.median(errors), errors[-1], losses)
    print(table(found))
    draw(found, Path(__file__).with_name("numerics.png"))


def configured(fields: Mapping[str, Any], **more: Any) -> ml_collections.ConfigDict:
    """Returns the config of a policy."""
    config = configs.default()
    config.update_from_flattened_dict({**fields, **more})
    configs.validate(config)
    return config


def memory(fields: Mapping[str, Any]) -> float:
    """Returns the GiB of parameters, gradients and moments of the 11.9B model."""
    config, cfg = configured(fields), ff.flavor("flux-schnell")
    kept = state.abstract(config, cfg, optimizer.from_config(config))
    return (state.size_in_bytes(kept) + state.size_in_bytes(kept["params"])) / 2**30


def gradients(fields: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the gradients of `CFG` by a policy, by path."""
    config = configured(fields)
    draws, n = torch.Generator().manual_seed(0), config.numerics
    shapes = {"latents": (4, 16, 8, 8), "noise": (4, 16, 8, 8), "txt": (4, 16, 32), "y": (4, 16)}
    batch = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    batch["timesteps"] = torch.rand(4, generator=draws)
    params = ff.init(CFG, dtype=state.DTYPES[n.param], scheme="nonzero")
    sharding = Sharding(ONE, compute=state.DTYPES[n.compute], reduce=state.DTYPES[n.reduce], device=torch.device("cpu"))
    ops: Ops = layout.ops(config, CFG, sharding)
    return ff.tree.flatten(ff.grad_and_value(params, CFG, batch, ops=ops, sharding=sharding)[0])


def distances(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[float]:
    """Returns each leaf's relative error."""
    return [float((found[path].double() - x.double()).norm() / x.double().norm()) for path, x in expected.items()]


def train(fields: Mapping[str, Any], steps: int, workdir: Path) -> list[float]:
    """Returns the losses of a run on the digits."""
    run = {
        "model.flavor": "flux-tiny",
        "data.image_size": 64,
        "text.max_length": 4,
        "train.batch_size": 32,
        "train.steps": steps,
        "optimizer.lr": 1e-3,
        "optimizer.warmup_steps": WINDOW,
        "metrics.tensorboard": False,
        "checkpoint.last_weights_only": True,
    }
    loop.train(configured(fields, **run), str(workdir), torch.device("cpu"))
    return [record["loss"] for record in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in record]


def means(losses: list[float]) -> list[float]:
    """Returns the means of `WINDOW` losses, from each on."""
    return [statistics.mean(losses[at : at + WINDOW]) for at in range(len(losses) - WINDOW + 1)]


def apart(found: list[float], expected: list[float]) -> float:
    """Returns the largest relative difference of two losses at the same step."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def table(found: Mapping[str, Row]) -> str:
    """Returns the figures as a table in Markdown."""
    wide = found["float32"].losses
    lines = [
        f"| | memory, 11.9B | gradient: median, worst leaf | loss: worst step | worst mean of {WINDOW} |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        losses = f"{apart(row.losses, wide):.2%} | {apart(means(row.losses), means(wide)):.2%}"
        lines.append(f"| {name} | {row.memory:.1f} GiB | {row.median:.2%}, {row.worst:.2%} | {losses} |")
    return "\n".join(lines)


def draw(found: Mapping[str, Row], path: Path) -> None:
    """Draws the losses, and beneath how far each policy's mean is from float32's."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    wide = means(found["float32"].losses)
    steps = range(WINDOW, len(wide) + WINDOW)
    for number, (name, row) in enumerate(found.items()):
        mean, colour = means(row.losses), matplotlib.colormaps["tab20"](number)
        above.plot(steps, mean, label=name, color=colour, linewidth=1)
        below.plot(steps, [100 * (a / b - 1) for a, b in zip(mean, wide, strict=True)], color=colour, linewidth=1)
    above.set(
        ylabel=f"loss, mean of {WINDOW} steps", title="flux-tiny on the digits, each policy from the same weights"
    )
    above.legend(fontsize=8)
    below.axhspan(-1, 1, color="0.92", zorder=0)
    below.set(xlabel="step", ylabel="from float32's, %")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run()
