"""What a comparison came to, for a terminal, for a program and for a person: a table, report.json and report.html."""

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_func.interop import target
from flux_func.parity.compare import Comparison, failed_stages
from flux_func.parity.rows import Row

_STYLE = """
:root { --ok: #1a7f37; --bad: #c4281c; --line: #d8dee4; --soft: #f6f8fa; --ink: #1f2328; --dim: #59636e }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: var(--ink);
  max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 10px }
.verdict { display: inline-block; color: #fff; border-radius: 6px; padding: 2px 12px; font-weight: 600 }
.passed { background: var(--ok) } .failed { background: var(--bad) } .dim { color: var(--dim) }
.pictures { display: flex; gap: 16px; flex-wrap: wrap } figure { margin: 0; flex: 1 1 240px }
figure img { width: 100%; display: block; border: 1px solid var(--line); border-radius: 6px;
  image-rendering: pixelated }
figcaption { color: var(--dim); font-size: 13px; margin-top: 4px }
.plot { width: 100%; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100% } td, th { padding: 4px 10px; text-align: left; vertical-align: top }
tr.first { border-top: 1px solid var(--line) } tr.first td:first-child { font-weight: 600 }
th { background: var(--soft); font-weight: 600 }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.where { color: var(--dim); font-size: 13px; overflow-wrap: anywhere }
tr.bad td { background: #ffebe9 } td.mark { color: var(--ok); font-weight: 600 } tr.bad td.mark { color: var(--bad) }
.groups { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0 }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
"""


def table(rows: Iterable[Row]) -> str:
    """Returns the rows as text in columns."""
    cells = [("part", "what", "measure", "value", "bound", "", "where")]
    cells += [
        (row.part, row.name, row.measure, number(row.value), number(row.bound), mark(row), row.where) for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float) -> str:
    """Returns a number as reports show it."""
    return "0" if value == 0 else f"{value:.2e}"


def mark(row: Row) -> str:
    """Returns what stands beside a row."""
    return "ok" if row.passed else "FAIL"


def verdict(comparison: Comparison) -> str:
    """Returns in one line whether all is within its bounds, and the stages that differ by themselves."""
    failed = [row for row in comparison.rows if not row.passed]
    if not failed:
        return f"passed: {len(comparison.rows)} of {len(comparison.rows)} within their bounds"
    line = f"FAILED: {len(failed)} of {len(comparison.rows)} out of bounds"
    stages = failed_stages(comparison.rows)
    beyond = f"stages that differ by themselves: {', '.join(stages)}" if stages else "no stage differs by itself"
    return f"{line}; {beyond if any(row.part == 'stages' for row in comparison.rows) else failed[0].name}"


