"""Draws what plan_main planned: the memory of a process, mesh by mesh, and the samples it trains in a second.

    plan_main --config=configs/flux_dev.py --processes=64 --json=plan.json
    python docs/plan.py plan.json

Reads the JSON and writes docs/plan.png (or --out).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags
from matplotlib.figure import Figure

OUT = flags.DEFINE_string("out", str(Path(__file__).with_name("plan.png")), "The picture to write.")
MOST = flags.DEFINE_integer("most", 12, "Meshes drawn, the cheapest first.")
GIB = 2**30
# What is drawn, from the left, and what it adds up of a plan's bytes.
PARTS = {
    "parameters": ("state", ("params",), "#1f4e79"),
    "moments": ("state", ("opt",), "#4a86b8"),
    "average": ("state", ("ema",), "#9dc3e6"),
    "weights under the LoRA": ("state", ("base",), "#7030a0"),
    "encoders": ("frozen", ("T5", "CLIP", "autoencoder"), "#7f7f7f"),
    "gathered stages": ("at_the_peak", ("gathered",), "#548235"),
    "gradients": ("at_the_peak", ("gradients",), "#c55a11"),
    "encoding": ("at_the_peak", ("encoders",), "#bfbfbf"),
    "activations": ("at_the_peak", ("activations", "batch", "update"), "#ffc000"),
}


def main(argv: list[str]) -> None:
    """Draws the plans of a file."""
    if len(argv) != 2:
        raise app.UsageError("name the file that plan_main --json wrote")
    draw(json.loads(Path(argv[1]).read_text(encoding="utf-8"))["plans"][: MOST.value], OUT.value)


def draw(plans: list[Mapping[str, Any]], out: str) -> None:
    """Writes a picture with a bar for each plan."""
    figure = Figure(figsize=(9, 0.36 * len(plans) + 1.4), layout="constrained")
    axes, ends = figure.add_subplot(), [0.0] * len(plans)
    for name, (group, members, colour) in PARTS.items():
        sizes = [sum(plan["bytes"][group].get(member, 0) for member in members) / GIB for plan in plans]
        if any(sizes):
            axes.barh(range(len(plans)), sizes, left=ends, color=colour, label=name, height=0.7)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, (plan, end) in enumerate(zip(plans, ends, strict=True)):
        axes.text(end, place, f"  {plan['samples_per_s']:,.1f} samples/s", va="center", fontsize=8)
    axes.axvline(plans[0]["bytes"]["room"] / GIB, color="#c4281c", linewidth=1.2)
    axes.set_yticks(range(len(plans)), [mesh(plan) for plan in plans], fontsize=8)
    axes.set_ylim(len(plans) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * max(*ends, plans[0]["bytes"]["room"] / GIB))
    axes.set_xlabel(f"GiB of a process; the line is what {plans[0]['device']} has for tensors")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(PARTS), frameon=False, fontsize=8, columnspacing=1)
    figure.savefig(out, dpi=120)


def mesh(plan: Mapping[str, Any]) -> str:
    """Returns a mesh in words."""
    return ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one process"


if __name__ == "__main__":
    app.run(main)
