"""Where a run's time goes, phase by phase."""

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch

PHASES = ("data", "encode", "compute", "gather", "reduce", "optimizer")
REST = "other"

# (phase, when it began) in turn, and at last ("", when all ended). A moment is of time.perf_counter, or an event.
Lap = list[tuple[str, Any]]


class Clock:
    """Looks at the time whenever the phase changes.

    On a GPU that is the time at which the GPU comes by there, marked by events in its stream, so that nothing waits to
    be measured. A phase is then how long that stream was in it: of data, the time that there was nothing to compute;
    of a gather or a reduction, what computing did not hide.
    """

    def __init__(self, device: torch.device):
        self._now = functools.partial(_event, device) if device.type == "cuda" else time.perf_counter
        self._inside = [REST]
        self.start()

    def start(self) -> None:
        """Lets go of the time since the last lap."""
        self._marks: Lap = [(self._inside[-1], self._now())]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A `timeline.Listener`: what is in none of `PHASES`, such as a stage, is part of what it is inside of."""
        if name not in PHASES:
            yield
            return
        self._inside.append(name)
        self._mark()
        try:
            yield
        finally:
            self._inside.pop()
            self._mark()

    def lap(self) -> Lap:
        """Ends a lap, and begins the next."""
        ended, now = self._marks, self._now()
        self._marks = [(self._inside[-1], now)]
        return [*ended, ("", now)]

    def _mark(self) -> None:
        self._marks.append((self._inside[-1], self._now()))


def spent(lap: Lap) -> dict[str, float]:
    """Returns the seconds of each of `PHASES`, and of the `REST`; on a GPU it waits until the lap has ended there."""
    seconds = dict.fromkeys((*PHASES, REST), 0.0)
    if isinstance(lap[-1][1], torch.cuda.Event):
        lap[-1][1].synchronize()
    for (phase, start), (_, end) in itertools.pairwise(lap):
        seconds[phase] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
    return seconds


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
