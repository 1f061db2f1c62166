"""curves.png: a run's records as pictures."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def series(records: Iterable[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of the records that have the field; nan where it is null."""
    points = [(record["step"], record[field]) for record in records if field in record]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def pairs(value: Any) -> list[tuple[str, Any]]:
    """Returns (name, item) of a mapping's items, or (index, item) of a list's."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [(str(name), item) for name, item in items]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Returns the exponentially weighted means up to each value: weights (1 - 2 / (span + 1))^age, over their sum.

    A value that is not finite has no weight; where none has any yet, the mean is nan.
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = total * decay, weight * decay
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        means.append(total / weight if weight else math.nan)
    return means


def draw_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws the loss, validation loss, gradient norm, learning rate, speed and where time went into a PNG.

    It is written beside `path` and then renamed, so that a viewer never finds half of it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_timestep, shares = _timesteps(records), [record for record in records if record.get("time_share")]
    figure = Figure(figsize=(13, 7.5), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 12, height_ratios=(3, 2))
    loss = _panel(figure.add_subplot(grid[0, : 8 if by_timestep else 12]), "loss")
    _draw_noisy(loss, *series(records, "loss"))
    _draw_clean(loss, *series(records, "validation_loss"), label="validation", color=_ORANGE)
    if loss.has_data():
        loss.legend(frameon=False, fontsize=9)
    if by_timestep:
        _draw_timesteps(_panel(figure.add_subplot(grid[0, 8:]), "validation loss by timestep"), by_timestep)
    wide = 3 if shares else 4
    norm, rate, speed, *more = (figure.add_subplot(grid[1, at : at + wide]) for at in range(0, 12, wide))
    _draw_noisy(_panel(norm, "gradient norm"), *series(records, "grad_norm"))
    _draw_clean(_panel(rate, "learning rate"), *series(records, "lr"), color=_BLUE)
    rate.yaxis.set_major_formatter("{x:.1e}")
    _draw_noisy(_panel(speed, "images per second"), *series(records, "images_per_s"))
    for axes in more:
        _draw_shares(_panel(axes, "where a step's time goes"), shares)
    for axes in (loss, norm):
        if axes.dataLim.y0 > 0 and axes.dataLim.y1 > 20 * axes.dataLim.y0:
            axes.set_yscale("log")
    for axes in (rate, speed):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    last = max((record["step"] for record in records), default=1)
    for axes in figure.axes:
        axes.set_xlim(-0.02 * last, 1.02 * last)
    beside = f"{path}.part"
    FigureCanvasAgg(figure).print_png(beside)
    os.replace(beside, path)


_BLUE, _PALE, _ORANGE, _GREY = "#1b5e9e", "#a9cbe8", "#d9661f", "#666666"
_AREAS = ("#a9cbe8", "#e8b48a", "#8cbf88", "#d98aa5", "#9f8fc9", "#d9c56a", "#bbbbbb")


def _panel(axes: Any, title: str) -> Any:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step", color=_GREY, fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    return axes


def _draw_noisy(axes: Any, steps: list[int], values: list[float]) -> None:
    """Draws the values pale and their moving mean over them."""
    if not steps:
        return
    few = len(steps) <= 50
    axes.plot(steps, values, color=_PALE, linewidth=1, marker="o" if few else None, markersize=4, label="each record")
    axes.plot(steps, smooth(values, max(3, len(values) / 30)), color=_BLUE, linewidth=2, label="moving mean")


def _draw_clean(axes: Any, steps: list[int], values: list[float], **style: Any) -> None:
    if steps:
        axes.plot(steps, values, linewidth=1.5, marker="o" if len(steps) <= 50 else None, markersize=4, **style)


def _draw_timesteps(axes: Any, by_timestep: Mapping[str, tuple[list[int], list[float]]]) -> None:
    from matplotlib import colormaps

    for i, (name, (steps, values)) in enumerate(by_timestep.items()):
        color = colormaps["viridis"](0.95 * i / max(1, len(by_timestep) - 1))
        _draw_clean(axes, steps, values, label=name, color=color)
    where = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "reverse": True}
    axes.legend(title="timestep", frameon=False, fontsize=9, title_fontsize=9, **where)


def _draw_shares(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws the shares of the phases as areas, the largest at the bottom; those that are 0 throughout are left out."""
    steps, total = [record["step"] for record in records], dict.fromkeys(records[0]["time_share"], 0.0)
    for record in records:
        total = {name: sum_ + record["time_share"][name] for name, sum_ in total.items()}
    names = sorted((name for name in total if total[name]), key=lambda name: -total[name])
    if len(steps) == 1:  # of which an area would show nothing
        steps, records = [steps[0] - 0.5, steps[0] + 0.5], [*records, *records]
    areas = [[record["time_share"][name] for record in records] for name in names]
    axes.stackplot(steps, areas, labels=names, colors=_AREAS)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="lower left", fontsize=8, reverse=True)


def _timesteps(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns {name: (steps, validation losses)} of each timestep."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in pairs(record.get("validation_loss_by_timestep") or ()):
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(math.nan if value is None else value)
    return found
