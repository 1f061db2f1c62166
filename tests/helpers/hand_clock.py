"""A time that goes on when a test says so, for `train/clock.py` on any device."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flux_func.train import clock


class Hands:
    """What the time is: it goes on when a test says so."""

    now = 0.0


class Event:
    """An event of CUDA's in a stream that has come as far as `Hands` say."""

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.at, self.reached = None, False

    def record(self, stream: Any) -> None:
        assert stream == "computing"
        self.at = Hands.now

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


@contextlib.contextmanager
def set_by_hand() -> Iterator[None]:
    """While it is open, it is as late as `Hands` say, on every device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: Hands.now))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: "computing")
        yield