def write(out: Path, comparison: Comparison, about: Mapping[str, Any]) -> None:
    """Writes report.json and report.html into a folder that is not there yet, or empty; UserError where it cannot be.

    Args:
      out: the folder.
      comparison: what came of it.
      about: what was compared and by what: "title", "subtitle", and named groups of settings.
    """
    passed = all(row.passed for row in comparison.rows)
    rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in comparison.rows]
    saved = {"passed": passed, "verdict": verdict(comparison), **about, "rows": rows, "gradients": comparison.gradients}
    with target.beside(out) as partial:
        partial.mkdir()
        # JSON has no number that is none.
        text = json.dumps(_finite(saved), indent=1, allow_nan=False)
        (partial / "report.json").write_text(text + "\n", encoding="utf-8")
        (partial / "report.html").write_text(page(comparison, about), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def page(comparison: Comparison, about: Mapping[str, Any]) -> str:
    """Returns the page, with everything that it shows within it."""
    passed = all(row.passed for row in comparison.rows)
    word, kind = ("passed", "passed") if passed else ("failed", "failed")
    title = html.escape(about["title"])
    settings = "".join(_settings(name, group) for name, group in about.items() if isinstance(group, Mapping))
    parts = [
        f'<h1>{title}</h1><p class="dim">{html.escape(about["subtitle"])}</p>',
        f'<p><span class="verdict {kind}">{word}</span> {html.escape(verdict(comparison).partition(": ")[2])}</p>',
        _plot_section(comparison),
        _picture_section(comparison.images),
        "<h2>Every comparison</h2>",
        _table_section(comparison.rows),
        f'<div class="groups">{settings}</div>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _table_section(rows: list[Row]) -> str:
    header = "".join(f"<th>{name}</th>" for name in ("part", "what", "measure", "value", "bound", "", "where"))
    lines = []
    for before, row in zip([None, *rows], rows, strict=False):
        part = row.part if before is None or before.part != row.part else ""
        cells = [f"<td>{html.escape(text)}</td>" for text in (part, row.name, row.measure)]
        cells += [f'<td class="number">{number(value)}</td>' for value in (row.value, row.bound)]
        cells += [f'<td class="mark">{mark(row)}</td>', f'<td class="where">{html.escape(row.where)}</td>']
        kinds = " ".join(["first"] * bool(part) + ["bad"] * (not row.passed))
        lines.append(f'<tr class="{kinds}">{"".join(cells)}</tr>')
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"


def _settings(name: str, group: Mapping[str, Any]) -> str:
    shown = {
        key: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for key, value in group.items()
    }
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in shown.items())
    return f"<section><h2>{html.escape(name.capitalize())}</h2><dl>{items}</dl></section>"


# Pictures.


def _picture_section(images: Mapping[str, Tensor]) -> str:
    if not images:
        return ""
    shown = {name: (image.clamp(-1, 1) + 1) / 2 for name, image in images.items()}
    difference = (shown["ours"] - shown["theirs"]).abs()
    largest = difference.max().item()
    factor = _round(1 / largest) if largest > 0 else 1
    pictures = {
        "the reference": shown["theirs"],
        "ours": shown["ours"],
        f"the difference, {factor:,} times as large (at most {number(largest)} of white)": difference * factor,
    }
    figures = [
        f'<figure><img alt="{text}" src="{_png(image)}"><figcaption>{text}</figcaption></figure>'
        for text, image in pictures.items()
    ]
    return f'<h2>The image at the end of the trajectory</h2><div class="pictures">{"".join(figures)}</div>'


def _round(value: float) -> int:
    """Returns the largest of 1, 2, 5, 10, 20, ... that is not above a value, and at least 1."""
    power = 10 ** max(0, math.floor(math.log10(value)))
    return max(digit * power for digit in (1, 2, 5) if digit == 1 or digit * power <= value)


def _png(image: Tensor) -> str:
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "png")
    return _data("image/png", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# The plot.

_LEAST = 1e-9  # where what is equal to the bit is drawn
_SERIES = {
    "stages": ("each stage by itself, forward", "#0969da", "o"),
    "gradients": ("gradients, worst leaf of a stage", "#bc4c00", "s"),
}


def _plot_section(comparison: Comparison) -> str:
    series = {kind: [row for row in comparison.rows if row.part == kind and row.stage] for kind in _SERIES}
    if not any(series.values()):
        return ""
    text = "Relative error of each stage, and its bound"
    return f'<h2>{text}</h2><img class="plot" alt="{text}" src="{_plot(series)}">'


def _plot(series: Mapping[str, list[Row]]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stages = [row.stage for row in series["stages"]]
    with rc_context({"svg.hashsalt": "parity", "font.size": 10}):
        figure = Figure(figsize=(max(10, 0.2 * len(stages)), 4.2), layout="constrained")
        axes = figure.add_subplot()
        for kind, rows in series.items():
            _draw(axes, kind, rows, stages)
        axes.set_yscale("log")
        axes.set_ylim(_LEAST / 2, 4 * axes.get_ylim()[1])
        axes.set_ylabel("relative error")
        axes.set_xlim(-0.5, len(stages) - 0.5)
        axes.set_xticks(range(len(stages)), stages, rotation=90 if len(stages) > 12 else 0)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data("image/svg+xml", buffer.getvalue())


def _draw(axes: Any, kind: str, rows: list[Row], stages: list[str]) -> None:
    label, color, symbol = _SERIES[kind]
    for row in rows:
        place, value = stages.index(row.stage), row.value if math.isfinite(row.value) else 1.0
        paint = color if row.passed else "#c4281c"
        axes.plot(place, max(value, _LEAST), symbol, color=paint, mfc=paint if value else "white", ms=8)
        if not value:
            axes.annotate("equal", (place, _LEAST), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
        elif not row.passed:
            axes.annotate(number(row.value), (place, value), xytext=(0, 8), textcoords="offset points", ha="center",
                          color=paint, fontweight="bold")  # fmt: skip
    bound = max(row.bound for row in rows)
    axes.plot([], [], symbol, color=color, label=label)
    axes.axhline(bound, color=color, linestyle="--", linewidth=1)
    axes.text(len(stages) - 0.5, bound, f"bound {bound:.0e}", color=color, va="bottom", ha="right", fontsize=8)
