"""Some steps of a run under torch's profiler: a trace of each process, and the operations that take the time."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import torch
from torch.profiler import ProfilerActivity, record_function

from flux_func.errors import UserError
from flux_func.launch import processes
from flux_func.parallel.timeline import listening

# Steps before those that are traced: fresh memory, compilation, and the profiler's own start are in them.
WARMUP = 2
TOP = 10
LONGEST_NAME = 80
ONCE_A_STEP = "optimizer"


class Row(NamedTuple):
    """An operation: its own time in a step, in ms, without what it calls; its calls in a step; its share of all."""

    name: str
    ms: float
    calls: float
    share: float


def check(config: ml_collections.ConfigDict, start: int) -> None:
    """Checks that a run from step `start` on has as many steps as it is to trace; UserError where it has not."""
    steps, needed = config.profile.steps, start + WARMUP + config.profile.steps
    if steps and needed > config.train.steps:
        raise UserError(
            f"profile.steps is {steps}: after step {start} and {WARMUP} more, which are not traced, train.steps, "
            f"which is {config.train.steps}, should be at least {needed}"
        )


@contextlib.contextmanager
def traced(
    steps: int,
    start: int,
    workdir: Path,
    device: torch.device,
    say: Callable[[str], None],
    aside: Callable[[], contextlib.AbstractContextManager],
) -> Iterator[Callable[[], None]]:
    """Traces `steps` steps of a run, after `WARMUP`; yields what is to be called after each step.

    Every process writes WORKDIR/profile/step_NNNNNN/rank_R.json.gz, named by the first step traced, and the first
    process top_operations.txt beside it, which it says too. A run that is stopped before its time writes what it has.

    Args:
      steps: to trace; 0: none.
      start: the step that the run begins after.
      workdir: of the run.
      device: what it computes on.
      say: prints a line.
      aside: entered around the writing, which takes seconds.
    """
    if not steps:
        yield lambda: None
        return
    if device.type == "cpu":
        # There torch 2.13 logs that a profile starts and stops; on a GPU what is logged may be worth knowing.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    folder = workdir / "profile" / f"step_{start + WARMUP + 1:06d}"

    def write(profiler: torch.profiler.profile) -> None:
        with aside():
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"rank_{processes.rank()}.json.gz"))
            if processes.is_first():
                said = table(operations(profiler.key_averages(), device))
                (folder / "top_operations.txt").write_text(said + "\n", encoding="utf-8")
                say(f"{said}\n{folder} holds the trace: open it in https://ui.perfetto.dev")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1)
    options = {"activities": activities, "schedule": plan, "on_trace_ready": write, "acc_events": True}

    def end_step() -> None:
        if device.type == "cuda":  # whose kernels run behind: those of another step would be counted here
            torch.cuda.synchronize(device)
        profiler.step()

    with listening(record_function), torch.profiler.profile(**options) as profiler:
        yield end_step


def operations(events: Sequence[Any], device: torch.device) -> list[Row]:
    """Returns torch's operations, or on a GPU its kernels, by the time that they themselves took, the longest first.

    Args:
      events: of torch's profiler, those of one name added up.
      device: of which the time is.
    """
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    steps = sum(event.count for event in events if event.key == ONCE_A_STEP and event.device_type.name == "CPU")
    there = [e for e in events if e.device_type.name.lower() == device.type and not e.is_user_annotation]
    total = sum(getattr(event, own) for event in there)
    times = [(event.key[:LONGEST_NAME], getattr(event, own), event.count) for event in there]
    rows = [Row(name, time / 1e3 / steps, count / steps, time / total) for name, time, count in times if time]
    return sorted(rows, key=lambda row: -row.ms)


def table(rows: Sequence[Row]) -> str:
    """Returns the first `TOP` rows as text, and what the others come to."""
    others = rows[TOP:]
    ms, calls, share = (sum(column) for column in list(zip(*others, strict=True))[1:]) if others else (0, 0, 0)
    shown = [*rows[:TOP], Row(f"{len(others)} others", ms, calls, share)]
    cells = [("operation", "ms a step", "calls", "share")]
    cells += [(row.name, f"{row.ms:,.2f}", f"{row.calls:,g}", f"{row.share:.1%}") for row in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]) for name, *numbers in cells
    )
