"""Draws what parity_main measured: every value as a share of its bound, a colour for each reference.

    python docs/parity.py parity/bfl_000 parity/diffusers_000 parity/torchtitan_000

Reads report.json of each folder and writes docs/parity.png (or --out).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags
from matplotlib.figure import Figure

OUT = flags.DEFINE_string("out", str(Path(__file__).with_name("parity.png")), "The picture to write.")
# Smaller values stand at the left edge, those that are equal to the bit too.
LEAST = 1e-3


def main(argv: list[str]) -> None:
    """Draws the reports of the folders named."""
    if len(argv) < 2:
        raise app.UsageError("name the folders that parity_main wrote")
    draw([json.loads((Path(folder) / "report.json").read_text(encoding="utf-8")) for folder in argv[1:]], OUT.value)


def draw(reports: list[Mapping[str, Any]], out: str) -> None:
    """Writes a picture with a line for each comparison."""
    names = list(dict.fromkeys(name(row) for report in reports for row in bounded(report)))
    figure = Figure(figsize=(9, 0.2 * len(names) + 1), layout="constrained")
    axes = figure.add_subplot()
    for marker, report in zip("os^", reports, strict=False):
        shares = {name(row): row["value"] / row["bound"] for row in bounded(report)}
        heights = [names.index(each) for each in shares]
        axes.plot([max(share, LEAST) for share in shares.values()], heights, marker, alpha=0.7, label=title(report))
    axes.axvline(1, color="#c4281c", linewidth=1.2)
    axes.set_xscale("log", base=10)
    axes.set_xlim(LEAST * 0.8, 3)
    axes.set_xticks([LEAST, 0.01, 0.1, 1], ["0.1% or less", "1%", "10%", "the bound"])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(reports), frameon=False)
    figure.savefig(out, dpi=120)


def bounded(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the rows that have a bound to be a share of: not those that have to be equal."""
    return [row for row in report["rows"] if row["bound"]]


def name(row: Mapping[str, Any]) -> str:
    """Returns what a row compares."""
    return f"{row['part']}: {row['name']}"


def title(report: Mapping[str, Any]) -> str:
    """Returns the reference and its version."""
    return report["title"].partition(" and ")[2].partition(",")[0]


if __name__ == "__main__":
    app.run(main)
