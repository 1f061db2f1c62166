"""What the transforms cost: each against what it is compared with, interleaved, in time and memory.

    python docs/costs.py [--only=attention] [--rounds=9]

Prints a table and, where it is whole, draws docs/costs.png. A time is the median over the rounds, each of which runs
both; memory is the most that was allocated at once, by torch's own record of its allocator. Parameters are not counted
on either side.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from absl import flags
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import flux_func as ff
from flux_func import cli
from flux_func.models.attention import attention
from flux_func.transforms import curvature, per_sample, remat

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A transform, what it is compared with, and at most how many times its time and its memory it may take."""

    name: str
    run: Run
    than: str
    base: Run
    seconds: float | None = None
    memory: float | None = None


def of_attention() -> list[Row]:
    """Attention of 2,304 tokens in 4 heads of 128, against torch's own."""
    draws = torch.Generator().manual_seed(0)
    q, k, v, *tangents = (torch.randn(1, 4, 2304, 128, generator=draws) for _ in range(6))
    cotangent = torch.randn(1, 2304, 512, generator=draws)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def gradient(attend: Callable) -> Run:
        return lambda: torch.func.grad(lambda *at: (attend(*at) * cotangent).sum(), argnums=(0, 1, 2))(q, k, v)

    def math_tangent() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(sdpa, (q, k, v), tuple(tangents))

    def of_gradient() -> object:
        fn = torch.func.grad(lambda *at: (attention(*at) * cotangent).sum(), argnums=(0, 1, 2))
        return torch.func.jvp(fn, (q, k, v), tuple(tangents))

    def tangent() -> object:
        return torch.func.jvp(attention, (q, k, v), tuple(tangents))

    return [
        Row("attention's gradient", gradient(attention), "SDPA's", gradient(sdpa), 1.15),
        Row("attention's value and tangent", tangent, "SDPA's forward", lambda: sdpa(q, k, v), 6.0),
        Row("attention's value and tangent", tangent, "the math backend's", math_tangent, None, 0.15),
        Row("attention's jvp(grad)", of_gradient, "a gradient", gradient(attention), 4.5),
    ]


def of_blocks() -> list[Row]:
    """8 single blocks of width 768 on 2 samples of 576 image and 32 text tokens: activations outweigh the weights."""
    cfg = ff.FluxConfig(
        hidden_size=768,
        num_heads=6,
        depth=0,
        depth_single_blocks=8,
        axes_dim=(16, 56, 56),
        context_in_dim=64,
        vec_in_dim=64,
    )
    params, batch = ff.init(cfg, scheme="nonzero"), _batch(cfg, 2, side=48, text=32)

    def gradient(**kwargs: ff.Ops) -> Run:
        return lambda: torch.func.grad(ff.loss)(params, cfg, batch, **kwargs)

    return [Row("remat of every stage", gradient(ops=remat.ops()), "a gradient", gradient(), 1.35, 0.3)]


def of_digits() -> list[Row]:
    """flux-digits on 16 samples of 256 image and 16 text tokens."""
    cfg = dataclasses.replace(ff.flavor("flux-digits"), context_in_dim=256, vec_in_dim=64)
    params, batch = ff.init(cfg, scheme="nonzero"), _batch(cfg, 16, side=32, text=16)
    one = per_sample.one(ff.loss, cfg)

    def gradient() -> object:
        return torch.func.grad(ff.loss)(params, cfg, batch)

    def norms() -> object:
        return per_sample.norms(one, params, batch, chunk=4)

    def ghost_norms() -> object:
        return per_sample.ghost_norms(one, params, batch, chunk=16)

    def hvp() -> object:
        return curvature.hvp(ff.loss, params, params, cfg, batch)

    return [
        Row("Hessian-vector product", hvp, "a gradient", gradient, 4.2),
        Row("per-sample norms, 4 at a time", norms, "the batch's gradient", gradient, 1.6, 0.7),
        Row("per-sample norms by ghosts", ghost_norms, "the batch's gradient", gradient, 1.2),
    ]


PARTS = {"attention": of_attention, "blocks": of_blocks, "digits": of_digits}


def _batch(cfg: ff.FluxConfig, size: int, side: int, text: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    latents = (size, cfg.in_channels // 4, side, side)
    shapes = {
        "latents": latents,
        "noise": latents,
        "txt": (size, text, cfg.context_in_dim),
        "y": (size, cfg.vec_in_dim),
    }
    drawn = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    return {**drawn, "timesteps": torch.rand(size, generator=draws)}


def measure(row: Row, rounds: int) -> tuple[float, float]:
    """Returns (ratio of the times, ratio of the peaks of memory)."""
    seconds: dict[Run, list[float]] = {row.run: [], row.base: []}
    for _ in range(rounds):
        for run, found in seconds.items():
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    median = {run: statistics.median(found) for run, found in seconds.items()}
    return median[row.run] / median[row.base], peak_bytes(row.run) / peak_bytes(row.base)


def peak_bytes(run: Run) -> int:
    """Returns the most bytes that were allocated at once while `run` ran."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13 would log that a profile starts and stops
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return int(np.max(np.cumsum(sizes)))


def draw(found: list[tuple[Row, float, float]], path: Path) -> None:
    """Draws the ratios, and a mark where each bound is."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(found) + 1), sharey=True, gridspec_kw={"wspace": 0.35})
    names = [f"{row.name} / {row.than}" for row, _, _ in found]
    for axis, title, at in zip(axes, ("time", "memory"), (1, 2), strict=True):
        axis.barh(names, [each[at] for each in found], color="tab:blue")
        for place, (row, *values) in enumerate(found):
            bound = (row.seconds, row.memory)[at - 1]
            axis.plot([bound or np.nan] * 2, [place - 0.4, place + 0.4], "r-")
            text = f"{values[at - 1]:.3g}" + (f" of {bound}" if bound else "")
            axis.text(1.02, place, text, transform=axis.get_yaxis_transform(), va="center")
        axis.set(title=f"{title}, times that of the other; red: at most")
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def main(argv: list[str]) -> None:
    """Measures, prints and draws."""
    del argv
    rows = [row for name, part in PARTS.items() if flags.FLAGS.only in ("", name) for row in part()]
    found = [(row, *measure(row, flags.FLAGS.rounds)) for row in tqdm(rows, unit="row")]
    for row, seconds, memory in found:
        bounds = " and ".join(
            f"{what} {'within' if value <= bound else 'OVER'} {bound}"
            for what, value, bound in (("time", seconds, row.seconds), ("memory", memory, row.memory))
            if bound
        )
        print(f"{row.name:30} / {row.than:20} time {seconds:.2f}  memory {memory:.3f}  {bounds}")
    if not flags.FLAGS.only:
        draw(found, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    flags.DEFINE_enum("only", "", ["", *PARTS], "A part of the table; empty: all.")
    flags.DEFINE_integer("rounds", 9, "Runs of each, of which the median counts.", lower_bound=1)
    cli.run(main)
