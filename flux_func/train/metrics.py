"""What a run says of itself: metrics.jsonl, TensorBoard, Weights & Biases, the console, curves.png, summary.json.

`open_metrics` gives a `Metrics`, which hands every record, a step and its values, to a list of sinks; any object with
`write(step, values)` and `close()` is one. A record of training carries the fields of `TRAINING`, one of validation
those of `VALIDATION`; other fields pass through.
"""

import contextlib
import json
import math
import os
import secrets
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flux_func.errors import UserError
from flux_func.train.curves import draw_curves, pairs, series

TRAINING = (
    "loss",  # mean squared error of the step's global batch
    "grad_norm",  # global norm before clipping
    "lr",
    "images_per_s",
    "tokens_per_s",
    "tflops",  # per second, of the formula in models/flops.py
    "mfu",  # tflops over metrics.peak_tflops; null where that is not set
    "peak_memory_gib",
    "data_wait_s",  # that a step waited for its batch, on the process that waited longest
    "time_share",  # of each of `clock.PHASES`, and of the rest; of all processes
    "samples_skipped",  # unusable samples replaced since the run began, see `Metrics.last`
)
VALIDATION = ("validation_loss", "validation_loss_by_timestep")


class Metrics:
    """Hands records to sinks, and closes the run with its summary and curves. A context manager."""

    def __init__(self, workdir: str | Path, sinks: Sequence[Any], console: "Console | None"):
        """See `open_metrics`; without a console nothing is said, and no file written."""
        self._workdir, self._sinks, self._console = Path(workdir), [*sinks, *([console] if console else [])], console
        self._start = time.perf_counter()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        while self._sinks:
            self._sinks.pop().close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record: `values` are numbers, None, strings, or lists of them."""
        for sink in self._sinks:
            sink.write(step, values)

    def advance(self, step: int) -> None:
        """Moves the progress bar, for steps between records."""
        if self._console:
            self._console.advance(step)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._console:
            self._console.say(line)

    def last(self, field: str, default: Any = None) -> Any:
        """Returns the field's newest value on file, such as the count that a resumed run goes on from."""
        return _last(read_jsonl(self._records), field, default)

    def draw(self) -> None:
        """Draws curves.png of all the records so far."""
        if not self._console:
            return
        draw_curves(read_jsonl(self._records), self._workdir / "curves.png")

    def close(self, **more: Any) -> dict[str, Any]:
        """Ends the run: draws the curves, writes summary.json (`summarize` and `more`) and returns it."""
        self.draw()
        summary = summarize(read_jsonl(self._records), time.perf_counter() - self._start) | more
        if self._console:
            write_json(self._workdir / "summary.json", summary)
        self.__exit__()
        return summary

    @property
    def _records(self) -> Path:
        return self._workdir / "metrics.jsonl"


def open_metrics(
    workdir: str | Path,
    steps: int,
    resumed: int = 0,
    tensorboard: bool = True,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
    first: bool = True,
) -> Metrics:
    """Returns the metrics of a run, made ready to go on after step `resumed` (0: from the start).

    What a killed run wrote beyond that step is dropped, so that every step is there once.

    Args:
      workdir: the run's folder, which exists.
      steps: of the whole run.
      resumed: the checkpoint's step.
      tensorboard: write event files into the workdir.
      wandb: project of Weights & Biases; "": none.
      config: the run's configuration, for Weights & Biases.
      first: whether this process is the one that writes. Of any other, the metrics only read.

    Raises:
      UserError: Weights & Biases is asked for and not installed; nothing was written.
    """
    sinks: list[Any] = []
    if not first:
        return Metrics(workdir, sinks, None)
    if wandb:
        sinks.append(WeightsAndBiases(workdir, wandb, config or {}))
    sinks.append(JsonLines(Path(workdir) / "metrics.jsonl", resumed))
    if tensorboard:
        sinks.append(TensorBoard(workdir, resumed))
    return Metrics(workdir, sinks, Console(steps, resumed))


class JsonLines:
    """One JSON object a line, flushed; what is not finite is null, as JSON has no word for it."""

    def __init__(self, path: str | Path, resumed: int = 0):
        """Opens `path` to append, once its records beyond step `resumed` (0: all) and a torn last line are dropped."""
        kept = [record for record in read_jsonl(path) if resumed and record["step"] <= resumed]
        _replace(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **_finite(values)}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under train/ and validation/, in event files of the workdir; the items of a list one by one."""

    def __init__(self, workdir: str | Path, resumed: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        # What earlier files of the folder have from this step on is not shown.
        self._writer = SummaryWriter(str(workdir), purge_step=resumed + 1 if resumed else 0, flush_secs=10)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for tag, value in _scalars(values):
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same scalars in a run of Weights & Biases, which a resumed run goes on with."""

    def __init__(self, workdir: str | Path, project: str, config: Mapping[str, Any]):
        wandb = import_wandb(project)
        known = Path(workdir) / "wandb_run_id.txt"
        if not known.exists():
            _replace(known, secrets.token_hex(4))
        run = {"id": known.read_text(), "resume": "allow"}
        self._run = wandb.init(project=project, dir=str(workdir), config=dict(config), **run)
        # Our own step is the axis: theirs may only grow, and a resumed run may start before the last one written.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(_scalars(values))})

    def close(self) -> None:
        self._run.finish()


