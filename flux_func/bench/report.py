"""What was measured, for a terminal, for a program and for a person: a table, bench.json and bench.png."""

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flux_func.bench import measure
from flux_func.bench.cases import Settings
from flux_func.bench.measure import Row
from flux_func.interop import target

HEADER = ("", "median s", "from .. to", "ratio", "from .. to", "to", "TFLOP/s")
HEADER += ("peak GiB", "imports", "kept", "rest")
GIB = 2**30
# A peer has its colour in every plot.
COLOURS = {"ours": "tab:red", "bfl": "tab:blue", "diffusers": "tab:orange", "torchtitan": "tab:green"}


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as text in columns, case by case, and what blocks add.

    A ratio is the median, over the rounds, of a side's time to that of `measure.base` in the same round. peak =
    imports + kept (weights and moments) + rest.
    """
    groups = measure.by_case(rows)
    cells = [HEADER, *(line for group in groups for line in _lines(group))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = ["  ".join(map(str.rjust, line[1:], widths[1:])) for line in cells]
    labelled = [f"{line[0].ljust(widths[0])}  {text}".rstrip() for line, text in zip(cells, texts, strict=True)]
    found, each = [labelled[0]], iter(labelled[1:])
    for group in groups:
        found += ["", str(group[0].case), *(next(each) for _ in group)]
    return "\n".join([*found, *growth(rows)])


def _lines(group: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in group:
        to = measure.base(row, group)
        ratios = measure.ratios(row, to)
        memory = (row.peak_bytes, row.imported_bytes, row.kept_bytes, row.rest_bytes)
        yield (
            str(row.side),
            f"{row.median:.4g}",
            f"{min(row.seconds):.4g} .. {max(row.seconds):.4g}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} .. {max(ratios):.3f}",
            str(to.side),
            f"{row.flops / row.median / 1e12:.4g}" if row.flops else "",
            *(f"{value / GIB:.3f}" for value in memory),
        )


def growth(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each side and pair of depths that differ in nothing else: what more blocks take."""
    lines, alike = [], {}
    for row in rows:
        alike.setdefault((row.side, dataclasses.replace(row.case, depth=(0, 0))), []).append(row)
    for (side, _), found in alike.items():
        found = sorted(found, key=lambda row: sum(row.case.depth))
        for less, more in zip(found, found[1:], strict=False):
            depths, added = _depths(less, more), sum(more.case.depth) - sum(less.case.depth)
            if added:
                seconds, peak = (more.median - less.median) / added, (more.peak_bytes - less.peak_bytes) / added
                lines.append(
                    f"{more.case.work} of {side}: {depths} takes {more.median / less.median:.3f} times the seconds, "
                    f"{seconds:.4g} s and {peak / 2**20:.4g} MiB more a block"
                )
    return ["", *lines] if lines else []


def _depths(less: Row, more: Row) -> str:
    one, other = ("+".join(map(str, row.case.depth)) for row in (less, more))
    return f"{other} after {one}"


def write(out: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Writes bench.json, bench.txt and bench.png into a folder that is not there yet; UserError where it cannot be."""
    with target.beside(out) as partial:
        partial.mkdir()
        text = json.dumps(to_json(rows, settings), indent=1, allow_nan=False)
        (partial / "bench.json").write_text(text + "\n", encoding="utf-8")
        (partial / "bench.txt").write_text(table(rows) + "\n", encoding="utf-8")
        draw(rows, partial / "bench.png")


def to_json(rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """Returns all that was found, and what by, where and when."""
    found = []
    for group in measure.by_case(rows):
        for row in group:
            to = measure.base(row, group)
            ratios = measure.ratios(row, to)
            summary = {"median": row.median, "ratio": statistics.median(ratios), "ratios": ratios, "to": str(to.side)}
            fields = {**dataclasses.asdict(row), **summary}
            del fields["about"]
            found.append(fields)
    about = {row.side.peer: dict(row.about) for row in rows}
    return {"settings": dataclasses.asdict(settings), "machine": machine(), "peers": about, "rows": found}


def machine() -> dict[str, Any]:
    """Returns what there is to compute on, the load that was on it, and the time."""
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def available_bytes() -> int | None:
    """Returns the memory that can be had; None where Linux does not tell."""
    found = _first("/proc/meminfo", "MemAvailable")
    return 1024 * int(found.split()[0]) if found else None


def _first(path: str, name: str) -> str:
    """Returns what a file of lines `name: value` says first under a name, "" where there is no such thing."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws a panel for each case: medians as bars, from the least to the most as a line, and peaks of memory."""
    from matplotlib.figure import Figure

    groups = measure.by_case(rows)
    heights = [len(group) + 1.5 for group in groups]
    figure = Figure(figsize=(11, 0.45 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for group, (times, memory) in zip(groups, panels, strict=True):
        ends = [(row.median - min(row.seconds), max(row.seconds) - row.median) for row in group]
        _bars(times, group, [row.median for row in group], "seconds", xerr=list(zip(*ends, strict=True)))
        _bars(memory, group, [row.peak_bytes / GIB for row in group], "peak GiB")
        times.set_title(str(group[0].case), loc="left", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(axes: Any, group: Sequence[Row], values: Sequence[float], label: str, **more: Any) -> None:
    colours = [COLOURS[row.side.peer] for row in group]
    bars = axes.barh([str(row.side) for row in group], values, color=colours, error_kw={"elinewidth": 1}, **more)
    axes.bar_label(bars, fmt=" %.3g", fontsize=8)  # beside the line's end
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