def import_wandb(project: str) -> Any:
    """Returns the module wandb; UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"metrics.wandb is {project!r}: Weights & Biases is not installed: "
            f"pip install flux-func[wandb], or set metrics.wandb to ''"
        ) from error
    return wandb


class Console:
    """A line for each record on standard output, and a progress bar on standard error where that is a terminal."""

    def __init__(self, steps: int, resumed: int = 0):
        from tqdm import tqdm

        self._steps = steps
        self._bar = tqdm(
            total=steps, initial=resumed, unit="step", file=sys.stderr, disable=None, dynamic_ncols=True, smoothing=0.1
        )

    def advance(self, step: int) -> None:
        self._bar.update(max(0, step - self._bar.n))

    def say(self, line: str) -> None:
        with self._bar.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.say(f"step {step}/{self._steps}  {console_line(values)}")
        self.advance(step)

    def close(self) -> None:
        self._bar.close()


# How a field reads on the console: its label before the number, the number, its unit after.
_CONSOLE = {
    "loss": ("loss ", ".4f", ""),
    "grad_norm": ("grad ", ".3g", ""),
    "lr": ("lr ", ".1e", ""),
    "images_per_s": ("", "short", " img/s"),
    "tokens_per_s": ("", "short", " tok/s"),
    "tflops": ("", "short", " TFLOP/s"),
    "mfu": ("mfu ", ".1%", ""),
    "peak_memory_gib": ("mem ", ".1f", " GiB"),
    "data_wait_s": ("data ", ".2f", " s"),
    "samples_skipped": ("skipped ", "d", ""),
    "validation_loss": ("validation loss ", ".4f", ""),
    "validation_loss_by_timestep": ("by timestep ", ".3f", ""),
}


def console_line(values: Mapping[str, Any]) -> str:
    """Returns a record in words, such as `loss 1.0234  grad 0.51  lr 1.0e-04  0.26 img/s`; what is None is left out."""
    words = []
    for field, (label, spec, unit) in _CONSOLE.items():
        value = values.get(field)
        if value is None or (field == "samples_skipped" and value == 0):
            continue
        numbers = [n for _, n in pairs(value)] if isinstance(value, (Mapping, list, tuple)) else [value]
        words.append(label + " ".join(_number(number, spec) for number in numbers) + unit)
    return "  ".join(words)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl; none where there is no file; a line torn by a kill is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, beside the file and then renamed; what is not finite is null."""
    _replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def summarize(records: Iterable[Mapping[str, Any]], wall_time_s: float) -> dict[str, Any]:
    """Returns what summary.json says of a run: its end, its best, its speed and the versions that made it."""
    records = list(records)
    validation = list(zip(*series(records, "validation_loss"), strict=True))
    best = min(validation, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf, default=(None, None))
    speeds = [speed for speed in series(records, "images_per_s")[1] if math.isfinite(speed)]
    return {
        "steps": max((record["step"] for record in records), default=0),
        "final_loss": _last(records, "loss"),
        "last_validation_loss": _last(records, "validation_loss"),
        "best_validation_loss": best[1],
        "best_validation_step": best[0],
        "wall_time_s": round(wall_time_s, 3),
        "images_per_s_median": statistics.median(speeds) if speeds else None,
        "time_share_median": _medians([record["time_share"] for record in records if "time_share" in record]),
        "peak_memory_gib": max(series(records, "peak_memory_gib")[1], default=None),
        "samples_skipped": _last(records, "samples_skipped", 0),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, torch and flux_func ("source": not installed as a package)."""
    import importlib.metadata
    import platform

    import torch

    try:
        ours = importlib.metadata.version("flux-func")
    except importlib.metadata.PackageNotFoundError:
        ours = "source"
    return {"python": platform.python_version(), "torch": torch.__version__, "flux_func": ours}


def peak_memory_gib(device: Any = "cpu") -> float:
    """Returns the most memory held so far, in GiB: torch's on a CUDA device, this process's resident set on the CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def say_shares(shares: Mapping[str, float]) -> str:
    """Returns where time goes in words, such as `compute 95.2%, optimizer 4.1%`, most first; what is 0 is left out."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in ordered if share)


def _medians(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in shares) for name in (shares[0] if shares else ())}


def _last(records: Sequence[Mapping[str, Any]], field: str, default: Any = None) -> Any:
    return next((record[field] for record in reversed(records) if field in record), default)


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields (tag, number) of every number in a record, such as ("validation/loss_by_timestep/3", 0.7)."""
    for field, value in values.items():
        tag = f"validation/{field.removeprefix('validation_')}" if field.startswith("validation_") else f"train/{field}"
        if isinstance(value, (int, float)):
            yield tag, value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from ((f"{tag}/{name}", item) for name, item in pairs(value) if item is not None)


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return "null"
    if spec == "short":
        spec = ",.0f" if abs(value) >= 100 else ".3g"
    return format(value, spec)


def _finite(value: Any) -> Any:
    """Returns `value` with None for every float in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: str | Path, text: str) -> None:
    """Writes a file beside `path` and renames it, so that nothing finds half of it."""
    beside = Path(f"{path}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
